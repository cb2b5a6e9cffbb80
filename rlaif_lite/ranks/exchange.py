"""Work cut into shares, and what the ranks tell each other of it. In one process every function does its work alone."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import StageError
from ..phases import phase
from .world import WORLD, all_well, is_first, status, talking, together

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

T = TypeVar("T")
R = TypeVar("R")


def first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank. Only rank 0 calls it, and may write files in it."""
    if not together():
        return make()
    all_well()
    found: list[Any] = [None]
    if is_first():
        with alone():
            found = [make()]
    import torch.distributed as dist

    with talking():
        dist.broadcast_object_list(found, src=0, group=WORLD.objects)
    return found[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The block waits for no other rank: where the run ends, and others may be gone."""
    before, WORLD.alone = WORLD.alone, True
    try:
        yield
    finally:
        WORLD.alone = before


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; tensors arrive on the CPU, where there are several ranks."""
    if not together():
        return [value]
    import torch.distributed as dist

    all_well()
    found: list[Any] = [None] * WORLD.count
    with talking():
        dist.all_gather_object(found, _on_cpu(value), group=WORLD.objects)
    return found


def _on_cpu(value: Any) -> Any:
    """Lists, tuples and dictionaries with their tensors on the CPU: a number of a card means another one elsewhere."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_on_cpu, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def collect(value: T) -> list[T]:
    """Every rank's value on rank 0, which is what is large and only to be written; nothing on the others."""
    if not together():
        return [value]
    import torch.distributed as dist

    all_well()
    found: list[Any] | None = [None] * WORLD.count if is_first() else None
    with talking():
        dist.gather_object(_on_cpu(value), found, dst=0, group=WORLD.objects)
    return found or []


def wait() -> None:
    """Until all ranks are here."""
    gather(None)


def total(x: "Tensor") -> "Tensor":
    """The sum of every rank's tensor, in place; all have one shape and type."""
    if together():
        import torch.distributed as dist

        all_well()
        with talking():
            dist.all_reduce(x)
    return x


def totals(values: dict[str, float]) -> dict[str, float]:
    """The sums of every rank's numbers, in the order of the ranks, so that all ranks get the same bits."""
    every = gather(values)
    return {name: sum(each[name] for each in every) for name in values} if len(every) > 1 else values


def sum_gradients(parameters: Sequence["Parameter"]) -> None:
    """Add up the gradients of all ranks, in one flat exchange: each rank's loss is its share of the whole batch's."""
    if not together():
        return
    import torch

    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    with phase("all-reduce", flat.numel()):
        total(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def same(what: str, value: object, where: str) -> None:
    """Raises StageError, naming the ranks, where `value` differs from rank 0's."""
    every = gather(value)
    if other := [number for number, each in enumerate(every) if each != every[0]]:
        differs = f"{what} differs on rank {', '.join(map(str, other))} from rank 0's"
        raise StageError(f"{where}: {differs}. {_differences(every, other)}")


def _differences(every: list, other: list[int]) -> str:
    """The first keys that differ, where the values are dictionaries."""
    mine, theirs = every[0], every[other[0]]
    if not isinstance(mine, dict):
        return f"It is {theirs!r} there, and {mine!r} on rank 0."
    keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    shown = "; ".join(f"`{key}` is {theirs.get(key)!r} there, and {mine.get(key)!r} on rank 0" for key in keys[:5])
    return shown + (f"; and {len(keys) - 5} more." if len(keys) > 5 else ".")


# ------------------------------------------------------------------------------------------------------------- sharing


def share(items: int, size: Callable[[int], float] = lambda item: 0.0) -> list[list[int]]:
    """The numbers below `items`, dealt to the ranks so that each has about as much: the largest go first, to and fro.
    In one process: all of them, in their order."""
    order = sorted(range(items), key=lambda item: -size(item)) if WORLD.count > 1 else list(range(items))
    hands: list[list[int]] = [[] for _ in range(WORLD.count)]
    for place, item in enumerate(order):
        turn, seat = divmod(place, WORLD.count)
        hands[seat if turn % 2 == 0 else -1 - seat].append(item)
    return [sorted(hand) for hand in hands]


def deal(items: Sequence[T], size: Callable[[T], float] = lambda item: 0.0) -> list[T]:
    """This rank's share of a batch that all ranks know; `size` tells what an item costs."""
    return [items[i] for i in share(len(items), lambda i: size(items[i]))[WORLD.rank]] if together() else list(items)


def spread(items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """`work` on all items, one result for each: every rank works on its share, and gets all results, in order."""
    if not items:
        return []
    if not together():
        return work(list(items))
    hands = share(len(items))
    own = hands[WORLD.rank]
    found: dict[int, R] = {}
    for hand, results in zip(hands, gather(work([items[i] for i in own]) if own else []), strict=True):
        found |= zip(hand, results, strict=True)
    return [found[i] for i in range(len(items))]


# ------------------------------------------------------------------------------------------------ memory that runs out


def ran_out() -> None:
    """Tell the others, wherever they are in the update, that memory ran out on this rank."""
    if together():
        status(1)


def went_well() -> None:
    """At the end of an update that others may still fail in. Raises PeerOutOfMemory where one does."""
    if together():
        all_well()
