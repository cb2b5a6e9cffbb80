"""A run folder that people can judge: real videos and records, made-up answers and a made-up judge."""

import json
from pathlib import Path

import yaml

from rlaif_lite.data.readers import read_records

HASH = "0123456789ab"
NEUTRAL = {"name": "judged", "sft": {"easy": None, "hard": None, "policy_init": None}}


def labelled_run(folder: Path, world: Path, recipe_hash: str = HASH) -> Path:
    """A run on the test and the preference split of `world`: one item of each test video, and two pairs of each other
    record, of which the last two records' are held out of the reward model."""
    data = {name: [str(world / f"{name}.jsonl")] for name in ("preference", "rl", "test")}
    write(folder / "recipe.yaml", yaml.safe_dump(NEUTRAL | {"data": data, "output": str(folder)}))
    summary = {"recipe": "judged", "recipe_hash": recipe_hash, "method": "ppo", "finished": True}
    write(folder / "summary.json", json.dumps(summary))
    for role in ("sft", "ppo"):
        write_lines(folder / "evaluate" / f"{role}.greedy.jsonl", [answer(r, role) for r in records(world, "test")])
    pairs = [pair(record, place) for record in records(world, "preference") for place in (0, 1)]
    write_lines(folder / "preference" / "pairs.jsonl", pairs)
    kept = ("key", "chosen", "rejected")
    held = [{key: row[key] for key in kept} | {"gap": 1.0 if "<b>" in row["chosen"] else -1.0} for row in pairs[-4:]]
    write_lines(folder / "reward" / "heldout.jsonl", held)
    return folder


def records(world: Path, split: str) -> list:
    """(key, record) of a split."""
    return [(f"{split}/{i:05d}", r) for i, r in enumerate(read_records(world / f"{split}.jsonl").records)]


def answer(of, role: str) -> dict:
    """A line of `evaluate/*.jsonl`."""
    key, record = of
    row = {"key": key, "video": record.video, "id": record.id, "role": role, "mode": "greedy", "temperature": 0.0}
    row |= {"prompt": "describe the video", "answer": f"{role} says {key} .", "length": 5, "stopped": True}
    return row | {"truth": None, "accuracy": None, "repetition": 0.0, "wrong_words": []}


def pair(of, place: int) -> dict:
    """A line of `preference/pairs.jsonl`; the answers hold what would be markup."""
    key, _ = of
    chosen, rejected = (f"good <{'ab'[place]}> {key} .", "bad & worse . twice .")
    said = [[[chosen, 0.9, 0.1]], [["bad & worse .", 0.2, 0.7], ["twice .", 0.4, 0.6]]]
    margin = {"margin": 0.5 + place, "consistent": True, "said": said}
    return {"key": key, "chosen": chosen, "rejected": rejected} | margin


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_lines(path: Path, rows: list[dict]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
