"""Rates of GPUs, for a roofline.

Peaks are those of NVIDIA's documents, named at each card: dense (their headline figures with sparsity are twice as
high), bfloat16 with float32 accumulation, float64 without tensor cores. They were compared with reprints of these
documents: NVIDIA's own site could not be reached. What a kernel reaches of a peak is ASSUMED for every card: nothing
here was measured.
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
        # "NVIDIA H200 Tensor Core GPU" and "NVIDIA H100 Tensor Core GPU", data sheets, columns SXM
        Card("h200", 141 * 10**9, 4.8e12, 989e12, 67e12, 34e12, 0.62, (9, 0)),
        Card("h100", 80 * 10**9, 3.35e12, 989e12, 67e12, 34e12, 0.62, (9, 0)),
        # "NVIDIA A100 Tensor Core GPU" (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), SXM; 40 GB: 2020
        Card("a100", 80 * 10**9, 2.039e12, 312e12, 19.5e12, 9.7e12, 0.75, (8, 0)),
        Card("a100-40gb", 40 * 10**9, 1.555e12, 312e12, 19.5e12, 9.7e12, 0.75, (8, 0)),
        # "NVIDIA L40S" data sheet
        Card("l40s", 48 * 10**9, 0.864e12, 362e12, 91.6e12, 1.43e12, 0.75, (8, 9)),
        # "NVIDIA Ampere GA102 GPU Architecture" V2.0, appendix C (RTX A6000) and appendix A (RTX 3090, last line)
        Card("a6000", 48 * 10**9, 0.768e12, 154.8e12, 38.7e12, 0.6e12, 0.75, (8, 6)),
        # "NVIDIA Ada GPU Architecture" V2, appendix A
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
