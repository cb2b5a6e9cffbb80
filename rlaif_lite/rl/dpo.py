"""Direct preference optimisation as pure functions: its losses, RRPO's spans, RLAIF-V's choice of pairs, its balancing
of lengths.

An answer's implicit reward is beta * log(pi / pi_ref), summed over its tokens (Rafailov et al., arXiv 2305.18290), or
averaged over them, which is also what ranks samples at inference (RLAIF-V, arXiv 2405.17220, self-feedback).
"""

import random
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]  # start, end
RATIOS = [step / 50 for step in range(50)]  # 0, .02, ... .98, as released


class Scored(NamedTuple):
    """Chosen and rejected answers under one model, B pairs."""

    chosen_B: Tensor  # log-prob of the chosen answer, summed over its tokens, or over those in RRPO's spans
    rejected_B: Tensor  # and of the rejected one


class DpoStats(NamedTuple):
    "Means over the pairs; over micro-batches of unequal size, weigh by their share."

    accuracy: Tensor  # share of pairs whose chosen answer has the higher implicit reward; equal ones count as wrong
    margin: Tensor  # implicit reward of the chosen - of the rejected answer
    chosen: Tensor  # implicit reward of the chosen answer: negative = it became less likely, too
    nll: Tensor  # -log-prob per token of the chosen answer
    kl: Tensor  # KL(reference || policy) over the tokens of the chosen answer, nats; 0 where it is not computed


class Pair(NamedTuple):
    """Two answers of one prompt, by number."""

    chosen: int
    rejected: int
    margin: float


def implicit_reward(logp_B: Tensor, ref_logp_B: Tensor, length_B: Tensor, beta: float, normalised: bool) -> Tensor:
    """beta * (logp - ref_logp) of whole answers, divided by their lengths in tokens (EOS included) when normalised."""
    reward_B = beta * (logp_B - ref_logp_B)
    return reward_B / length_B if normalised else reward_B


def dpo_loss(
    policy: Scored,
    reference: Scored,
    lengths: Scored,
    *,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    normalised: bool = False,
    sft_weight: float = 0.0,
    kl_weight: float = 0.0,
    nll_B: Tensor | None = None,
    kl_B: Tensor | None = None,
) -> tuple[Tensor, DpoStats]:
    """Mean over pairs of the preference loss, plus `sft_weight` times the chosen answer's negative log-prob per token
    (`nll_B`; None: from `policy` and `lengths`, which then are of whole answers), plus `kl_weight` times `kl_B`.

    With h = log-ratio of the chosen - of the rejected answer: sigmoid is softplus(-beta h), IPO is (h - 1 / (2 beta))^2
    (Azar et al., arXiv 2310.12036, equation 17). `normalised` divides each answer's log-ratio by its length first.
    Gradient flows to `policy`, `nll_B` and `kl_B`.

    RRPO (arXiv 2504.12083) is `sigmoid` on sums over the spans in which the answers differ (`changed_spans`), with
    `kl_B` the exact KL(reference || policy), summed over the tokens of the whole chosen answer.

    Departure: RLAIF-V's and LLaVA-Hound's SFT term is a sum over tokens or a batch's token mean; per answer's token
    here, so that a long answer weighs no more than a short one."""
    chosen_B, rejected_B = (
        implicit_reward(logp_B, ref_logp_B.detach(), length_B, beta, normalised)
        for logp_B, ref_logp_B, length_B in zip(policy, reference, lengths, strict=True)
    )
    margin_B = chosen_B - rejected_B
    if kind == "sigmoid":
        loss_B = F.softplus(-margin_B)
    elif kind == "ipo":
        loss_B = (margin_B / beta - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"the DPO loss is {kind!r}; known are 'sigmoid' and 'ipo'")
    nll_B = -policy.chosen_B / lengths.chosen_B if nll_B is None else nll_B
    kl_B = torch.zeros_like(nll_B) if kl_B is None else kl_B
    with torch.no_grad():
        stats = DpoStats((margin_B > 0).float().mean(), margin_B.mean(), chosen_B.mean(), nll_B.mean(), kl_B.mean())
    return (loss_B + sft_weight * nll_B + kl_weight * kl_B).mean(), stats


def changed_spans(chosen: Sequence[Hashable], rejected: Sequence[Hashable]) -> tuple[list[Span], list[Span]]:
    """Where two sequences differ, as (start, end) in each: what is left of them once the longest common parts, in
    order, are taken out. RRPO's phrases: in its data a phrase of the chosen answer was replaced by a wrong one."""
    blocks = SequenceMatcher(None, chosen, rejected, autojunk=False).get_opcodes()
    changed = [block for block in blocks if block[0] != "equal"]
    own = [(start, end) for _, start, end, _, _ in changed if start < end]
    return own, [(start, end) for *_, start, end in changed if start < end]


def pairs_by_score(scores: Sequence[float], least: float) -> list[Pair]:
    """Every two answers of a prompt whose scores differ by more than `least`, the higher one chosen.

    Scores that count rejected claims are whole numbers, so least = 0 asks for one claim (RLAIF-V)."""
    order = range(len(scores))
    return [Pair(i, j, scores[i] - scores[j]) for i in order for j in order if scores[i] - scores[j] > least]


def draw_pairs(pairs: Sequence[Pair], most: int, seed: int) -> list[Pair]:
    """At most `most` of a prompt's pairs, drawn without replacement, in their order (RLAIF-V: 2)."""
    kept = random.Random(seed).sample(range(len(pairs)), min(most, len(pairs)))
    return [pairs[i] for i in sorted(kept)]


def balance_lengths(lengths: Sequence[tuple[int, int]]) -> tuple[float, list[bool]]:
    """RLAIF-V's counterweight to "shorter has fewer mistakes" -> (ratio, which pairs stay).

    `lengths`: (chosen, rejected) in words. For every ratio in 0, .02, ... .98 the pairs with (rejected - chosen) /
    rejected > ratio are dropped; the ratio that leaves |mean chosen - mean rejected| / mean rejected least is taken,
    the lowest where several do. A ratio that leaves nothing is not considered; where all do, nothing stays.

    An empty rejected answer is never longer than its chosen one: such a pair stays."""
    best = (float("inf"), RATIOS[-1], [False] * len(lengths))
    for ratio in RATIOS:
        stay = [rejected - chosen <= ratio * rejected for chosen, rejected in lengths]
        kept = [pair for pair, stays in zip(lengths, stay, strict=True) if stays]
        if kept:
            chosen, rejected = (sum(column) for column in zip(*kept, strict=True))
            best = min(best, (abs(chosen - rejected) / max(rejected, 1), ratio, stay), key=lambda found: found[:2])
    return best[1], best[2]
