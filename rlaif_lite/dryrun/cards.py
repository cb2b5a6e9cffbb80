"""Rates of GPUs, for a roofline.

Peaks are those of NVIDIA's documents, named at each card: dense (their headline figures with sparsity are twice as
high), bfloat16 with float32 accumulation, float64 without tensor cores. They were compared with reprints of these
documents: NVIDIA's own site could not be reached. What a kernel reaches of a peak is ASSUMED for every card: nothing
here was measured.
"""

from functools import cache
from types import FunctionType
from typing import NamedTuple, cast
from unittest.mock import patch

import torch

from ..errors import StageError

FUSED_ROWS = 1536  # bitsandbytes' fused 4-bit matmul takes no more rows on any card
LAUNCH = 2.0e-6  # seconds that the smallest kernel takes, back to back (ASSUMED)
BANDWIDTH = 0.82  # share of the memory bandwidth that a streaming kernel reaches (ASSUMED)
SCALAR = 0.65  # share of the float32 and float64 peaks (ASSUMED)


class Card(NamedTuple):
    """One card."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes per second
    bf16: float  # FLOP per second
    f32: float
    f64: float
    matmul: float  # share of the bfloat16 peak that a large matmul reaches (ASSUMED)
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors


CARDS = {
    card.name: card
    for card in (
        # "NVIDIA H200 Tensor Core GPU" and "NVIDIA H100 Tensor Core GPU", data sheets, columns SXM
        Card("h200", 141 * 10**9, 4.8e12, 989e12, 67e12, 34e12, 0.62, (9, 0), 132),
        Card("h100", 80 * 10**9, 3.35e12, 989e12, 67e12, 34e12, 0.62, (9, 0), 132),
        # "NVIDIA A100 Tensor Core GPU" (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), SXM; 40 GB: 2020
        Card("a100", 80 * 10**9, 2.039e12, 312e12, 19.5e12, 9.7e12, 0.75, (8, 0), 108),
        Card("a100-40gb", 40 * 10**9, 1.555e12, 312e12, 19.5e12, 9.7e12, 0.75, (8, 0), 108),
        # "NVIDIA L40S" data sheet
        Card("l40s", 48 * 10**9, 0.864e12, 362e12, 91.6e12, 1.43e12, 0.75, (8, 9), 142),
        # "NVIDIA Ampere GA102 GPU Architecture" V2.0, appendix C (RTX A6000) and appendix A (RTX 3090, last line)
        Card("a6000", 48 * 10**9, 0.768e12, 154.8e12, 38.7e12, 0.6e12, 0.75, (8, 6), 84),
        # "NVIDIA Ada GPU Architecture" V2, appendix A
        Card("4090", 24 * 10**9, 1.008e12, 165.2e12, 82.6e12, 1.29e12, 0.85, (8, 9), 128),
        Card("3090", 24 * 10**9, 0.936e12, 71e12, 35.6e12, 0.56e12, 0.85, (8, 6), 82),
    )
}


def card_of(name: str) -> Card:
    """Raises StageError for a card that is not in the table."""
    if name.lower() not in CARDS:
        raise StageError(f"`--gpu {name}`: the table has no such card. It has {', '.join(CARDS)}.")
    return CARDS[name.lower()]


def seconds(card: Card, moved: int, flops: int, itemsize: int) -> float:
    """The roofline of one kernel: its bytes, its arithmetic (at elements of `itemsize` bytes) or its launch."""
    peak = {2: card.bf16 * card.matmul, 8: card.f64 * SCALAR}.get(itemsize, card.f32 * SCALAR)
    return max(moved / (card.bandwidth * BANDWIDTH), flops / peak, LAUNCH)


@cache
def fuses(card: Card, rows: int, out: int, inner: int) -> bool:
    """Whether bitsandbytes multiplies so many rows by a 4-bit weight (out, inner) in one kernel, or makes the weight
    dense first. Its own table is asked. Raises StageError for a bitsandbytes that has none."""
    choice = bitsandbytes_choice()
    properties = (card.processors, *card.capability)
    with patch.dict(choice.__globals__, _gpu_dispatch_props=lambda _: properties):
        return rows <= FUSED_ROWS and bool(choice(0, torch.bfloat16, rows, out, inner))


@cache
def bitsandbytes_choice() -> FunctionType:
    """(device, dtype, rows, out, inner) -> fused or not. The module is imported as if torch had CUDA."""
    try:
        with patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True):
            from bitsandbytes.backends.cuda import ops
        # without its cache, which knows one card only
        return cast(FunctionType, ops._gemm_4bit_use_custom_cuda.__wrapped__)
    except (ImportError, AttributeError) as error:
        raise StageError(
            f"This bitsandbytes does not say which 4-bit matmuls it fuses ({error}). Install bitsandbytes 0.50."
        ) from error
