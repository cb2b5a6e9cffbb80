"""What a sweep found: every figure by setting, over its seeds, and what changes between settings.

A setting's interval is Student's t over its seeds (95 %): it says how far another draw may fall. With a single seed
there is none but, for a change against SFT, the evaluation's own, over videos. Differences between settings are taken
seed by seed first, so that what a seed does to both drops out.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_json, write_json, write_text
from ..formats import markdown_table
from .across import METHOD, ROWS, figures, value_of
from .plots import Spread, panels
from .stats import stat

SWEPT = [row for row in ROWS if row.swept]


class Ran(NamedTuple):
    """One point of a sweep."""

    setting: str
    draw: str  # its seeds
    folder: Path
    reason: str | None  # why it did not finish


def write(out: Path, ran: list[Ran], of: int) -> None:
    """`sweep.md`, `sweep.json`, `sweep.svg` and `sweep.png` of the points that ran so far, out of `of`."""
    found = summed(ran)
    settings = list(dict.fromkeys(point.setting for point in ran))
    write_json(out / "sweep.json", found)
    write_text(out / "sweep.md", markdown(found, settings, of))
    drawn = []
    for label, by_setting in found["figures"].items():
        spreads = []
        for setting in settings:
            values, one = by_setting.get(setting, (None, None))
            spreads.append(
                Spread(setting, [], None, None, None)
                if one is None
                else Spread(setting, list(values.values()), one["mean"], one["low"], one["high"])
            )
        drawn.append((label, spreads))
    if drawn:
        panels(drawn, out / "sweep")


def summed(ran: list[Ran]) -> dict[str, Any]:
    """All of `sweep.json`: the points with their figures, each figure by setting, the differences, the cost."""
    runs = {point.folder: figures(point.folder) for point in ran if point.reason is None}
    by_label: dict[str, dict[str, tuple[dict[str, float], dict]]] = {}
    differences: dict[str, dict[str, dict]] = {}
    settings = list(dict.fromkeys(point.setting for point in ran))
    for row in SWEPT:
        values: dict[str, dict[str, float]] = {}
        only: dict[str, dict] = {}
        for point in ran:
            if point.folder in runs and (value := value_of(runs[point.folder], row)) is not None:
                values.setdefault(point.setting, {})[point.draw] = value
                only[point.setting] = runs[point.folder]
        for setting, by_draw in values.items():
            one = stat(list(by_draw.values()))
            if one.n == 1 and row.minus is not None and row.path[:2] == ("evaluation", METHOD):
                run = only[setting]  # a change of a single run has the interval that its evaluation gave it
                interval = run["evaluation_intervals"].get(f"{run['method']}-sft", {}).get(row.path[-1])
                one = one._replace(low=interval["low"], high=interval["high"]) if interval else one
            by_label.setdefault(row.label, {})[setting] = (by_draw, one._asdict())
        first = values.get(settings[0], {})
        for setting in settings[1:]:
            paired = [value - first[draw] for draw, value in values.get(setting, {}).items() if draw in first]
            if paired:
                differences.setdefault(row.label, {})[setting] = stat(paired)._asdict()
    points = [
        {"setting": p.setting, "draw": p.draw, "folder": p.folder.name, "reason": p.reason, "run": runs.get(p.folder)}
        | costs(p.folder)
        for p in ran
    ]
    return {"baseline": settings[0], "figures": by_label, "differences": differences, "points": points}


def costs(folder: Path) -> dict[str, Any]:
    """Seconds that the point's own stages took, seconds that it took from other points, and which stages those were."""
    path = folder / "summary.json"
    stages = read_json(path)["stages"] if path.exists() else {}  # it may end before its first stage does
    taken = [name for name, stage in stages.items() if "shared_from" in stage]
    own = sum(stage["seconds"] for name, stage in stages.items() if name not in taken)
    return {"seconds_own": own, "seconds_shared": sum(stages[name]["seconds"] for name in taken), "shared": taken}


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(found: dict[str, Any], settings: list[str], of: int) -> str:
    """The tables that people read."""
    points = found["points"]
    failed = [point for point in points if point["reason"] is not None]
    state = f"{len(points) - len(failed)} of {of} points done" + (f", {len(failed)} failed" if failed else "")
    own, saved = (sum(point[f"seconds_{kind}"] for point in points) for kind in ("own", "shared"))
    lines = [
        "# Sweep",
        "",
        f"{state}; {own:.0f} s in all, {saved:.0f} s saved by sharing stages.",
        "",
        "Mean over the seeds, with Student's 95 % interval, n seeds; a single seed's change has its evaluation's "
        "interval",
        "over videos. Seconds count a shared stage as if the run had done it.",
        "",
    ]
    rows = [
        (label, *(_cell(by_setting[one][1]) if one in by_setting else "" for one in settings))
        for label, by_setting in found["figures"].items()
    ]
    lines.append(markdown_table(("figure", *settings), rows))
    if found["differences"]:
        others = settings[1:]
        rows = [
            (label, *(_cell(by_setting[one], bold=True) if one in by_setting else "" for one in others))
            for label, by_setting in found["differences"].items()
        ]
        said = f"Differences from `{found['baseline']}`, paired by seed; **bold** where the interval leaves 0 out."
        lines += ["", said, "", markdown_table(("figure", *others), rows)]
    rows = []
    for point in points:
        reason = "" if point["reason"] is None else "failed: " + " ".join(point["reason"].split())[:300]
        rows.append((point["folder"], point["draw"], f"{point['seconds_own']:.0f}", ", ".join(point["shared"]), reason))
    lines += ["", markdown_table(("point", "seed", "seconds", "taken from other points", ""), rows)]
    return "\n".join(lines) + "\n\n![every figure by setting](sweep.svg)\n"


def _cell(one: dict[str, Any], bold: bool = False) -> str:
    mean = f"{one['mean']:.3f}"
    if one["low"] is None:
        return f"{mean} (n {one['n']})"
    text = f"{mean} ({one['low']:.3f} to {one['high']:.3f}, n {one['n']})"
    return f"**{text}**" if bold and not one["low"] <= 0 <= one["high"] else text
