"""Several runs side by side: mean and spread of what matters, as Markdown and JSON.

    rlaif-lite across runs/seeds/*  --out docs/results/tiny

Reads each run's `summary.json`; a figure that a run does not have is left out of its row.
"""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StageError
from .folder import method_of

METHOD = "<method>"  # in a row's path: the trained policy's column, by the run's own method


class Row(NamedTuple):
    """One figure of the table."""

    label: str
    path: tuple[str, ...]  # where it stands in `figures`
    minus: tuple[str, ...] | None = None  # subtracted from it, for a change
    swept: bool = False  # one of the figures that a sweep sums up and draws


def _change(metric: str, label: str) -> Row:
    return Row(f"{label}, policy - SFT", ("evaluation", METHOD, metric), ("evaluation", "sft", metric), swept=True)


def _shuffled(role: str) -> tuple[str, ...]:
    return ("order", role, "change", "delta")


ROWS = [
    _change("greedy_hallucination", "hallucination, greedy"),
    Row("... interval, low", ("evaluation_intervals", f"{METHOD}-sft", "greedy_hallucination", "low")),
    Row("... interval, high", ("evaluation_intervals", f"{METHOD}-sft", "greedy_hallucination", "high")),
    _change("sample_hallucination", "hallucination, sampled"),
    Row("... interval, low", ("evaluation_intervals", f"{METHOD}-sft", "sample_hallucination", "low")),
    Row("... interval, high", ("evaluation_intervals", f"{METHOD}-sft", "sample_hallucination", "high")),
    _change("greedy_accuracy", "accuracy, greedy"),
    _change("sample_accuracy", "accuracy, sampled"),
    Row("accuracy, greedy, SFT", ("evaluation", "sft", "greedy_accuracy"), swept=True),
    Row("accuracy, greedy, policy", ("evaluation", METHOD, "greedy_accuracy"), swept=True),
    Row("accuracy, sampled, SFT", ("evaluation", "sft", "sample_accuracy"), swept=True),
    Row("accuracy, sampled, policy", ("evaluation", METHOD, "sample_accuracy"), swept=True),
    Row("accuracy, SFT sampled at T = 0.3", ("evaluation", "sft@0.3", "sample_accuracy"), swept=True),
    Row("accuracy or F1 with the frames shuffled, less the same in order, SFT", _shuffled("sft"), swept=True),
    Row("accuracy or F1 with the frames shuffled, less the same in order, policy", _shuffled(METHOD), swept=True),
    _change("greedy_f1", "F1, greedy"),
    _change("sample_f1", "F1, sampled"),
    Row(
        "precision, greedy, policy - SFT",
        ("evaluation", METHOD, "greedy_precision"),
        ("evaluation", "sft", "greedy_precision"),
    ),
    _change("greedy_recall", "recall, greedy"),
    _change("sample_recall", "recall, sampled"),
    _change("greedy_length", "length, greedy"),
    _change("sample_length", "length, sampled"),
    _change("greedy_malformed", "malformed answers, greedy"),
    _change("sample_malformed", "malformed answers, sampled"),
    Row("hallucination, greedy, SFT", ("evaluation", "sft", "greedy_hallucination"), swept=True),
    Row("hallucination, greedy, policy", ("evaluation", METHOD, "greedy_hallucination"), swept=True),
    Row("hallucination, sampled, SFT", ("evaluation", "sft", "sample_hallucination")),
    Row("hallucination, sampled, policy", ("evaluation", METHOD, "sample_hallucination")),
    Row("hallucination, SFT sampled at T = 0.3", ("evaluation", "sft@0.3", "sample_hallucination")),
    Row("F1, greedy, SFT", ("evaluation", "sft", "greedy_f1"), swept=True),
    Row("F1, greedy, policy", ("evaluation", METHOD, "greedy_f1"), swept=True),
    Row("F1, sampled, SFT", ("evaluation", "sft", "sample_f1")),
    Row("F1, sampled, policy", ("evaluation", METHOD, "sample_f1")),
    Row("F1, SFT sampled at T = 0.3", ("evaluation", "sft@0.3", "sample_f1")),
    Row("malformed answers, greedy, policy", ("evaluation", METHOD, "greedy_malformed")),
    Row("malformed answers, sampled, policy", ("evaluation", METHOD, "sample_malformed")),
    Row("length, greedy, SFT", ("evaluation", "sft", "greedy_length")),
    Row("length, greedy, policy", ("evaluation", METHOD, "greedy_length")),
    Row("judge of the labels, agreement with the truth", ("preference", "judge_agreement_with_truth"), swept=True),
    Row("... without the narrative", ("preference", "judge_agreement_without_context")),
    Row("claims judge, with narrative", ("judge", "claims+context", "agreement")),
    Row("claims judge, without", ("judge", "claims", "agreement")),
    Row("pairwise judge, with narrative", ("judge", "pairwise+context", "agreement")),
    Row("pairwise judge, without", ("judge", "pairwise", "agreement")),
    Row("pairwise judge, order consistency on decided pairs", ("judge", "pairwise+context", "consistency_decided")),
    Row("reward model, held-out pairs, as labelled", ("reward", "heldout_accuracy"), swept=True),
    Row("reward model, held-out pairs, against the truth", ("reward", "heldout_accuracy_truth"), swept=True),
    Row("true score of rollouts, first step", (METHOD, "oracle_start")),
    Row("true score of rollouts, last step", (METHOD, "oracle_end")),
    Row("reward, first step", (METHOD, "reward_start")),
    Row("reward, last step", (METHOD, "reward_end")),
    Row("KL at step 0, nats per answer", (METHOD, "kl_start")),
    Row("KL at the last step, nats per answer", (METHOD, "kl_end"), swept=True),
    Row("DPO, judge's score of held-out answers, start", ("rounds", "start", "heldout_score")),
    Row("DPO, judge's score of held-out answers, round taken", ("rounds", "taken", "heldout_score")),
    Row("DPO, true score of held-out answers, start", ("rounds", "start", "heldout_truth")),
    Row("DPO, true score of held-out answers, round taken", ("rounds", "taken", "heldout_truth")),
    Row("seconds, all stages", ("cost", "seconds"), swept=True),
    Row("peak memory, MiB", ("cost", "peak_mib"), swept=True),
]


def table(folders: list[Path]) -> tuple[str, list[dict]]:
    """(Markdown table, the figures of each run). Raises StageError for a folder without a finished run."""
    runs = [figures(folder) for folder in folders]
    names = [f"{run['name']}" for run in runs]
    lines = [f"| figure | mean | sd | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(runs)]
    for row in ROWS:
        values = [value_of(run, row) for run in runs]
        found = [v for v in values if v is not None]
        if not found:
            continue
        spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else ""
        cells = " | ".join("" if v is None else f"{v:.3f}" for v in values)
        lines.append(f"| {row.label} | {statistics.fmean(found):.3f} | {spread} | {cells} |")
    return "\n".join(lines) + "\n", runs


def figures(folder: Path) -> dict[str, Any]:
    """What the table needs of one run's summary."""
    path = folder / "summary.json"
    if not path.exists():
        raise StageError(f"{path} is missing: {folder} is not the folder of a run.")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if not summary["finished"]:
        raise StageError(f"The run in {folder} is not finished. Run its recipe again; it goes on where it stopped.")
    method = method_of(summary)
    rounds = summary[method].get("rounds", [])  # DPO's
    preference, shown = summary["preference"], {}
    if rounds:
        taken = next(row for row in rounds if row["selected"])
        preference, shown = {"judge_agreement_with_truth": taken.get("agreement")}, {"start": rounds[0], "taken": taken}
    rows = preference.get("judges", [])
    judges = {row["judge"] + ("+context" if row["context"] else ""): row for row in rows}
    stages = summary["stages"].values()
    cost = {
        "seconds": sum(s["seconds"] for s in stages),
        "peak_mib": max(s["peak_memory_bytes"] for s in stages) / 2**20,
    }
    kept = (
        "recipe",
        "recipe_hash",
        "seed",
        "world_seed",
        "device",
        "machine",
        "versions",
        "stages",
        "evaluation",
        "evaluation_intervals",
        "reward",
        method,
    )
    own = {
        "name": folder.name,
        "method": method,
        "judge": judges,
        "cost": cost,
        "preference": preference,
        "rounds": shown,
        "order": summary.get("order", {}),
    }
    return own | {key: summary[key] for key in kept}


def value_of(run: dict, row: Row) -> float | None:
    """A row's figure of one run; None where the run does not have it."""
    value, minus = _at(run, row.path), _at(run, row.minus) if row.minus else 0.0
    return None if value is None or minus is None else value - minus


def _at(run: dict, path: tuple[str, ...]) -> float | None:
    found: Any = run
    for key in (key.replace(METHOD, run["method"]) for key in path):
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found
