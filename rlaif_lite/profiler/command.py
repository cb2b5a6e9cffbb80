"""What `rlaif-lite profile` does with its arguments."""

import json
from pathlib import Path

from .. import ranks
from ..planner.plan import size_in_bytes
from ..recipe import Recipe
from . import Random, Traces
from . import profile as run_profile
from .tables import as_text


def profile(
    recipe: Recipe,
    steps: int,
    stages: tuple[str, ...],
    memory_cap: str | None,
    random_weights: bool,
    small: bool,
    trace: bool,
    out: Path | None,
) -> None:
    """Profile a recipe, and show and write what was asked for. Rank 0 speaks."""
    cap = None if memory_cap is None else size_in_bytes(memory_cap)
    stem = out or Path(f"{recipe.name}.profile.json")
    traces = Traces(stem.with_suffix(".trace.json"), stem.with_suffix(".memory.png")) if trace else None
    found = run_profile(recipe, steps, stages, cap, traces, Random(small) if random_weights else None)
    if not ranks.is_first():
        return
    print(as_text(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if traces is not None:
        print(f"{traces.chrome}\n{traces.memory}")
