"""Memory that runs out in a forward without gradients: what is read goes through in smaller pieces.

What belongs to an update is done again as a whole instead (`training/oom.py`).
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
# What torch says where it does not raise OutOfMemoryError: its CPU allocator, and cuBLAS without room to work in.
SAYINGS = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SAYINGS)


def in_pieces(items: Sequence[T], size: int, read: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """`read` of all items, `size` at a time, one result for each; a piece that does not fit into memory is read again
    in halves, and so is what comes after it. Raises what `read` raised where one item alone does not fit."""
    out: list[R] = []
    while len(out) < len(items):
        piece = items[len(out) : len(out) + size]
        try:
            out += read(piece)
            continue
        except RuntimeError as error:
            if len(piece) == 1 or not out_of_memory(error):
                raise
            reason = str(error).split(". ")[0]
        # outside of the except block, which keeps the tensors of the failed attempt alive
        size = len(piece) // 2
        log.warning("%d rows in one forward do not fit (%s): going on with %d.", len(piece), reason, size)
    return out
