"""ms-swift: GRPO, DPO and SFT steps on video.

Run by `python -m lab.bench.peers` with the Python of an environment that has ms-swift. Its template has the published
tokenizer's numbers of two tokens written into it, which are set to this checkpoint's.
"""

import json
import os

from swift import rlhf_main, sft_main
from swift.callbacks import callbacks_map
from swift.rewards import ORM, orms
from swift.template.templates.qwen import Qwen2VLTemplate
from trainer import TakesTurns
from transformers import AutoTokenizer
from turns import Turns, read_work, share_of_e


class ShareOfE(ORM):
    """One reward per answer."""

    def __call__(self, completions, **_) -> list[float]:
        return [share_of_e(text) for text in completions]


def main() -> None:
    task, folder, work = read_work()
    turns = Turns()
    callbacks_map["turns"] = lambda args, trainer: TakesTurns(turns)
    orms["share_of_e"] = ShareOfE
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    Qwen2VLTemplate.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    Qwen2VLTemplate.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    pixels = str(work["side"] ** 2)
    os.environ |= {"FPS_MIN_FRAMES": str(work["frames"]), "FPS_MAX_FRAMES": str(work["frames"])}
    os.environ |= {"VIDEO_MIN_PIXELS": pixels, "VIDEO_MAX_PIXELS": pixels}
    rows = []
    for item in work["items"]:
        turns_ = [{"role": "user", "content": f"<video>{item['question']}"}]
        row = {"messages": turns_, "videos": [item["video"]]}
        if task != "grpo":
            turns_.append({"role": "assistant", "content": item["chosen"]})
        if task == "dpo":
            row["rejected_response"] = item["rejected"]
        rows.append(json.dumps(row))
    (folder / f"swift_{task}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    given = {
        "model": folder / "checkpoint",
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "torch_dtype": "float32",
        "dataset": folder / f"swift_{task}.jsonl",
        "split_dataset_ratio": 0,
        "load_from_cache_file": "false",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "lora_rank": work["rank"],
        "lora_alpha": 2 * work["rank"],
        "lora_dropout": 0,
        "target_modules": "all-linear",  # of the decoder, as tower and projector are frozen
        "per_device_train_batch_size": work["batch"][task],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "max_steps": work["steps"],
        "learning_rate": work["lr"],
        "callbacks": "turns",
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": folder / "swift",
        "use_cpu": "true",
    }
    if task == "grpo":
        given |= {
            "rlhf_type": "grpo",
            "reward_funcs": "share_of_e",
            "num_generations": work["group"],
            "max_completion_length": work["new_tokens"],
            "beta": work["kl"],
            "temperature": 1.0,
        }
    elif task == "dpo":
        given |= {"rlhf_type": "dpo", "beta": work["beta"]}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    (sft_main if task == "sft" else rlhf_main)(words)


if __name__ == "__main__":
    main()
