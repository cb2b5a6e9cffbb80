"""The losses of SFT, reward modelling and PPO, and the statistics that go with them.

All are pure functions of log-probs, values or scores; log-probs are in nats. `docs/change_the_loss.md` shows how to
change one.

The policy's losses are weighted sums over tokens. The weights are made for a whole minibatch (`token_weights`), so a
minibatch cut into micro-batches gives the same loss by addition. A weight of 0 takes a token out: at pads, and at
tokens that the policy did not sample. Whatever such a token holds, NaN and infinity included, reaches neither a loss
nor a gradient.

Departure from the release: it averages over all positions, pads included, which dilutes the policy gradient about
sevenfold.

Shapes: B answers (or pairs), T answer positions, N tokens; `mask_BT` is True at real tokens.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["clip", "gspo", "cispo"]
Mean = Literal["token", "sequence", "constant"]


class PairwiseStats(NamedTuple):
    """What a batch of preference pairs shows of the reward model; each is a scalar."""

    accuracy: Tensor  # share of pairs whose chosen answer scores higher; equal scores count as wrong
    margin: Tensor  # mean of chosen - rejected
    score: Tensor  # mean of all scores, which the centring term holds near 0


class PolicyStats(NamedTuple):
    "Sums over the tokens that count (weight above 0), and extremes; `merge_stats` makes means of them."

    tokens: Tensor  # number of tokens that count
    clipfrac: Tensor  # tokens at which the clip changes the loss (TRL's policy/clipfrac_avg)
    approxkl: Tensor  # 0.5 * (logp - old_logp)^2 (TRL's policy/approxkl_avg)
    ratio: Tensor  # exp(logp - old_logp); exactly 1 before the first update
    ratio_min: Tensor  # +inf when no token counts
    ratio_max: Tensor  # -inf when no token counts


class ValueStats(NamedTuple):
    "A sum over real tokens divided by `denominator`: over micro-batches, add."

    clipfrac: Tensor  # share of tokens at which the clipped term is the active one


def pairwise_loss(
    chosen_B: Tensor, rejected_B: Tensor, centering: float, centre: float | None = None
) -> tuple[Tensor, PairwiseStats]:
    """Mean of -log sigmoid(chosen - rejected), plus `centering` * |mean(chosen + rejected)|.

    Source: Bradley-Terry; the centring term is VLM-RLAIF's and LLaVA-RLHF's (1e-3).
    The centring term is not a sum over pairs. For a batch that is cut into micro-batches, `centre` is the mean of
    chosen + rejected over the whole batch: its sign is what each micro-batch's gradient needs.
    """
    mean = (chosen_B + rejected_B).mean()
    centred = mean.abs() if centre is None else mean * ((centre > 0) - (centre < 0))
    loss = F.softplus(rejected_B - chosen_B).mean() + centering * centred
    with torch.no_grad():
        stats = PairwiseStats(
            accuracy=(chosen_B > rejected_B).float().mean(),
            margin=(chosen_B - rejected_B).mean(),
            score=(chosen_B + rejected_B).mean() / 2,
        )
    return loss, stats


def sft_loss(logp_N: Tensor, weight_N: Tensor, total: float | Tensor) -> Tensor:
    """Cross-entropy of the target tokens: -sum(weight * logp) / total, `total` the weights of the whole batch."""
    return -(weight_N * logp_N).sum() / total


def token_weights(mask_BT: Tensor, mean: Mean = "token", max_tokens: int | None = None) -> Tensor:
    """What each token of a minibatch weighs in the policy's loss; `mask_BT` is True at tokens that count.

    token: all alike (DAPO, arXiv 2503.14476). sequence: answers alike, and the tokens within each (GRPO, 2402.03300).
    constant: all tokens 1 / (B * max_tokens), however many there are (Dr. GRPO, 2503.20783). The first two add up to 1.
    """
    if mean == "constant":
        return mask_BT / (mask_BT.shape[0] * max_tokens)
    if mean == "sequence":
        length_B1 = mask_BT.sum(1, keepdim=True)
        return mask_BT / length_B1.clamp(min=1) / (length_B1 > 0).sum().clamp(min=1)
    return mask_BT / mask_BT.sum().clamp(min=1)


def weighted_sum(x_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """sum(weight * x), a scalar. What x holds where the weight is 0 reaches neither the sum nor its gradient."""
    return (weight_BT * x_BT.where(weight_BT > 0, 0.0)).sum()


def policy_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantage_BT: Tensor,
    weight_BT: Tensor,
    clip: float,
    *,
    kind: Kind = "clip",
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """The policy's loss: a weighted sum over tokens, and its statistics. Gradient flows to `logp_BT` alone.

    clip: PPO's objective on the ratio of each token (`clipped_loss`). gspo: the same on the ratio of the whole answer
    (`answer_log_ratio`). cispo: `cispo_loss`. `clip_high` is the upper range of the ratio, None for that of `clip`.
    Log ratios are held within +-80, so a ratio is finite in float32.
    """
    clip_high, counts_BT = clip if clip_high is None else clip_high, weight_BT > 0
    logp_BT, advantage_BT = logp_BT.where(counts_BT, 0.0), advantage_BT.detach().where(counts_BT, 0.0)
    log_ratio_BT = (logp_BT - old_logp_BT.detach().where(counts_BT, 0.0)).clamp(-80.0, 80.0)
    used_BT = answer_log_ratio(log_ratio_BT, counts_BT) if kind == "gspo" else log_ratio_BT
    ratio_BT = used_BT.exp()
    if kind == "cispo":
        loss_BT, clipped_BT = cispo_loss(logp_BT, ratio_BT, advantage_BT, clip_high), ratio_BT > 1.0 + clip_high
    else:
        loss_BT = clipped_loss(ratio_BT, advantage_BT, clip, clip_high, dual_clip)
        clipped_BT = loss_BT != -advantage_BT * ratio_BT
    with torch.no_grad():
        stats = PolicyStats(
            tokens=counts_BT.sum(),
            clipfrac=(clipped_BT & counts_BT).float().sum(),
            approxkl=0.5 * log_ratio_BT.square().sum(),
            ratio=ratio_BT.where(counts_BT, 0.0).sum(),
            ratio_min=ratio_BT.where(counts_BT, torch.inf).amin(),
            ratio_max=ratio_BT.where(counts_BT, -torch.inf).amax(),
        )
    return weighted_sum(loss_BT, weight_BT), stats


def clipped_loss(
    ratio_BT: Tensor, advantage_BT: Tensor, clip: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Per token: max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip_high)): PPO (arXiv 1707.06347, eq. 7), and with a
    higher `clip_high` DAPO (2503.14476, eq. 8). Beyond the clip a token has no gradient, so the policy gains nothing by
    moving further. `dual_clip` c bounds what one bad token can cost: at most -A * c where A < 0 (1912.09729, eq. 5)."""
    free_BT = -advantage_BT * ratio_BT
    loss_BT = torch.maximum(free_BT, -advantage_BT * ratio_BT.clamp(1.0 - clip, 1.0 + clip_high))
    if dual_clip is not None:
        loss_BT = torch.where(advantage_BT < 0, torch.minimum(loss_BT, -advantage_BT * dual_clip), loss_BT)
    return loss_BT


def cispo_loss(logp_BT: Tensor, ratio_BT: Tensor, advantage_BT: Tensor, clip_high: float) -> Tensor:
    """Per token: -A * min(ratio, 1 + clip_high) * logp, the ratio without gradient (CISPO, arXiv 2506.13585, eq. 4).
    The clip bounds how much a token counts, and no token loses its gradient."""
    return -advantage_BT * ratio_BT.detach().clamp(max=1.0 + clip_high) * logp_BT


def answer_log_ratio(log_ratio_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """The mean log ratio of an answer's tokens, at each of them; its exp is GSPO's ratio (arXiv 2507.18071, eq. 7)."""
    mean_B1 = log_ratio_BT.sum(1, keepdim=True) / counts_BT.sum(1, keepdim=True).clamp(min=1)
    return mean_B1 * counts_BT


def merge_stats(parts: Sequence[PolicyStats]) -> dict[str, Tensor]:
    """Means and extremes over a minibatch, from the statistics of its micro-batches; ratios of 1 where no token
    counts."""
    tokens = sum(part.tokens for part in parts)
    means = {
        name: sum(getattr(part, name) for part in parts) / tokens.clamp(min=1) for name in ("clipfrac", "approxkl")
    }
    ratios = {
        "ratio": sum(part.ratio for part in parts) / tokens,
        "ratio_min": torch.stack([part.ratio_min for part in parts]).min(),
        "ratio_max": torch.stack([part.ratio_max for part in parts]).max(),
    }
    return means | {name: ratio.where(tokens > 0, 1.0) for name, ratio in ratios.items()}


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
