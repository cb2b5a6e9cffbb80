"""Memory that runs out: what did not fit is done again in pieces of half the size.

`halving` is the mechanism. Reading without gradients (`in_pieces`), sampling (`rollout/loop.py`) and updates
(`training/oom.py`) differ in what a piece is and in what must be undone.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .. import ranks

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
# What torch says where it does not raise OutOfMemoryError: its CPU allocator, cuBLAS without room to work in, and the
# CUDA runtime outside of torch's allocator.
SAYINGS = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or torch says that memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in SAYINGS)
    )


def halving(size: int, attempt: Callable[[int], R], failed: Callable[[int, str], None]) -> tuple[R, int]:
    """`attempt(size)`, again with half the size for as long as memory runs out -> (its result, the size that fitted).

    `failed(size, reason)` is called after each attempt that did not fit, when its tensors are free, and undoes what
    must be undone. Raises what the attempt raised where size 1 does not fit."""
    while True:
        try:
            return attempt(size), size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
            reason = str(error).split(". ")[0]
        # Outside of the except block, whose traceback keeps the tensors of the failed attempt alive.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failed(size, reason)
        size //= 2


def in_pieces(items: Sequence[T], size: int, read: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """`read` of all items, `size` at a time, one result for each; a piece that does not fit into memory is read again
    in halves, and so is what comes after it. Raises what `read` raised where one item alone does not fit."""
    out: list[R] = []

    def failed(count: int, reason: str) -> None:
        log.warning("%d rows in one forward do not fit (%s): going on with %d.", count, reason, count // 2)

    while len(out) < len(items):
        piece = items[len(out) : len(out) + size]
        found, fitted = halving(len(piece), lambda count, piece=piece: read(piece[:count]), failed)
        size = fitted if fitted < len(piece) else size
        out += found
    return out


def in_pieces_together(items: Sequence[T], size: int, read: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """As `in_pieces`, by all ranks: each reads its share of the pieces, and has all results in the end. The pieces are
    the same however many ranks there are."""
    if ranks.count() == 1:
        return in_pieces(items, size, read)
    pieces = [items[start : start + size] for start in range(0, len(items), size)]
    found = ranks.spread(pieces, lambda own: [in_pieces(piece, size, read) for piece in own])
    return [result for piece in found for result in piece]
