"""From tallies to figures with intervals, and figures side by side.

A metric is a ratio of sums over items. Its percentile bootstrap interval resamples VIDEOS, with all items of a video
together, because questions about one video are not independent. Results of different judges never share a table.

Shapes: N videos, R resamples.
"""

from pathlib import Path

import numpy as np

from ..errors import DataError
from ..formats import markdown_table
from ..report.stats import by_video, paired_bootstrap, ratio
from .items import Tally

RESAMPLES = 2000


def figures(tallies: list[tuple[str, Tally]], seed: int = 0) -> dict[str, dict]:
    """(video, tally) of every item -> {metric: {value, low, high, items}}; null where nothing was counted."""
    out = {}
    for metric, of_video in by_video(tallies).items():
        counts_N2 = np.stack(list(of_video.values()))
        counted = sum(metric in tally and tally[metric][1] > 0 for _, tally in tallies)
        out[metric] = {"value": None, "low": None, "high": None, "items": counted}
        if counts_N2[:, 1].sum() > 0:
            # the change from nothing at all is the figure itself: a ratio of nothing is 0 here
            found = paired_bootstrap(np.zeros_like(counts_N2), counts_N2, ratio, RESAMPLES, seed)
            out[metric] |= {"value": found.delta, "low": found.low, "high": found.high}
    return out


def table(results: list[dict]) -> str:
    """Markdown: a row per benchmark and metric, a column per role that was examined.

    Raises DataError where two judges, or two results for one cell, would meet."""
    judges = _judges(results)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    columns = dict.fromkeys(result["who"] for result in results)
    for result in results:
        shown = {"items": str(result["items"])} | {metric: _cell(found) for metric, found in result["metrics"].items()}
        for metric, cell in shown.items():
            row = cells.setdefault((result["benchmark"], metric), {})
            if result["who"] in row:
                raise DataError(
                    f"There are two results of {result['who']} for {result['benchmark']}. Give one of them."
                )
            row[result["who"]] = cell
    rows = [(*names, *(row.get(who, "") for who in columns)) for names, row in cells.items()]
    notes = [f"Judge{' of claims' if of_claims else ''}: {judge}" for of_claims, judge in judges.items()]
    return "\n".join([markdown_table(("benchmark", "metric", *columns), rows), "", *notes])


def _judges(results: list[dict]) -> dict[bool, str]:
    """{whether it judged claims: the judge}. A claim audit has a judge of its own."""
    found: dict[bool, dict[str, str]] = {}
    for result in results:
        if result["judge"] is not None:
            of_kind = found.setdefault(result["kind"] == "claims", {})
            of_kind.setdefault(result["judge"], f"{result['benchmark']} of {result['who']}")
    for judges in found.values():
        if len(judges) > 1:
            shown = "\n  ".join(f"{judge}  ({whose})" for judge, whose in judges.items())
            raise DataError(
                f"These results come from {len(judges)} judges:\n  {shown}\nFigures of different judges cannot be "
                "compared. Make one table per judge, or judge again with `rlaif-lite bench ... --judge`; answers stay."
            )
    return {of_claims: next(iter(judges)) for of_claims, judges in found.items()}


def _cell(found: dict) -> str:
    if found["value"] is None:
        return "-"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def as_text(result: dict, folder: Path) -> str:
    """What one run of a benchmark found."""
    lines = [f"{result['benchmark']}, {result['who']}: {result['items']} items about {result['videos']} videos"]
    if result["judge"] is not None:
        lines.append(f"judge: {result['judge']}")
    width = max(map(len, result["metrics"]), default=0)
    lines += [f"  {metric:<{width}}  {_cell(found)}" for metric, found in result["metrics"].items()]
    for group, metrics in result["groups"].items():
        shown = ", ".join(
            f"{metric} {found['value']:.3f}" for metric, found in metrics.items() if found["value"] is not None
        )
        lines.append(f"  {group}: {shown}")
    for what in ("missing", "broken"):
        if result[what]:
            names = list(result[what])
            lines.append(
                f"{len(names)} videos {what}, {result[f'{what}_items']} items left out: {', '.join(names[:5])}"
                + (", ..." if len(names) > 5 else "")
            )
    return "\n".join([*lines, f"{folder / 'results.json'}"])
