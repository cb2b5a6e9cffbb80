"""Memory that runs out: what did not fit is done again in pieces of half the size. And a CPU's heap, see `map_blocks`.

`halving` is the mechanism. Reading without gradients (`in_pieces`), sampling (`rollout/loop.py`) and updates
(`training/oom.py`) differ in what a piece is and in what must be undone.
"""

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from .. import ranks

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
BLOCK = 1 << 20  # bytes from which a large base's tensors are mapped
LARGE = 64 << 20  # bytes of a feed-forward in float32 above which a base is large
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
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


def maps_blocks(config: PretrainedConfig) -> bool:
    """Whether a base is so large that `map_blocks` is worth its time on a CPU."""
    text = config.get_text_config()
    return 12 * text.num_hidden_layers * text.hidden_size * text.intermediate_size > LARGE


def map_blocks() -> None:
    """Have every block of BLOCK bytes or more mapped on its own, and given back when it is freed.

    Linux's malloc raises that limit to 32 MiB by itself, and the holes that freed activations leave in its heap do not
    fit the next ones. So a training step of a 135 M base peaked at 2.3 GB above its weights, and at 1.2 GB mapped,
    which is what autograd keeps. Fresh pages cost it a tenth of its time. Without glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK)
