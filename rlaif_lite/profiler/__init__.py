"""What a recipe costs on this machine, phase by phase: the stages' own code, for a few steps at the recipe's sizes.

Nothing is re-implemented: the stages run on made-up inputs (`inputs.py`) in a temporary folder, and their functions
tell a recorder what they are at (`phases.py`, `recorder.py`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from .. import ranks
from ..errors import StageError
from ..model.base import Base, load_base, resolve_base, torch_dtype
from ..model.random_base import load_random
from ..phases import listen
from ..pipeline import STAGES
from ..planner import Plan, make_plan
from ..progress import say
from ..recipe import Recipe, recipe_hash
from ..training.meter import describe_machine, versions
from ..workspace import Workspace, pick_device
from .inputs import made_up, reduced, stand_ins, write_inputs
from .recorder import DECODING, Cost, Recorder, matmul_rate
from .tables import SCHEMA, draw_memory

PROFILED = tuple(name for name in STAGES if name not in ("data", "dpo"))  # rounds of DPO need answers that differ


class Traces(NamedTuple):
    """Where `--trace` writes."""

    chrome: Path  # the last step of PPO (or of the last stage that has steps), for chrome://tracing or Perfetto
    memory: Path  # a picture


class Random(NamedTuple):
    """`--random-weights`."""

    small: bool  # shrink the base to two narrow layers: a rehearsal, whose figures mean nothing


def profile(
    recipe: Recipe,
    steps: int = 2,
    stages: tuple[str, ...] = (),
    memory_cap: int | None = None,
    traces: Traces | None = None,
    random: Random | None = None,
) -> dict:
    """Run `stages` (none named: all that the recipe runs) and return what they cost, as JSON has it (see
    docs/profiling.md).

    memory_cap: bytes that the CUDA allocator may hold; random: made-up weights. Memory is planned for the same inputs.
    Raises StageError for an unknown stage, and for a cap without a GPU; torch.OutOfMemoryError or StageError where the
    cap is too small.
    """
    known = [name for name in PROFILED if name in recipe.stages]
    if unknown := [name for name in stages if name not in known]:
        raise StageError(f"There is no stage `{unknown[0]}` to profile; there are {', '.join(known)}.")
    device = torch.device(ranks.device(pick_device(recipe.device)))
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    cap(memory_cap, device)
    with opened(recipe, steps, memory_cap, random) as (work, plan):
        found, moments = {}, {}
        rate = matmul_rate(device, torch_dtype(recipe.model, device))
        chosen = [stage for stage in known if not stages or stage in stages]
        with_steps = [stage for stage in chosen if stage in ("sft", "reward", "ppo")]
        for stage in ["features", *(stage for stage in chosen if stage != "features")]:
            if stage != "features":
                stand_ins(work)
                work.release_roles()
            traced = steps + 1 if traces and with_steps and stage == with_steps[-1] else None
            recorder = Recorder(device, traced)
            say(f"profile: {stage}")
            with listen(recorder), recorder:
                STAGES[stage].run(work)
            work.release_roles()
            if stage in chosen:
                found[stage] = stage_figures(recorder, work.base(), rate, plan.stages[stage].peak)
                moments[stage] = recorder.moments
            if recorder.trace is not None:
                recorder.trace.export_chrome_trace(str(traces.chrome))
    if traces:
        draw_memory(moments, traces.memory)
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "random_weights": random is not None,
        "steps": steps,
        "memory_cap_bytes": memory_cap,
        "matmul_flops": rate,
        "machine": describe_machine(),
        "ranks": ranks.count(),
        "versions": versions(),
        "stages": found,
    }


@contextmanager
def opened(
    recipe: Recipe, steps: int, memory_cap: int | None, random: Random | None
) -> Iterator[tuple[Workspace, Plan]]:
    """The recipe reduced to a few steps, on made-up inputs in a temporary folder, and what is planned for that."""
    with ExitStack() as kept:
        made = lambda: Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="rlaif-profile-")))
        folder = ranks.first(made)
        ranks.check_folder(folder)
        small = reduced(
            recipe if random is None else ranks.first(lambda: made_up(recipe, folder, random.small)), folder, steps
        )
        model = small.model
        write_inputs(small, folder, AutoTokenizer.from_pretrained(resolve_base(model.base), revision=model.revision))
        plan = ranks.first(lambda: make_plan(small, None if memory_cap is None else f"{memory_cap}B"))
        yield Workspace(plan.recipe, load=load_base if random is None else load_random), plan
        ranks.wait()  # all have read what goes now


def stage_figures(recorder: Recorder, base: Base, rate: float, planned: int) -> dict:
    """A stage's costs; `other` is what no phase names: reading, laying out batches, checkpoints."""
    # weights of the decoder's linear layers: each costs a multiplication and an addition per token
    layers = (module for module in base.decoder.modules() if isinstance(module, torch.nn.Linear))
    total, size = recorder.measured_seconds, sum(layer.in_features * layer.out_features for layer in layers)
    other = Cost(calls=1, seconds=total - sum(cost.seconds for cost in recorder.costs.values()))
    phases = {}
    for name, cost in (*recorder.costs.items(), ("other", other)):
        work = 2 * size * cost.count if name in DECODING else 0
        phases[name] = {
            "calls": cost.calls,
            "seconds": cost.seconds,
            "count": cost.count,
            "per_second": cost.count / cost.seconds if cost.count and cost.seconds else None,
            "share": cost.seconds / total,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "of_matmul": work / cost.seconds / rate if work else None,
        }
    return {
        "seconds": recorder.seconds,
        "measured_seconds": total,
        "steps": recorder.steps,
        "peak_memory_bytes": recorder.peak_memory_bytes,
        "planned_memory_bytes": planned,
        "phases": phases,
    }


def cap(memory: int | None, device: torch.device) -> None:
    """Bound what torch's CUDA allocator may hold; the CUDA context (about half a GiB) comes on top."""
    if memory is None:
        return
    if device.type != "cuda":
        raise StageError(
            "`--memory-cap` bounds the CUDA allocator, and this profile runs on a CPU, where nothing can be bounded "
            "that way. Leave it out, or bound the whole process from outside: `ulimit -v`."
        )
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))  # it takes no device without a number
