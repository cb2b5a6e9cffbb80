"""A profile as text, two of them side by side, and memory over time as a picture."""

import json
from pathlib import Path

from ..errors import RlaifError
from ..formats import aligned, number, percent

SCHEMA = 1  # of the JSON; counted up when a field changes its meaning
COLUMNS = ("stage", "phase", "calls", "seconds", "per second", "share", "peak", "of matmul")


def as_text(profile: dict) -> str:
    """The table that `rlaif-lite profile` prints."""
    rows = []
    for stage, cost in profile["stages"].items():
        steps, planned = cost["steps"], gib(cost["planned_memory_bytes"])
        rows.append(
            (
                stage,
                f"{steps} steps measured" if steps else "",
                "",
                f"{cost['seconds']:.2f}",
                "",
                "",
                gib(cost["peak_memory_bytes"]),
                f"planned {planned}",
            )
        )
        for name, phase in cost["phases"].items():
            rows.append(
                (
                    "",
                    name,
                    str(phase["calls"]),
                    f"{phase['seconds']:.3f}",
                    "" if phase["per_second"] is None else number(phase["per_second"], 0),
                    f"{phase['share']:.1%}",
                    gib(phase["peak_memory_bytes"]),
                    "" if phase["of_matmul"] is None else percent(phase["of_matmul"]),
                )
            )
    made = "random weights, " if profile["random_weights"] else ""
    cap = profile["memory_cap_bytes"]
    head = (
        f"{profile['recipe']}: {profile['machine']['device']}, {made}{profile['steps']} steps a phase, one large "
        f"matmul {profile['matmul_flops'] / 1e12:.3g} TFLOP/s{'' if cap is None else f', capped at {gib(cap)}'}"
    )
    return f"{head}\n{aligned([COLUMNS, *rows])}"


def read(path: Path) -> dict:
    """A profile that `--json` wrote. Raises RlaifError for another file, or another version of the schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] == SCHEMA:
            return found
        wrong = f"has schema {found['schema']}, this version reads {SCHEMA}"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        wrong = "is no profile"
    raise RlaifError(f"{path} {wrong}. `rlaif-lite profile RECIPE --json FILE` writes one.")


def compare(a: dict, b: dict) -> str:
    """Seconds per step and peak memory of two profiles, phase by phase, and their ratios b / a."""
    rows = [("stage", "phase", "ms a", "ms b", "b / a", "peak a", "peak b")]
    for stage in [name for name in a["stages"] if name in b["stages"]]:
        x, y = a["stages"][stage], b["stages"][stage]
        for name in [name for name in x["phases"] if name in y["phases"]]:
            p, q = x["phases"][name], y["phases"][name]
            first, second = (1e3 * cost["seconds"] / max(1, own["steps"]) for cost, own in ((p, x), (q, y)))
            ratio = f"{second / first:.2f}" if first else ""
            peaks = gib(p["peak_memory_bytes"]), gib(q["peak_memory_bytes"])
            rows.append((stage, name, f"{first:.1f}", f"{second:.1f}", ratio, *peaks))
    if len(rows) == 1:
        raise RlaifError("The two profiles have no stage and phase in common; profile the same stages twice.")
    names = [f"{key}: {p['recipe']} on {p['machine']['device']}" for key, p in (("a", a), ("b", b))]
    return "\n".join([*names, aligned(rows)])


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"


def draw_memory(moments: dict[str, list], path: Path) -> None:
    """Memory held after each phase and its peak within, over the time of each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {stage: found for stage, found in moments.items() if found}
    names = list(dict.fromkeys(moment.name for found in shown.values() for moment in found))
    colours = dict(zip(names, plt.get_cmap("tab20").colors * 2, strict=False))
    figure, axes = plt.subplots(len(shown), 1, figsize=(10, 2.4 * len(shown)), squeeze=False, constrained_layout=True)
    for axis, (stage, found) in zip(axes[:, 0], shown.items(), strict=True):
        for moment in found:
            axis.fill_between([moment.begin, moment.end], moment.peak / 2**30, color=colours[moment.name], linewidth=0)
        axis.plot([m.end for m in found], [m.held / 2**30 for m in found], color="black", linewidth=0.8)
        axis.set_ylabel("GiB")
        axis.set_title(f"{stage}: peak in each phase, held after it (line)", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("seconds of the stage")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
