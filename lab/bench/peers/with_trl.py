"""TRL: GRPO and DPO steps on the frames as images, as its trainers take no videos.

Run by `python -m lab.bench.peers` with the Python of an environment that has TRL.
"""

from datasets import Dataset, Image, List
from peft import LoraConfig
from trainer import TakesTurns
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from turns import TARGETS, Turns, read_work, share_of_e


def rewards(completions, **_) -> list[float]:
    """One reward per answer."""
    return [share_of_e(answer[0]["content"]) for answer in completions]


def said(text: str) -> list[dict]:
    """An answer as a turn."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def main() -> None:
    task, folder, work = read_work()
    turns = Turns()
    asked = [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * len(item["frames"]) + [{"type": "text", "text": item["question"]}],
                }
            ],
            "images": item["frames"],
        }
        for item in work["items"]
    ]
    for row, item in zip(asked, work["items"], strict=True):
        if task == "dpo":
            row |= {"chosen": said(item["chosen"]), "rejected": said(item["rejected"])}
    common = dict(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=work["batch"][task],
        gradient_accumulation_steps=1,
        max_steps=work["steps"],
        learning_rate=work["lr"],
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )
    lora = LoraConfig(
        r=work["rank"],
        lora_alpha=2 * work["rank"],
        target_modules=rf".*language_model.*\.({'|'.join(TARGETS)})",
        task_type="CAUSAL_LM",
    )
    given = dict(
        model=str(folder / "checkpoint"),
        train_dataset=Dataset.from_list(asked).cast_column("images", List(Image())),
        peft_config=lora,
        callbacks=[TakesTurns(turns)],
    )
    if task == "grpo":
        grpo = dict(
            num_generations=work["group"],
            max_completion_length=work["new_tokens"],
            beta=work["kl"],
            temperature=1.0,
            top_k=0,
        )
        trainer = GRPOTrainer(reward_funcs=rewards, args=GRPOConfig(**common, **grpo), **given)
    else:
        trainer = DPOTrainer(args=DPOConfig(**common, max_length=None, beta=work["beta"]), **given)
    trainer.train()


if __name__ == "__main__":
    main()
