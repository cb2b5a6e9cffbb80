"""Token-separable losses through a frozen head: loss, gradient and statistics from the same two matmuls.

The derivative of such a loss by a row's log-prob, entropy and KL is known as soon as the row's statistics are, so it is
taken up in the row pass itself, and the entropy bonus and the exact-KL penalty cost no further matmul (the KL costs
that of the reference's logits).

Losses and means are SUMS over real tokens divided by `denominator`. Give it the number of real tokens of the whole
minibatch and the losses, gradients and means of its micro-batches simply add up.

Departures: approxkl is Schulman's (ratio - 1) - log ratio, as in cleanrl and TRL, where the release halves the squared
log ratio; log ratios are held within +-80, so that a ratio is finite in float32.

Shapes: N tokens (rows), D channels, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, need, need_tensor, use_triton
from .head import PpoInputs, capped_exp
from .linear_logprob import checked_head, checked_reference, checked_target
from .rows import run_rows


class SftStats(NamedTuple):
    """Scalars on the device, no gradient; nothing here waits for it."""

    nll: Tensor  # weighted negative log-likelihood / denominator: the loss itself
    entropy: Tensor  # weighted entropy / denominator
    tokens: Tensor  # number of rows that are not ignored


class PpoStats(NamedTuple):
    """Scalars on the device, no gradient; means are sums over real tokens / denominator."""

    policy_loss: Tensor  # the clipped objective alone
    approxkl: Tensor  # mean of (ratio - 1) - log ratio: how far this update has moved from the sampling policy
    clipfrac: Tensor  # share of tokens whose ratio left [1 - clip, 1 + clip]
    entropy: Tensor  # mean entropy of the policy, nats
    ratio_mean: Tensor
    ratio_min: Tensor  # over real tokens; +inf when there is none
    ratio_max: Tensor  # over real tokens; -inf when there is none
    kl: Tensor  # mean penalty to the reference, before kl_coef: k3, exact, or 0 for kl="none"
    tokens: Tensor  # number of real tokens


class _WithGradient(torch.autograd.Function):
    """A loss, and the gradient of `loss * denominator` that was computed along with it."""

    @staticmethod
    def forward(ctx, hidden_ND, loss, grad_ND, denominator):
        ctx.save_for_backward(grad_ND)
        ctx.denominator = denominator
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (grad_ND,) = ctx.saved_tensors
        return torch.mul(grad_ND, upstream / ctx.denominator, out=torch.empty_like(grad_ND)), None, None, None


def sft_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, SftStats]:
    """Cross-entropy sum_i w_i (-log p(target_i)) / denominator, a scalar, and its statistics.

    `weight_N` defaults to 1 on every row that is not ignored, `denominator` to the sum of the weights of those rows
    (1 if there is none). Head arguments and errors are those of `linear_logprob`.
    """
    head = checked_head(hidden_ND, weight_VD, bias_V, temperature, softcap, chunk_rows)
    target_N, valid_N = checked_target(target_N, hidden_ND, weight_VD, ignore_index)
    if weight_N is None:
        weight_N = valid_N
    need_tensor("weight_N", weight_N, tuple(target_N.shape), hidden_ND, (torch.bool, torch.int64, *FLOATS))
    want_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    with torch.no_grad():
        weight_N = weight_N.to(torch.promote_types(hidden_ND.dtype, torch.float32)).where(valid_N, 0.0)
        rows = run_rows(
            hidden_ND,
            head,
            target_N,
            valid_N,
            want_grad=want_grad,
            gain_N=-weight_N,
            triton=use_triton(impl, hidden_ND),
            chunk_rows=chunk_rows,
        )
        if denominator is None:
            total = weight_N.sum()
            denominator = total.where(total != 0, 1.0)
        nll = -(weight_N * rows.logp_N).sum() / denominator
        stats = SftStats(nll, (weight_N * rows.entropy_N).sum() / denominator, valid_N.sum())
    return (_WithGradient.apply(hidden_ND, nll, rows.grad_ND, denominator) if want_grad else nll), stats


def ppo_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    mask_N: Tensor,
    *,
    clip: float,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl: str = "none",
    reference_logp_N: Tensor | None = None,
    reference_hidden_ND: Tensor | None = None,
    denominator: float | Tensor | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, PpoStats]:
    """PPO's clipped policy loss (Schulman et al. 2017, eq. 7 and 9), entropy bonus and KL penalty, with statistics.

    Per real token, with ratio = exp(logp - old_logp):
        max(-A ratio, -A clamp(ratio, 1-clip, 1+clip)) - entropy_coef * H + kl_coef * KL
    KL is 0 for kl="none"; exp(d) - d - 1, d = reference_logp - logp, for kl="k3"; the sum over the whole vocabulary for
    kl="exact", which needs the reference's hidden states (final norm applied, same head). Summed over the rows where
    `mask_N` is 1 and the target is not ignored, divided by `denominator` (default: the number of those rows, or 1).
    What masked rows hold in old_logp, advantage and reference_logp reaches nothing.

    Head arguments and errors are those of `linear_logprob`; also ValueError for a `kl` without the reference it needs.
    """
    head = checked_head(hidden_ND, weight_VD, bias_V, temperature, softcap, chunk_rows)
    target_N, valid_N = checked_target(target_N, hidden_ND, weight_VD, ignore_index)
    for name, value in (("old_logp_N", old_logp_N), ("advantage_N", advantage_N)):
        need_tensor(name, value, tuple(target_N.shape), hidden_ND, FLOATS)
    need_tensor("mask_N", mask_N, tuple(target_N.shape), hidden_ND, (torch.bool, torch.int64, *FLOATS))
    need(clip > 0, "clip", clip, "a number above 0")
    need(kl in ("none", "k3", "exact"), "kl", kl, '"none", "k3" or "exact"')
    if kl == "k3":
        need(
            reference_logp_N is not None,
            "reference_logp_N",
            reference_logp_N,
            'the reference\'s log-probs of the targets, for kl="k3"',
        )
        need_tensor("reference_logp_N", reference_logp_N, tuple(target_N.shape), hidden_ND, FLOATS)
    if kl == "exact":
        expected = 'the reference\'s hidden states for the same rows, for kl="exact"'
        need(reference_hidden_ND is not None, "reference_hidden_ND", reference_hidden_ND, expected)
    want_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    with torch.no_grad():
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        real_N = valid_N & (mask_N > 0)
        inputs = PpoInputs(
            *(value.detach().to(dtype).where(real_N, 0.0) for value in (old_logp_N, advantage_N)),
            real_N.to(dtype),
            reference_logp_N.detach().to(dtype).where(real_N, 0.0) if kl == "k3" else None,
            clip=float(clip),
            entropy_coef=float(entropy_coef),
            k3_coef=float(kl_coef) if kl == "k3" else 0.0,
            kl_coef=float(kl_coef) if kl == "exact" else 0.0,
        )
        rows = run_rows(
            hidden_ND,
            head,
            target_N,
            real_N,
            reference_hidden_ND=checked_reference(reference_hidden_ND, hidden_ND) if kl == "exact" else None,
            want_grad=want_grad,
            ppo=inputs,
            triton=use_triton(impl, hidden_ND),
            chunk_rows=chunk_rows,
        )
        tokens = real_N.sum()
        if denominator is None:
            denominator = tokens.clamp(min=1)
        stats = _ppo_stats(rows.logp_N, rows.entropy_N, rows.kl_N, inputs, real_N, tokens, denominator)
        loss = stats.policy_loss - entropy_coef * stats.entropy + kl_coef * stats.kl
    return (_WithGradient.apply(hidden_ND, loss, rows.grad_ND, denominator) if want_grad else loss), stats


def _ppo_stats(
    logp_N: Tensor,
    entropy_N: Tensor,
    kl_N: Tensor | None,
    inputs: PpoInputs,
    real_N: Tensor,
    tokens: Tensor,
    denominator: float | Tensor,
) -> PpoStats:
    """Masked rows have logp = old_logp = advantage = 0, so their terms vanish of themselves or through the mask."""
    log_ratio_N = logp_N - inputs.old_logp_N
    ratio_N = capped_exp(log_ratio_N)
    advantage_N = inputs.advantage_N
    clipped_N = ratio_N.clamp(1 - inputs.clip, 1 + inputs.clip)
    policy_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * clipped_N)
    if kl_N is None:
        kl_N = torch.zeros_like(logp_N)
        if inputs.reference_logp_N is not None:
            gap_N = inputs.reference_logp_N - logp_N
            kl_N = capped_exp(gap_N) - gap_N - 1
    mean = lambda x_N: (x_N * inputs.mask_N).sum() / denominator
    # one element of padding, so that an empty batch has an extreme as well
    extreme = lambda fill: F.pad(ratio_N.where(real_N, fill), (0, 1), value=fill)
    return PpoStats(
        policy_loss=mean(policy_N),
        approxkl=mean(ratio_N - 1 - log_ratio_N),
        clipfrac=mean(((ratio_N - 1).abs() > inputs.clip).to(ratio_N.dtype)),
        entropy=mean(entropy_N),
        ratio_mean=mean(ratio_N),
        ratio_min=extreme(torch.inf).amin(),
        ratio_max=extreme(-torch.inf).amax(),
        kl=mean(kl_N),
        tokens=tokens,
    )
