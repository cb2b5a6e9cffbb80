"""Several runs side by side: mean and spread of what matters, as Markdown and JSON.

    rlaif-lite across runs/seeds/*  --out docs/results/tiny

Reads each run's `summary.json`; a figure that a run does not have is left out of its row.
"""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StageError
from ..files import read_json
from ..formats import markdown_table
from .folder import method_of

METHOD = "<method>"  # in a row's path: the trained policy's column, by the run's own method


class Row(NamedTuple):
    """One figure of the table."""

    label: str
    path: tuple[str, ...]  # where it stands in `figures`
    minus: tuple[str, ...] | None = None  # subtracted from it, for a change
    swept: bool = False  # one of the figures that a sweep sums up and draws


MODES = {"greedy": "greedy", "sample": "sampled"}
SHUFFLED = "accuracy or F1 with the frames shuffled, less the same in order"


def _changes(label: str, metric: str, *modes: str) -> list[Row]:
    """From SFT to the policy, by how answers are decoded; with the evaluation's interval for hallucination."""
    rows = []
    for mode in modes or MODES:
        name = f"{mode}_{metric}"
        columns = (("evaluation", METHOD, name), ("evaluation", "sft", name))
        rows.append(Row(f"{label}, {MODES[mode]}, policy - SFT", *columns, swept=metric != "precision"))
        if metric == "hallucination":
            path = ("evaluation_intervals", f"{METHOD}-sft", name)
            rows += [Row(f"... interval, {end}", (*path, end)) for end in ("low", "high")]
    return rows


def _values(label: str, metric: str, swept: tuple[str, ...] = ("greedy",)) -> list[Row]:
    """Of SFT and the policy; and of SFT where it is sampled at a low temperature, as sharpening alone would be."""
    rows = [
        Row(f"{label}, {how}, {who}", ("evaluation", column, f"{mode}_{metric}"), swept=mode in swept)
        for mode, how in MODES.items()
        for who, column in (("SFT", "sft"), ("policy", METHOD))
    ]
    cool = ("evaluation", "sft@0.3", f"sample_{metric}")
    return [*rows, Row(f"{label}, SFT sampled at T = 0.3", cool, swept="sample" in swept)]


ROWS = [
    *_changes("hallucination", "hallucination"),
    *_changes("accuracy", "accuracy"),
    *_values("accuracy", "accuracy", ("greedy", "sample")),
    *(
        Row(f"{SHUFFLED}, {who}", ("order", role, "change", "delta"), swept=True)
        for who, role in (("SFT", "sft"), ("policy", METHOD))
    ),
    *_changes("F1", "f1"),
    *_changes("precision", "precision", "greedy"),
    *_changes("recall", "recall"),
    *_changes("length", "length"),
    *_changes("malformed answers", "malformed"),
    *_values("hallucination", "hallucination"),
    *_values("F1", "f1"),
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
    lines = []
    for row in ROWS:
        values = [value_of(run, row) for run in runs]
        found = [v for v in values if v is not None]
        if not found:
            continue
        spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else ""
        cells = ("" if v is None else f"{v:.3f}" for v in values)
        lines.append((row.label, f"{statistics.fmean(found):.3f}", spread, *cells))
    return markdown_table(("figure", "mean", "sd", *(run["name"] for run in runs)), lines) + "\n", runs


def figures(folder: Path) -> dict[str, Any]:
    """What the table needs of one run's summary."""
    path = folder / "summary.json"
    if not path.exists():
        raise StageError(f"{path} is missing: {folder} is not the folder of a run.")
    summary = read_json(path)
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
        *("recipe", "recipe_hash", "seed", "world_seed", "device", "machine", "versions", "stages", "evaluation"),
        *("evaluation_intervals", "reward", method),
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
    found: list[Any] = []
    for path in (row.path, row.minus) if row.minus else (row.path,):
        value: Any = run
        for key in path:
            value = value.get(key.replace(METHOD, run["method"])) if isinstance(value, dict) else None
        found.append(value)
    return None if None in found else found[0] - sum(found[1:])
