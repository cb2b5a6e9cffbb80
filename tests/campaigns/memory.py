"""Memory that runs out in a module, a backward pass or an optimiser step: the stage ends with the same adapters."""

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from campaigns.runs import differences, from_reference, recipe_of, reference, run
from rlaif_lite import pipeline
from rlaif_lite.files import remove
from rlaif_lite.training.oom import Backoff

NEAR = 1e-6  # of a weight, where the failure was in reading or sampling: pieces of another size round in another way
ROUNDING = 1e-4  # where a training step was undone: rates here are 5e-4 to 5e-3, and Adam divides by small numbers


def short_of_memory(stage: str, at: int) -> Callable[[], int]:
    """Fail once in the stage, before its event `at` (0: never); events are module calls, backward passes and optimiser
    steps -> a function that gives the number of events so far."""
    seen, inside, work_of = [0], [], pipeline.STAGES[stage].run

    def event(*_) -> None:
        seen[0] += bool(inside)
        if inside and seen[0] == at:
            torch.empty(1 << 60, dtype=torch.uint8)

    def before(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def guarded(self, *arguments, **keys):
            event()
            return plain(self, *arguments, **keys)

        setattr(owner, name, guarded)

    before(torch.Tensor, "backward")
    before(torch.optim.AdamW, "step")
    register_module_forward_pre_hook(event)
    pipeline.STAGES[stage].run = lambda work: inside.append(True) or work_of(work)
    return lambda: seen[0]


def halved_in(label: str, step: int) -> Callable[[], None]:
    """Take half as many records per forward from a training step on, without a failure."""
    plain = Backoff.run

    def run_halved(self, number, attempt, undo):
        self.micro //= 2 if (self.label, number) == (label, step) else 1
        return plain(self, number, attempt, undo)

    Backoff.run = run_halved
    return lambda: None


def largest_change(want: Path, got: Path, stage: str) -> float:
    """Of a weight of the adapters that a stage leaves."""
    change = 0.0
    for role in pipeline.LEAVES.get(stage, ()):
        for file in sorted((want / "adapters" / role).glob("*.safetensors")):
            one, other = load_file(file), load_file(got / file.relative_to(want))
            change = max([change, *(float((one[key] - other[key]).abs().max()) for key in one)])
    return change


class Injection(NamedTuple):
    """One failure."""

    method: str
    stage: str
    event: str
    change: float
    "largest change of a weight"
    texts: int
    "files that differ otherwise"
    faults: list[str]


def campaign(count: int, checkpoint: Path, folder: Path, methods: tuple[str, ...], say) -> Iterator[Injection]:
    """`count` failures, in turn in every stage of every method; `data` is left out, as it makes no tensor."""
    rng, events = random.Random(count), {}
    recipes = {method: recipe_of(method, checkpoint, folder / method) for method in methods}
    places = [(method, stage) for method, recipe in recipes.items() for stage in recipe.stages if stage != "data"]
    for number in range(count):
        method, stage = places[number % len(places)]
        recipe, output = recipes[method], Path(recipes[method].output)
        kept = reference(recipe)[0]
        if (method, stage) not in events:
            from_reference(recipe, kept, [stage])
            events[method, stage] = run(recipe, lambda stage=stage: short_of_memory(stage, 0), until=stage).value
        at = rng.randint(1, max(1, events[method, stage]))
        from_reference(recipe, kept, [stage])
        if stage == "features":
            for path in (output / "features" / "cache").rglob("*"):
                path.unlink()
        out = output.with_name("end.out")
        said = len(out.read_text())
        ended = run(recipe, lambda stage=stage, at=at: short_of_memory(stage, at), until=stage)
        faults, change, texts = [], 0.0, 0
        if ended.status:
            faults = [f"status {ended.status}: {ended.said[-500:]}"]
        else:
            # A step that was undone gives what the smaller size gives without a failure, bit for bit.
            undone = re.findall(r"(\S+): step (\d+): out of memory", out.read_text()[said:])
            if undone:
                failed = output.with_name("failed")
                remove(failed)
                os.rename(output, failed)
                from_reference(recipe, kept, [stage])
                label, step = undone[0]
                run(recipe, lambda label=label, step=int(step): halved_in(label, step), until=stage)
                if wrong := largest_change(output, failed, stage):
                    faults.append(f"a weight differs by {wrong:.2g} from that of the smaller size")
            change = largest_change(kept, output, stage)
            texts = len(differences(kept, output, (stage,)))
            if change > (ROUNDING if undone else NEAR):
                faults.append(f"a weight changed by {change:.2g}")
        yield (found := Injection(method, stage, f"{at} of {events[method, stage]}", change, texts, faults))
        say(f"memory: {found}")
