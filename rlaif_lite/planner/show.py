"""A plan as a table for people and as JSON for programs."""

from typing import Any

from rich.table import Table

from ..formats import duration
from .plan import Plan

SCHEMA = 2  # counted up when a name below goes or changes its meaning


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds; `change` is null where a stage fits, `seconds` where no rate is known."""
    return {
        "schema": SCHEMA,
        "recipe": plan.recipe.name,
        "device": plan.device._asdict(),
        "fits": plan.fits,
        "peak_memory_bytes": max(stage.peak for stage in plan.stages.values()),
        "disk_bytes": sum(stage.disk or 0 for stage in plan.stages.values()),
        "stages": {
            name: {
                "peak_memory_bytes": stage.peak,
                "phase": stage.phase,
                "terms": stage.terms,
                "fits": stage.fits,
                "proposals": stage.proposals,
                "change": stage.change,
                "host_memory_bytes": stage.host,
                "disk_bytes": stage.disk,
                "seconds": stage.seconds,
                "basis": stage.basis,
            }
            for name, stage in plan.stages.items()
        },
        "video_tokens": plan.video_tokens,
        "too_long": plan.too_long,
        "notes": plan.notes,
    }


def as_table(plan: Plan) -> Table:
    """One row per stage, GiB; the largest kind of memory is named."""
    device = plan.device
    title = (
        f"{plan.recipe.name} on {device.name}: {device.memory / 2**30:.1f} GiB, {device.reserve / 2**30:.1f} kept free"
    )
    table = Table(title=title, title_justify="left")
    for column in ("Stage", "Peak", "at", "most of it", "Host", "Disk", "Time"):
        table.add_column(column, justify="right" if column in ("Peak", "Host", "Disk", "Time") else "left")
    for name, stage in plan.stages.items():
        kind, size = max(stage.terms.items(), key=lambda term: term[1], default=("", 0))
        table.add_row(
            name if stage.fits else f"[red]{name}: does not fit[/red]",
            f"{stage.peak / 2**30:.2f}",
            stage.phase,
            f"{kind} {size / 2**30:.2f}",
            f"{stage.host / 2**30:.1f}",
            "not known" if stage.disk is None else f"{stage.disk / 2**30:.2f}",
            "not known" if stage.seconds is None else duration(stage.seconds),
        )
    return table


def advice(plan: Plan) -> list[str]:
    """Lines below the table: what to change, the largest sizes that fit, what was assumed."""
    lines = [*plan.too_long, *(f"{name}: {stage.change}." for name, stage in plan.stages.items() if stage.change)]
    most = {key: value for stage in plan.stages.values() for key, value in stage.proposals.items() if value}
    lines.append("Largest that fit: " + ", ".join(f"{key}: {value}" for key, value in most.items()) + ".")
    if bases := {stage.basis for stage in plan.stages.values() if stage.seconds is not None}:
        lines.append(f"Times from {'; '.join(bases)}.")
    return lines + [f"Assumed: {note}." for note in plan.notes]
