"""Memory that runs out inside a step: it is done again with half as many records per forward, and the run goes on.

Twice as many micro-batches then make up the same batch, so the update is the same but for rounding. The smaller size
stays, and is kept in the checkpoint. Of several ranks all do the step again, whichever ran out. On a GPU the state of
the allocator is left as JSON, not as torch's pickle.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .. import ranks
from ..errors import StageError
from ..files import write_text
from ..model.memory import halving, out_of_memory
from ..model.roles import Roles
from ..progress import say

T = TypeVar("T")


class Backoff:
    """How many records go through a forward at once, halved each time memory runs out."""

    def __init__(self, label: str, micro: int, folder: Path):
        self.label = label
        self.micro = micro
        self.folder = folder  # where snapshots go

    def run(self, step: int, attempt: Callable[[int], T], undo: Callable[[], None]) -> T:
        """`attempt(micro)`, again with half of it after `undo()` for as long as memory runs out.

        Raises StageError where it does with a single record."""
        left = ""

        def guarded(micro: int) -> T:
            nonlocal left
            try:
                found = attempt(micro)
                ranks.went_well()
                return found
            except ranks.PeerOutOfMemory:
                if micro == 1:
                    raise ranks.PeerGone("A single record per forward does not fit on another rank.") from None
                raise
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    ranks.ran_out()
                    left = snapshot(self.folder / f"oom_{self.label}_{step}.json")
                    if micro == 1:
                        raise StageError(
                            f"{self.label}: step {step} does not fit into memory with a single record per forward. Set "
                            "`model.gradient_checkpointing: true`, keep fewer video tokens (`features.prune`), or "
                            f"shorten the answers. The last checkpoint is kept.{left}"
                        ) from error
                raise

        def failed(micro: int, reason: str) -> None:
            undo()
            half = micro // 2
            say(f"{self.label}: step {step}: out of memory at {micro} a forward, done again at {half}.{left}")

        found, self.micro = halving(self.micro, guarded, failed)
        return found


def snapshot(path: Path) -> str:
    """Leave the allocator's blocks and counters in `path` and say where; on a CPU there is nothing to leave, and ranks
    other than 0 write nothing."""
    if not torch.cuda.is_available() or not ranks.is_first():
        return ""
    with ranks.alone():
        write_text(path, json.dumps({"stats": torch.cuda.memory_stats(), "segments": torch.cuda.memory_snapshot()}))
    return f" The allocator's state is in {path}."


class Saved(NamedTuple):
    """Roles and their optimisers as they were, in host memory."""

    parameters: dict[str, list[torch.Tensor]]
    optimizers: dict[str, dict]


def remember(roles: Roles, optimizers: dict[str, torch.optim.Optimizer]) -> Saved:
    """Copy what an update changes, so that it can be undone: 12 bytes per trained parameter, in host memory."""
    parameters = {role: [p.detach().to("cpu", copy=True) for p in roles.parameters(role)] for role in optimizers}
    states = {role: _copied(optimizer.state_dict()) for role, optimizer in optimizers.items()}
    return Saved(parameters, states)


def put_back(roles: Roles, optimizers: dict[str, torch.optim.Optimizer], saved: Saved) -> None:
    """Undo what happened since `remember`, gradients included."""
    for role, optimizer in optimizers.items():
        for parameter, before in zip(roles.parameters(role), saved.parameters[role], strict=True):
            parameter.data.copy_(before)
        optimizer.load_state_dict(_copied(saved.optimizers[role]))
        optimizer.zero_grad(set_to_none=True)


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
