"""What a process knows of the other ranks, and the small integer that begins every exchange."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from ..errors import RlaifError, StageError


class PeerOutOfMemory(MemoryError):
    """Memory ran out on another rank, so this one undoes its part of the update, too."""


class PeerGone(RlaifError):
    """An exchange failed, as another rank ended."""


class World:
    """What this process knows of the others."""

    rank, count, local, here = 0, 1, 0, 1  # number, of all; number on this machine, of those on it
    names: tuple[str, ...] = ()  # of the processes, by rank
    alone = False  # inside `first`: the others wait
    closing = False
    store: Any = None  # keys and values that all ranks see; it outlives a rank
    objects: Any = None  # groups: for what is pickled, and for the watch
    watch: Any = None


WORLD = World()


def rank() -> int:
    """The number of this process among all of the run; 0 where there is one."""
    return WORLD.rank


def count() -> int:
    """How many processes the run has."""
    return WORLD.count


def on_this_machine() -> int:
    """How many of them share this machine."""
    return WORLD.here


def cores() -> int:
    """Of the cores that this process may use, its share beside the other ranks of the machine, at least one. All of
    them while the others wait."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // (1 if WORLD.alone else WORLD.here))


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return WORLD.rank == 0


def device(kind: str) -> str:
    """`kind` ("cuda" or "cpu") with this rank's card. Raises StageError where there are more ranks than cards."""
    if kind != "cuda" or WORLD.count == 1:
        return kind
    import torch

    if WORLD.local >= torch.cuda.device_count():
        raise StageError(
            f"{WORLD.here} ranks on {socket.gethostname()}, which has {torch.cuda.device_count()} GPUs. Start one "
            f"rank per GPU: `torchrun --nproc-per-node {torch.cuda.device_count()}`."
        )
    torch.cuda.set_device(WORLD.local)
    return f"cuda:{WORLD.local}"


def all_well() -> None:
    """Raises PeerOutOfMemory where memory ran out on another rank."""
    if status(0):
        raise PeerOutOfMemory("memory ran out on another rank")


def status(code: int) -> int:
    """The highest code that a rank gives."""
    import torch
    import torch.distributed as dist

    said = torch.tensor([code], dtype=torch.int32)
    with talking():
        dist.all_reduce(said, dist.ReduceOp.MAX, group=WORLD.objects)
    return int(said)


def together() -> bool:
    """Whether there are others, and they take part in what is done now."""
    return WORLD.count > 1 and not WORLD.alone


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """An exchange; raises PeerGone where it fails."""
    try:
        yield
    except RuntimeError as error:
        raise PeerGone(f"Another rank ended ({str(error).splitlines()[0]}).") from error
