"""LLaMA-Factory: SFT steps on video.

Run by `python -m lab.bench.peers` with the Python of an environment that has LLaMA-Factory.
"""

import json

from llamafactory.train.tuner import run_exp
from trainer import TakesTurns
from turns import TARGETS, Turns, read_work


def main() -> None:
    _, folder, work = read_work()
    turns = Turns()
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"<video>{item['question']}"},
                {"from": "gpt", "value": item["chosen"]},
            ],
            "videos": [item["video"]],
        }
        for item in work["items"]
    ]
    data = folder / "llamafactory_data"
    data.mkdir(exist_ok=True)
    (data / "items.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "conversations", "videos": "videos"}
    described = {"file_name": "items.json", "formatting": "sharegpt", "columns": columns}
    (data / "dataset_info.json").write_text(json.dumps({"items": described}), encoding="utf-8")
    given = {
        "model_name_or_path": str(folder / "checkpoint"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": work["rank"],
        "lora_alpha": 2 * work["rank"],
        "lora_target": ",".join(TARGETS),
        "dataset": "items",
        "dataset_dir": str(data),
        "template": "qwen2_vl",
        "cutoff_len": 4096,
        "overwrite_cache": True,
        "video_fps": 8.0,  # all frames of these videos, of which `video_maxlen` are taken
        "video_maxlen": work["frames"],
        "video_max_pixels": work["side"] ** 2,
        "per_device_train_batch_size": work["batch"]["sft"],
        "gradient_accumulation_steps": 1,
        "disable_gradient_checkpointing": True,
        "max_steps": work["steps"],
        "learning_rate": work["lr"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder / "llamafactory"),
    }
    run_exp(given, [TakesTurns(turns)])


if __name__ == "__main__":
    main()
