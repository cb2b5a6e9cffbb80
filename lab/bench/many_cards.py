"""The derived tables of docs/many_cards.md: seconds of the all-reduces, and what waits for the longest answer.

    python -m lab.bench.many_cards

Nothing here was measured. A LLaMA-shaped 7B has 32 layers of four 4096 x 4096 and three 4096 x 11008 matrices, all with
adapters. An update is `TOKENS` tokens on every card.
"""

from math import exp

from rlaif_lite.dryrun.cards import CARDS
from rlaif_lite.formats import markdown_table
from rlaif_lite.planner.memory import ADAPTER
from rlaif_lite.planner.several import LINKS, all_reduce_seconds

CARD_COUNTS = (8, 64, 512)
COLUMNS = [f"{count} cards" for count in CARD_COUNTS]
RANKS = (16, 64)  # of the adapters
LAYERS, WIDTH, INNER = 32, 4096, 11008
LINEAR = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
TOKENS = 8000  # of an update, on each card
CAP = 4.0  # longest answer, in mean lengths


def adapter_bytes(rank: int) -> int:
    """Of one adapter's gradients, float32: rank x (in + out) numbers for each matrix."""
    return ADAPTER * LAYERS * rank * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))


def update_seconds() -> float:
    """Forward and backward of an update on an A100: 2 operations per token and weight each, as the base is frozen."""
    card = CARDS["a100"]
    return (2 + 2) * LINEAR * TOKENS / (card.matmul * card.bf16)


def longest(count: int, cap: float = CAP) -> float:
    """The expected longest of `count` answers whose lengths are exponential with mean 1 and cut at `cap`: the sum of
    q^k / k for k = 1 ... count, q = 1 - exp(-cap)."""
    q = 1 - exp(-cap)
    return sum(q**k / k for k in range(1, count + 1))


def exchange_table() -> str:
    """Milliseconds of one all-reduce, and its share of an update."""
    rows = []
    for rank in RANKS:
        size = adapter_bytes(rank)
        for link in LINKS.values():
            times = [all_reduce_seconds(size, count, link) for count in CARD_COUNTS]
            cells = [f"{1e3 * t:.1f} ms ({t / (t + update_seconds()):.1%})" for t in times]
            rows.append((f"rank {rank}, {size / 1e6:.0f} MB", link.name, *cells))
    return markdown_table(("adapters", "link", *COLUMNS), rows)


def straggler_table() -> str:
    """Share of sampling that the mean card waits."""
    rows = [
        (f"{answers}", *(f"{1 - longest(answers) / longest(answers * count):.0%}" for count in CARD_COUNTS))
        for answers in (1, 8, 64)
    ]
    return markdown_table(("answers on each card", *COLUMNS), rows)


if __name__ == "__main__":
    print(exchange_table(), straggler_table(), f"update: {update_seconds():.2f} s", sep="\n\n")
