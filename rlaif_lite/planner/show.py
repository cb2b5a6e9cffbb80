"""A plan as a table for people and as JSON for programs."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from ..formats import duration
from .plan import Plan
from .several import Several

SCHEMA = 3  # counted up when a name below goes or changes its meaning


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds; `change` is null where a stage fits, `seconds` where no rate is known, `several` in one
    process."""
    return {
        "schema": SCHEMA,
        "recipe": plan.recipe.name,
        "device": plan.device._asdict(),
        "ranks": plan.ranks,
        "link": plan.link._asdict(),
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
                "several": stage.several and stage.several._asdict(),
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
    more = () if plan.ranks == 1 else (f"Time, {plan.ranks} ranks", "Updates", "MB each", "All-reduces")
    for column in ("Stage", "Peak", "at", "most of it", "Host", "Disk", "Time", *more):
        table.add_column(column, justify="left" if column in ("Stage", "at", "most of it") else "right")
    shown = lambda seconds: "not known" if seconds is None else duration(seconds)
    for name, stage in plan.stages.items():
        kind, size = max(stage.terms.items(), key=lambda term: term[1], default=("", 0))
        table.add_row(
            name if stage.fits else f"[red]{name}: does not fit[/red]",
            f"{stage.peak / 2**30:.2f}",
            stage.phase,
            f"{kind} {size / 2**30:.2f}",
            f"{stage.host / 2**30:.1f}",
            "not known" if stage.disk is None else f"{stage.disk / 2**30:.2f}",
            shown(stage.seconds),
            *(() if stage.several is None else _several(stage.several, shown)),
        )
    return table


def _several(found: Several, shown: Callable[[float | None], str]) -> tuple[str, ...]:
    """The cells of a stage that several ranks do."""
    each = f"{found.bytes / found.updates / 1e6:.1f}" if found.updates else ""
    return shown(found.seconds), f"{found.updates:,}", each, shown(found.exchange_seconds)


def advice(plan: Plan) -> list[str]:
    """Lines below the table: what to change, the largest sizes that fit, what was assumed."""
    lines = [*plan.too_long, *(f"{name}: {stage.change}." for name, stage in plan.stages.items() if stage.change)]
    most = {key: value for stage in plan.stages.values() for key, value in stage.proposals.items() if value}
    lines.append("Largest that fit: " + ", ".join(f"{key}: {value}" for key, value in most.items()) + ".")
    if bases := {stage.basis for stage in plan.stages.values() if stage.seconds is not None}:
        lines.append(f"Times from {'; '.join(bases)}.")
    return lines + [f"Assumed: {note}." for note in plan.notes]
