"""The study on five seeds and three qualities of intervener: `python -m lab.control --seeds 5 --out OUT.json`.

Writes OUT.json (every figure of every seed, settings, hardware, commit) and OUT.md. Minutes on one core. The seeds are
runs of one stack and share its random generators; intervals are Student's t over seeds, paired where of a difference.
"""

import argparse
import json
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch

from lab import commit
from rlaif_lite.formats import markdown_table
from rlaif_lite.progress import say
from rlaif_lite.report.stats import stat
from rlaif_lite.training.meter import describe_machine

from .study import ARMS, Outcome, Settings, learn, make_cast
from .tasks import PENDULUM, returns


def interval(seeds: list[float]) -> dict:
    """Mean and 95 % interval over two seeds or more."""
    one = stat(seeds)
    return {"mean": one.mean, "low": one.low, "high": one.high, "seeds": list(seeds)}


def by_quality(value_R: np.ndarray, settings: Settings) -> dict[str, list[float]]:
    rows = np.asarray(value_R, dtype=float).reshape(len(settings.qualities), settings.seeds)
    return {f"{quality:g}": row.tolist() for quality, row in zip(settings.qualities, rows, strict=True)}


def run(settings: Settings, seed: int) -> dict:
    """The whole study as what goes into the JSON file."""
    started = time.monotonic()
    cast = make_cast(PENDULUM, settings, seed)
    rng, runs = np.random.default_rng(seed + 1), len(cast.checkpoint_R)
    scores = {
        name: by_quality(returns(PENDULUM, critics.greedy, runs, settings.episodes, rng), settings)
        for name, critics in (("reference", cast.good), ("intervener", cast.intervener))
    }
    say(f"interveners, return: {scores['intervener']}")
    arms: dict[str, dict] = {}
    for name, arm in ARMS.items():
        outcome = learn(PENDULUM, arm, cast, settings, seed + 2)
        scores[name] = by_quality(outcome.return_R, settings)
        arms[name] = {"meaning": arm.meaning, **of_arm(outcome, settings)}
        means = {quality: round(float(np.mean(seeds))) for quality, seeds in scores[name].items()}
        say(f"{name}: return by quality of the intervener {means}, {time.monotonic() - started:.0f} s")
    minus = {
        name: {q: interval((np.array(scores["rlif"][q]) - np.array(seeds)).tolist()) for q, seeds in rows.items()}
        for name, rows in scores.items()
    }
    return {
        "task": PENDULUM._asdict(),
        "settings": {**settings._asdict(), "rule": settings.rule._asdict()},
        "seconds": time.monotonic() - started,
        "checkpoints": by_quality(cast.checkpoint_R, settings),
        "return": {name: {q: interval(seeds) for q, seeds in rows.items()} for name, rows in scores.items()},
        "rlif_minus": minus,
        "arms": arms,
    }


def of_arm(outcome: Outcome, settings: Settings) -> dict:
    curve = [
        {key: by_quality(value, settings) if key.endswith("_R") else value for key, value in point.items()}
        for point in outcome.curve
    ]
    counts = {"takeovers": outcome.takeovers_R, "labels": outcome.labels_R}
    return {"curve": curve, **{key: by_quality(value, settings) for key, value in counts.items()}}


def page(found: dict) -> str:
    """The study as a page of markdown."""
    settings, arms = found["settings"], found["arms"]
    qualities = [f"{quality:g}" for quality in settings["qualities"]]
    meaning = {
        "reference": "the reference, trained on the task's reward: the judge",
        "intervener": "the intervener itself",
        **{name: arm["meaning"] for name, arm in arms.items()},
    }

    def table(head: str, rows: dict[str, list[str]], columns: list[str]) -> list[str]:
        return [markdown_table((head, *columns), [(name, *cells) for name, cells in rows.items()]), ""]

    def cell(figure: dict) -> str:
        return f"{figure['mean']:.0f} [{figure['low']:.0f}, {figure['high']:.0f}]"

    def mean(rows: dict[str, list[float]], digits: int) -> list[str]:
        return [f"{np.mean(rows[q]):.{digits}f}" for q in qualities]

    heads = [f"intervener at {q}" for q in qualities]
    score = {meaning[name]: [cell(rows[q]) for q in qualities] for name, rows in found["return"].items()}
    minus = {meaning[n]: [cell(r[q]) for q in qualities] for n, r in found["rlif_minus"].items() if n != "rlif"}
    time_table = {}
    for name in ("rlif", "hg_dagger"):
        for key, words in (("rate_R", "takeovers per own step"), ("disapproved_R", "own steps disapproved of")):
            rows = [point[key] for point in arms[name]["curve"]]
            for q in (qualities[0], qualities[-1]):
                time_table[f"{name}, {words}, intervener at {q}"] = [f"{np.mean(row[q]):.3f}" for row in rows]
    steps = [f"to {point['step']}" for point in arms["rlif"]["curve"]]
    counts = {name: mean(arm["takeovers"], 0) + mean(arm["labels"], 0) for name, arm in arms.items()}
    versions = found["versions"]
    lines = [
        "# RLIF in its original setting\n",
        f"{found['task']['name']}, {settings['seeds']} seeds; mean [95 % interval over seeds] of the true return.",
        f"Every student had {settings['steps']} environment steps and as many updates.",
        f"{found['hardware']}, one thread, {found['seconds']:.0f} s; commit {found['commit']}.",
        f"torch {versions['torch']}, gymnasium {versions['gymnasium']}. Written by `python -m lab.control`.\n",
        "An intervener at 0 does as well as random actions, one at 1 is the reference.\n",
    ]
    lines += table("return at the end", score, heads)
    lines += table("RLIF minus ..., paired by seed", minus, heads)
    lines += table("over time: means of the steps since the column before", time_table, steps)
    lines += table("arm", counts, [f"{what}, at {q}" for what in ("takeovers", "labels") for q in qualities])
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(prog="python -m lab.control", description=__doc__)
    ask.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="2 to 10")
    ask.add_argument("--seed", type=int, default=0, help="of the random generators")
    ask.add_argument("--out", type=Path, required=True, help="OUT.json; OUT.md is written beside it")
    given = ask.parse_args()
    torch.set_num_threads(1)
    found = {
        "hardware": describe_machine()["cpu"],
        "versions": {"torch": torch.__version__, "gymnasium": gymnasium.__version__},
        "commit": commit(),
        **run(Settings(seeds=given.seeds), given.seed),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(page(found))
    say(f"written: {given.out} and {given.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
