"""Rates of GPUs, for a roofline.

Peaks are meant to be those of NVIDIA's data sheets and white papers: dense, bfloat16 with float32 accumulation, float64
without tensor cores. They were noted without the sheets at hand. What a kernel reaches of them is ASSUMED for every
card: nothing here was measured.
"""

from typing import NamedTuple

from ..errors import StageError

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


CARDS = {
    card.name: card
    for card in (
        # H200 and H100 SXM data sheets
        Card("h200", 141 * 10**9, 4.8e12, 989e12, 67e12, 34e12, 0.62, (9, 0)),
        Card("h100", 80 * 10**9, 3.35e12, 989e12, 67e12, 34e12, 0.62, (9, 0)),
        # A100 data sheet, SXM 80 GB and 40 GB
        Card("a100", 80 * 10**9, 2.039e12, 312e12, 19.5e12, 9.7e12, 0.75, (8, 0)),
        Card("a100-40gb", 40 * 10**9, 1.555e12, 312e12, 19.5e12, 9.7e12, 0.75, (8, 0)),
        # L40S and RTX A6000 data sheets; RTX 4090: Ada white paper; RTX 3090: GA102 white paper
        Card("l40s", 48 * 10**9, 0.864e12, 362e12, 91.6e12, 1.43e12, 0.75, (8, 9)),
        Card("a6000", 48 * 10**9, 0.768e12, 154.8e12, 38.7e12, 0.6e12, 0.75, (8, 6)),
        Card("4090", 24 * 10**9, 1.008e12, 165.2e12, 82.6e12, 1.29e12, 0.85, (8, 9)),
        Card("3090", 24 * 10**9, 0.936e12, 71e12, 35.6e12, 0.56e12, 0.85, (8, 6)),
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
