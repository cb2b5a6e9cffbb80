"""Reads a run folder: whatever is there, of runs that are finished, still going, or were interrupted."""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlaif_lite.errors import StageError
from rlaif_lite.report.stats import NEEDS_TRUTH, RATIOS, Interval, paired_bootstrap, tally

IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class Example(NamedTuple):
    id: str
    image: str
    "the strip of frames as a data URI"
    truth: str | None
    "what really happens, where it is known"


class Run(NamedTuple):
    folder: Path
    summary: dict[str, Any]
    metrics: dict[str, list[dict]]
    "lines of metrics.jsonl by stage, in order of steps"
    recipe: str
    rows: list[dict]
    "lines of evaluate/*.jsonl"
    examples: list[Example]


class Arm(NamedTuple):
    "What is compared: a role, how it answered, and at which temperature (0 for greedy)."

    role: str
    mode: str
    temperature: float


def read_run(folder: Path) -> Run:
    """Raises StageError when `folder` is no run folder, or when something in it is not what it should be."""
    folder = Path(folder)
    summary, recipe = folder / "summary.json", folder / "recipe.yaml"
    if not summary.exists() and not recipe.exists():
        raise StageError(f"{folder} holds neither summary.json nor recipe.yaml, so it is no run folder")
    metrics: dict[str, list[dict]] = {}
    for line in _json_lines(folder / "metrics.jsonl"):
        metrics.setdefault(line["stage"], []).append(line)
    rows = [row for path in sorted((folder / "evaluate").glob("*.jsonl")) for row in _json_lines(path)]
    return Run(
        folder=folder,
        summary=_json(summary) if summary.exists() else {},
        metrics={stage: sorted(lines, key=lambda line: line["step"]) for stage, lines in metrics.items()},
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        rows=rows,
        examples=_examples(folder / "evaluate" / "examples"),
    )


def arms(rows: list[dict]) -> dict[Arm, dict[str, NDArray]]:
    """Counts per item of everything that was evaluated."""
    by_arm: dict[Arm, list[dict]] = {}
    for row in rows:
        by_arm.setdefault(Arm(row["role"], row["mode"], row["temperature"]), []).append(row)
    return {arm: tally(found) for arm, found in by_arm.items()}


class Change(NamedTuple):
    "One metric of PPO's answers against a baseline's."

    before: float
    after: float
    interval: Interval
    items: int


Changes = dict[str, Change]


def changes(rows: list[dict], baseline: str, mode: str) -> Changes:
    """What PPO changed against `baseline` at the same temperature, per metric; empty when one of the two is missing.

    Metrics that need the truth are left out where no row has it. Items that only one of the two answered do not count.
    """
    measured = arms([row for row in rows if row["mode"] == mode])
    after = next((counts for arm, counts in measured.items() if arm.role == "ppo"), {})
    temperature = next((arm.temperature for arm in measured if arm.role == "ppo"), 0.0)
    before = measured.get(Arm(baseline, mode, temperature), {})
    ids = sorted(before.keys() & after.keys())
    if not ids:
        return {}
    before_NK, after_NK = np.stack([before[i] for i in ids]), np.stack([after[i] for i in ids])
    known = any(row["truth"] for row in rows)
    return {
        name: Change(
            before=float(metric(before_NK.sum(0))),
            after=float(metric(after_NK.sum(0))),
            interval=paired_bootstrap(before_NK, after_NK, metric),
            items=len(ids),
        )
        for name, metric in RATIOS.items()
        if known or name not in NEEDS_TRUTH
    }


def _examples(folder: Path) -> list[Example]:
    index = folder / "index.json"
    if not index.exists():
        return []
    found = []
    for entry in _json(index):
        path = folder / entry["file"]
        data = base64.b64encode(path.read_bytes()).decode()
        found.append(Example(entry["id"], f"data:{IMAGE_TYPES[path.suffix]};base64,{data}", entry["truth"]))
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path} is not JSON ({error}); run the stage that writes it again") from error


def _json_lines(path: Path) -> list[dict]:
    "Lines of a file that may be missing, and whose last line may be in the middle of being written."
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise StageError(f"{path} has a line that is not JSON ({error}); run the stage that writes it again") from error
