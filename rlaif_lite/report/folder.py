"""Reads a run folder: whatever is there, of runs that are finished, still going, or were interrupted."""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_lite.errors import StageError
from rlaif_lite.report.people import LABELS, People, read_people
from rlaif_lite.report.stats import Interval

IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class Example(NamedTuple):
    """A held-out video that the report shows."""

    key: str  # of the record
    id: str  # the user's, for display
    image: str  # the strip of frames as a data URI
    truth: str | None  # what really happens, where it is known


class Run(NamedTuple):
    """What the report reads from a run folder."""

    folder: Path
    summary: dict[str, Any]
    metrics: dict[str, list[dict]]  # lines of metrics.jsonl by stage, in order of steps
    recipe: str
    rows: list[dict]  # lines of evaluate/*.jsonl
    examples: list[Example]
    people: People | None  # what people said of the answers; None where nobody was asked


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
    said = _json(summary) if summary.exists() else {}
    asked = (folder / LABELS).is_dir()
    return Run(
        folder=folder,
        summary=said,
        metrics={stage: sorted(lines, key=lambda line: line["step"]) for stage, lines in metrics.items()},
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        rows=rows,
        examples=_examples(folder / "evaluate" / "examples"),
        people=read_people(folder, rows, method_of(said), said.get("recipe_hash", "")) if asked else None,
    )


METHODS = {"ppo": "PPO", "dpo": "DPO"}


def method_of(summary: dict[str, Any]) -> str:
    """How the policy learnt, which is also its column's name; summaries of old say nothing, and mean PPO."""
    return summary.get("method", "ppo")


class Change(NamedTuple):
    "One metric of the policy's answers against a baseline's, with the interval that the evaluation gave it."

    before: float
    after: float
    interval: Interval


Changes = dict[str, Change]


def changes(summary: dict[str, Any], baseline: str, mode: str, role: str | None = None) -> Changes:
    """What the policy, or the column `role`, changed against `baseline` in one mode (greedy or sample), per metric;
    empty when not evaluated. A best of several has one kind of answers, held against both."""
    role = role or method_of(summary)
    intervals = summary.get("evaluation_intervals", {}).get(f"{role}-{baseline}", {})
    before, after = (summary.get("evaluation", {}).get(column, {}) for column in (baseline, role))
    own = "sample" if "@bo" in role else mode
    return {
        name.removeprefix(f"{mode}_"): Change(before[name], after[name.replace(mode, own, 1)], Interval(**interval))
        for name, interval in intervals.items()
        if name.startswith(f"{mode}_")
    }


def _examples(folder: Path) -> list[Example]:
    index = folder / "index.json"
    if not index.exists():
        return []
    found = []
    for entry in _json(index):
        path = folder / entry["file"]
        data = base64.b64encode(path.read_bytes()).decode()
        found.append(
            Example(entry["key"], entry["id"], f"data:{IMAGE_TYPES[path.suffix]};base64,{data}", entry["truth"])
        )
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
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # an answer may hold other line ends, such as U+2028
    try:
        return [json.loads(line) for line in whole.split("\n") if line]
    except ValueError as error:
        raise StageError(f"{path} has a line that is not JSON ({error}); run the stage that writes it again") from error
