"""The losses of reward modelling and PPO, and the numbers one watches beside them.

Token losses are token-means over REAL tokens. The mean's denominator is an argument, so that a batch cut into
micro-batches gives the same loss and the same statistics by addition; pass the real tokens of the whole batch.
Departure from the release: it averages over all positions, pads too, which dilutes the policy gradient about sevenfold.

Shapes: B answers (or pairs), T answer positions; `mask_BT` is True at real tokens. Whatever stands at pads, NaN and
infinity too, reaches neither a loss nor a gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairwiseStats(NamedTuple):
    accuracy: Tensor
    "share of pairs whose chosen answer scores higher; equal scores count as wrong"
    margin: Tensor
    "mean of chosen - rejected"
    score: Tensor
    "mean of all scores, which the centring term holds near 0"


class PolicyStats(NamedTuple):
    "Each field is a sum over real tokens divided by `denominator`: over micro-batches, add."

    clipfrac: Tensor
    "share of tokens at which the clipped term is the active one"
    approxkl: Tensor
    "0.5 * (logp - old_logp)^2, TRL's policy/approxkl_avg"
    ratio: Tensor
    "exp(logp - old_logp); exactly 1 before the first update"


class ValueStats(NamedTuple):
    "A sum over real tokens divided by `denominator`: over micro-batches, add."

    clipfrac: Tensor
    "share of tokens at which the clipped term is the active one"


def pairwise_loss(chosen_B: Tensor, rejected_B: Tensor, centering: float) -> tuple[Tensor, PairwiseStats]:
    """Mean of -log sigmoid(chosen - rejected), plus `centering` * |mean(chosen + rejected)|.

    Source: Bradley-Terry; the centring term is VLM-RLAIF's and LLaVA-RLHF's (1e-3).
    The centring term is not a sum over pairs: cut into micro-batches, it centres each of them.
    """
    loss = F.softplus(rejected_B - chosen_B).mean() + centering * (chosen_B + rejected_B).mean().abs()
    with torch.no_grad():
        stats = PairwiseStats(
            accuracy=(chosen_B > rejected_B).float().mean(),
            margin=(chosen_B - rejected_B).mean(),
            score=(chosen_B + rejected_B).mean() / 2,
        )
    return loss, stats


def policy_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, clip: float, denominator: float
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped objective, negated: max(-A * ratio, -A * clip(ratio, 1 - clip, 1 + clip)) (arXiv 1707.06347).

    Gradient flows to `logp_BT` alone. `denominator`: real tokens of the whole batch.
    """
    mask_BT = mask_BT.bool()
    zero = logp_BT.new_zeros(())
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT.detach(), zero)
    advantage_BT = torch.where(mask_BT, advantage_BT.detach(), zero)
    ratio_BT = log_ratio_BT.exp()
    free_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1.0 - clip, 1.0 + clip)
    loss = torch.maximum(free_BT, clipped_BT).sum() / denominator
    with torch.no_grad():
        stats = PolicyStats(
            clipfrac=(clipped_BT > free_BT).float().sum() / denominator,
            approxkl=0.5 * log_ratio_BT.square().sum() / denominator,
            ratio=torch.where(mask_BT, ratio_BT, zero).sum() / denominator,
        )
    return loss, stats


def value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, clip: float | None, denominator: float
) -> tuple[Tensor, ValueStats]:
    """0.5 * max((v - R)^2, (v' - R)^2), v' = v held within `clip` of the old value; without a clip 0.5 * (v - R)^2.

    As published (clip 0.2 there). Gradient flows to `value_BT` alone. `denominator`: real tokens of the whole batch.
    """
    mask_BT = mask_BT.bool()
    zero = value_BT.new_zeros(())
    value_BT = torch.where(mask_BT, value_BT, zero)
    return_BT = torch.where(mask_BT, return_BT.detach(), zero)
    error_BT = (value_BT - return_BT).square()
    if clip is None:
        return 0.5 * error_BT.sum() / denominator, ValueStats(clipfrac=zero)
    old_BT = torch.where(mask_BT, old_value_BT.detach(), zero)
    held_BT = old_BT + (value_BT - old_BT).clamp(-clip, clip)
    held_error_BT = (held_BT - return_BT).square()
    loss = 0.5 * torch.maximum(error_BT, held_error_BT).sum() / denominator
    return loss, ValueStats(clipfrac=(held_error_BT > error_BT).float().sum().detach() / denominator)


def explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(return - value) / Var(return) over real tokens: 1 perfect, 0 no better than a constant, negative worse.

    0 when all returns are equal: there is nothing to explain.
    """
    mask_BT = mask_BT.bool()
    return_N, value_N = return_BT[mask_BT].double(), value_BT[mask_BT].double()
    variance = return_N.var(correction=0).item()
    return 1.0 - (return_N - value_N).var(correction=0).item() / variance if variance > 0 else 0.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of an answer's n-grams that occurred before in it: 0 none repeated, near 1 a loop; 0 below n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
