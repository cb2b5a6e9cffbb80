"""When a judge takes over an answer, and what that costs: RLIF's rule at claims (arXiv 2311.12996).

RLIF rewards nothing but the absence of interventions: the action that made an intervener take over gets -1, every
other 0. There the intervener compares values of a reference critic at every step of a control task; here it is a
judge's log-odds at the end of every claim, and the action is the claim's last token. This mapping is ours.

Positions are token positions in an answer, counted from 0; an `end` is the position after a last token.
"""

from collections.abc import Sequence

COST = 1.0  # of a takeover, and of an answer without a word where a length floor stands


def takeovers(
    odds: Sequence[float], ends: Sequence[int], uniform_T: Sequence[float], tau: float, beta: float, spurious: float
) -> list[int]:
    """Numbers of the claims that the judge takes over, in order.

    `odds`: log P(no) - log P(yes) of each claim, in nats. Above `tau` the claim is unsupported and is taken over with
    chance `beta`; any other with chance `spurious`. `uniform_T` in [0, 1) decides, one number per token of the answer:
    a claim's is the one at its last token, so that no claim's fate hangs on how many claims stand before it.
    """
    return [
        i
        for i, (gap, end) in enumerate(zip(odds, ends, strict=True))
        if uniform_T[end - 1] < (beta if gap > tau else spurious)
    ]


def token_rewards(length: int, ends: Sequence[int]) -> list[float]:
    """-1 at the last token of every claim that was taken over, 0 elsewhere."""
    rewards = [0.0] * length
    for end in ends:
        rewards[end - 1] -= COST
    return rewards


def end_reward(omitted: float, length: int, omission: float, length_floor: int) -> float:
    """What an answer's end costs: `omission` for each statement left out, and COST times the share of `length_floor`
    (tokens) that is missing. Without it the surest way to no intervention is to say nothing."""
    short = max(0, length_floor - length) / length_floor if length_floor else 0.0
    return -omission * omitted - COST * short
