"""LLaMA-Factory: SFT steps on video, and DPO steps on the frames as images.

Run by `python -m lab.bench.peers` with the Python of an environment that has LLaMA-Factory.
"""

import json

from llamafactory.train.tuner import run_exp
from trainer import TakesTurns
from turns import TARGETS, Turns, read_work


def main() -> None:
    task, folder, work = read_work()
    turns = Turns()
    kind, *how = task.split("_")
    media = "videos" if kind == "sft" else "images"
    rows = []
    for item in work["items"]:
        shown = [item["video"]] if media == "videos" else item["frames"]
        asked = f"<{media[:-1]}>" * len(shown) + item["question"]
        row = {"conversations": [{"from": "human", "value": asked}], media: shown}
        if kind == "sft":
            row["conversations"].append({"from": "gpt", "value": item["chosen"]})
        else:
            row |= {name: {"from": "gpt", "value": item[name]} for name in ("chosen", "rejected")}
        rows.append(row)
    data = folder / f"llamafactory_{kind}"
    data.mkdir(exist_ok=True)
    (data / "items.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "conversations", media: media}
    columns |= {"chosen": "chosen", "rejected": "rejected"} if kind == "dpo" else {}
    described = {"file_name": "items.json", "formatting": "sharegpt", "ranking": kind == "dpo", "columns": columns}
    (data / "dataset_info.json").write_text(json.dumps({"items": described}), encoding="utf-8")
    given = {
        "model_name_or_path": str(folder / "checkpoint"),
        "stage": kind,
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
        "image_max_pixels": work["side"] ** 2,
        "per_device_train_batch_size": work["batch"][kind],
        "gradient_accumulation_steps": 1,
        "disable_gradient_checkpointing": "checkpointed" not in how,
        "max_steps": work["steps"],
        "learning_rate": work["lr"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder / "llamafactory"),
    }
    if kind == "dpo":
        given |= {"pref_beta": work["beta"], "pref_loss": "sigmoid"}
    run_exp(given, [TakesTurns(turns)])


if __name__ == "__main__":
    main()
