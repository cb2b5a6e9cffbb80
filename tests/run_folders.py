"""Fabricated run folders in the real format, for the tests of the report. Nothing in them was measured."""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image

from rlaif_lite.report.stats import NEEDS_TRUTH, RATIOS, paired_bootstrap, tally

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 230), "yellow": (225, 215, 50)}
MOTIONS = ("left", "right", "up", "down")
ORDINALS = ("first", "then", "finally")
MACHINE = {"device": "cpu", "cpu": "Made-up CPU", "cores": 2, "memory_bytes": 16_000_000_000, "system": "Linux"}
VERSIONS = {"python": "3.11.7", "rlaif-lite": "0.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}

# chance that a word is right: role, greedy and sampled
SKILL = {
    "helped": {"base": (0.3, 0.3), "sft": (0.78, 0.66), "reference": (0.78, 0.67), "ppo": (0.92, 0.88)},
    "hacked": {"base": (0.3, 0.3), "sft": (0.78, 0.66), "reference": (0.78, 0.67), "ppo": (0.60, 0.58)},
}


def make_run(folder: Path, kind: str = "helped", videos: int = 120, seed: int = 0) -> Path:
    """`kind`: helped, hacked, no_truth (real data), unfinished (killed in PPO), dpo (helped, in three rounds)."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    skill = SKILL["hacked" if kind == "hacked" else "helped"]
    if kind == "dpo":
        skill = {"dpo" if role == "ppo" else role: chances for role, chances in skill.items()}
    (folder / "recipe.yaml").write_text("name: fixture\nseed: 0\nppo:\n  steps: 20\n  kl_coef: 0.2\n")
    _metrics(folder / "metrics.jsonl", kind, rng)
    rows = [] if kind == "unfinished" else _evaluate(folder / "evaluate", skill, kind != "no_truth", videos, rng)
    (folder / "summary.json").write_text(json.dumps(_summary(kind, rows)))
    return folder


def _facts(video: int) -> list[list[str]]:
    rng = random.Random(video)
    return [[rng.choice(list(COLOURS)), rng.choice(("circle", "square")), rng.choice(MOTIONS)] for _ in ORDINALS]


def _answer(facts: list[list[str]], right: float, rng: random.Random) -> tuple[str, dict, list[list[int]]]:
    "A description with mistakes, held against the facts."
    text, wrong, correct, hallucinated = "", [], 0, 0
    for ordinal, event in zip(ORDINALS, facts, strict=False):
        said = [word if rng.random() < right else "zigzag" for word in event]
        hallucinated += said[:2] != event[:2]
        text += f"{ordinal} a "
        for said_word, word in zip(said, event, strict=False):
            if said_word == word:
                correct += 1
            else:
                wrong.append([len(text), len(text) + len(said_word)])
            text += f"{said_word} "
        text += ". "
    counts = {"correct": correct, "wrong": 9 - correct, "total": 9, "mentions": 3, "malformed": 0}
    return text.strip(), counts | {"hallucinated": hallucinated}, wrong


def _evaluate(folder: Path, skill: dict, truth: bool, videos: int, rng: random.Random) -> list[dict]:
    (folder / "examples").mkdir(parents=True)
    rows = []
    arms = [("sft", "sample", t, skill["sft"][0] - t / 20) for t in (0.7, 0.5, 0.3)]
    for role, (greedy, sampled) in skill.items():
        arms += [(role, "greedy", 0.0, greedy), (role, "sample", 1.0, sampled)]
    for role, mode, temperature, right in arms:
        for video in range(videos):
            for _ in range(1 if mode == "greedy" else 2):
                text, counts, wrong = _answer(_facts(video), right, rng)
                row = {"key": f"test/{video:05d}", "video": f"videos/{video:05d}.mp4", "id": f"{video % 50}"}
                row |= {"role": role, "mode": mode, "temperature": temperature, "repetition": 0.004}
                row |= {"answer": text, "prompt": "describe the video", "length": len(text.split()) + 1}
                row["stopped"] = rng.random() < 0.98
                rows.append(row | {"truth": counts if truth else None} | ({"wrong_words": wrong} if truth else {}))
        own = [row for row in rows if (row["role"], row["mode"], row["temperature"]) == (role, mode, temperature)]
        (folder / f"{role}.{mode}@{temperature:g}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    index = []
    for video in range(10):
        Image.fromarray(_strip(_facts(video))).save(folder / "examples" / f"{video:05d}.png")
        text = " ".join(f"{o} a {' '.join(e)} ." for o, e in zip(ORDINALS, _facts(video), strict=False))
        index.append(
            {
                "key": f"test/{video:05d}",
                "id": f"{video % 50}",
                "file": f"{video:05d}.png",
                "truth": text if truth else None,
            }
        )
    (folder / "examples" / "index.json").write_text(json.dumps(index))
    return rows


def _strip(facts: list[list[str]], frames: int = 9) -> np.ndarray:
    "Frames of 64 x 64 side by side, a moving disc or square in each."
    noise = np.random.default_rng(0).normal(30, 22, (64, 64 * frames, 3))
    y, x = np.mgrid[:64, :64]
    for frame in range(frames):
        colour, shape, motion = facts[3 * frame // frames]
        shift = 14 * (frame % 3 - 1)
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        cx, cy = 32 + dx * shift, 32 + dy * shift
        inside = (x - cx) ** 2 + (y - cy) ** 2 < 100 if shape == "circle" else (abs(x - cx) < 9) & (abs(y - cy) < 9)
        noise[:, 64 * frame : 64 * frame + 64][inside] += COLOURS[colour]
    return noise.clip(0, 255).astype(np.uint8)


def _metrics(path: Path, kind: str, rng: random.Random) -> None:
    lines = []
    for stage, steps in (("sft.easy", 60), ("sft.hard", 60), ("reward", 40)):
        for step in range(steps):
            loss = 2 * math.exp(-step / 15) + 0.3 + rng.gauss(0, 0.03)
            lines.append({"stage": stage, "step": step, "loss": loss, "lr": 1e-4})
    if kind == "dpo":
        lines += [{"stage": f"dpo.{t}", "step": s, "loss": 0.69 / t - s / 99} for t in (1, 2, 3) for s in range(9)]
    for step in range({"unfinished": 11, "dpo": 0}.get(kind, 20)):
        x = 1 - math.exp(-step / 6)
        line = {
            "objective/scores": 1.6 * x + rng.gauss(0, 0.05),
            "objective/rlhf_reward": 1.3 * x + rng.gauss(0, 0.05),
            "objective/kl": 1.5 * x,
            "objective/kl_coef": 0.2,
            "policy/clipfrac_avg": 0.1 * x + 0.01,
            "policy/entropy_avg": 0.8 - 0.5 * x,
            "policy/approxkl_avg": 0.01,
            "val/explained_variance": 0.7 * x,
            "loss/value_avg": 0.5 - 0.3 * x,
            "rollout/length": 23 - 2 * x,
            "rollout/stop_rate": 0.97 + 0.02 * x,
            "rollout/repetition": 0.01,
        }
        if kind != "no_truth":
            line["rollout/oracle_score"] = (3 - 2.5 * x if kind == "hacked" else 3 + 3 * x) + rng.gauss(0, 0.15)
        lines.append({"stage": "ppo", "step": step, **line, "time": {"seconds": 4.0}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "ppo", "st')  # as a kill leaves it


SECONDS = {"features": 31.2, "sft": 118.0, "context": 6.4, "preference": 52.0}
SECONDS |= {"reward": 28.8, "ppo": 82.0, "evaluate": 21.5}
JUDGES = [
    {"judge": "claims", "context": True, "pairs": 1100, "agreement": 0.949, "length_bias": 0.55, "same_winner": 1.0},
    {
        "judge": "pairwise",
        "context": True,
        "pairs": 300,
        "agreement": 0.87,
        "length_bias": None,
        "consistency": 0.812,
        "same_winner": 0.88,
    },
]
BLOCKS = {
    "features": {
        "videos": 2140,
        "missing": 0,
        "frames": 6,
        "tokens_before": 96,
        "tokens_after": 24,
        "tokens_fewest": 24,
        "tokens_most": 24,
    },
    "preference": {
        "pairs": 1100,
        "judge": "claims",
        "judge_agreement_with_truth": 0.949,
        "judge_agreement_without_context": 0.861,
        "position_consistency": 0.812,
        "length_bias": 0.55,
        "truth_length_bias": 0.53,
        "judges": JUDGES,
    },
    "reward": {
        "heldout_accuracy": 0.85,
        "heldout_accuracy_truth": 0.84,
        "floor": 0.6,
        "calibration": [{"predicted": 0.55 + i / 10, "observed": 0.53 + i / 11, "count": 60 - 8 * i} for i in range(5)],
    },
    "ppo": {
        "kl_start": 0.0,
        "kl_end": 1.42,
        "reward_start": 0.02,
        "reward_end": 1.55,
        "steps": 20,
        "base_bytes": {"quantised": 430_000, "other": 900_000},
        "roles": {"policy": {"parameters": 160_000, "bytes": 640_000}},
    },
}


def _summary(kind: str, rows: list[dict]) -> dict:
    stages = {
        name: {"seconds": seconds, "peak_memory_bytes": int(7e8 + 4e6 * seconds), "status": "done"}
        for name, seconds in SECONDS.items()
    }
    summary = {"recipe": "fixture", "recipe_hash": "0123456789ab", "seed": 0, "device": "cpu", "versions": VERSIONS}
    summary |= {"machine": MACHINE, "stages": stages, **copy.deepcopy(BLOCKS)}
    if kind != "no_truth":
        summary["ppo"] |= {"oracle_start": 3.0, "oracle_end": 0.7 if kind == "hacked" else 5.8}
    else:
        for name in ("judge_agreement_with_truth", "judge_agreement_without_context", "truth_length_bias"):
            summary["preference"][name] = None
        summary["preference"]["judges"] = []
        del summary["reward"]["heldout_accuracy_truth"]
    if kind == "unfinished":
        del summary["ppo"]
        del stages["ppo"], stages["evaluate"]
        return summary
    method = "dpo" if kind == "dpo" else "ppo"
    if kind == "dpo":
        summary |= {"method": "dpo", "preference": {}, "reward": {}, "dpo": {"judge": "claims", "rounds": rounds()}}
        del summary["ppo"]
        stages["dpo"] = stages.pop("ppo")
        del stages["preference"], stages["reward"]
    unknown = ("accuracy", *NEEDS_TRUTH) if kind == "no_truth" else ("accuracy",)
    arms, ratios = _arms(rows), {n: r for n, r in RATIOS.items() if n not in unknown}
    summary["evaluation"] = {}
    for (column, mode), counts in arms.items():
        figures = {f"{mode}_{name}": float(ratio(counts.sum(0))) for name, ratio in ratios.items()}
        summary["evaluation"].setdefault(column, {}).update(figures)
    summary["evaluation_intervals"] = {
        f"{method}-{role}": {
            f"{mode}_{name}": paired_bootstrap(arms[role, mode], arms[method, mode], ratio, n=200)._asdict()
            for mode in ("greedy", "sample")
            for name, ratio in ratios.items()
        }
        for role in ("sft", "reference")
    }
    return summary


def rounds() -> list[dict]:
    "What the DPO stage writes of three rounds, the second of which is taken; the videos are described anew in each."
    table = [{"round": 0, "heldout_score": 3.1, "heldout_truth": 3.0, "heldout_words": 21.5, "selected": False}]
    for t in (1, 2, 3):
        told = [{"video": "videos/a.mp4", "read": f"a <b> {t - 1}", "written": f"a <b> {t}"}]
        table.append(
            {
                "round": t,
                "prompts": 200,
                "answers": 1200,
                "answer_words": 21.0 + t,
                "pairs": 380 - t,
                "dropped": {"tied": 9},
                "chosen_words": 21.5,
                "rejected_words": 22.5,
                "length_bias": 0.47,
                "agreement": 0.9 - t / 100,
                "steps": 9,
                "truth_length_bias": 0.45,
                "loss": 0.5,
                "heldout_score": 4.0 + (t == 2),
                "heldout_truth": 3.5 + t / 10,
                "heldout_words": 22.0 + t,
                "selected": t == 2,
                "descriptions": told,
                "description_changed": 0.8,
                "description_words": 30.0,
                "description_true_read": 0.7,
                "description_true_written": 0.75,
            }
        )
    return table


def _arms(rows: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    "Counts per video, by column of the evaluation table and mode."
    grouped: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        cooler = 0.0 < row["temperature"] < 1.0
        column = f"{row['role']}@{row['temperature']:g}" if cooler else row["role"]
        grouped.setdefault((column, row["mode"]), []).append(row)
    return {key: np.stack(list(tally(found).values())) for key, found in grouped.items()}
