"""Per-token log-probabilities of a frozen LM head, straight from the hidden states.

The head is frozen, so for row i the derivative d logp_i / d hidden_i is ONE vector u_i, whatever loss comes later: it
is made in the forward (logits, then dz @ W) and the backward only scales it. Two matmuls in all, where recomputing
kernels need three and kernels that cannot skip the head's own gradient need four. For lse, d lse / d hidden = W[y]
chain_y / T - u.

Entropy and exact KL have vectors of their own. `differentiable="all"` makes none in the forward: the backward knows the
derivatives of the loss by all three, recomputes the logits and makes one gradient of them. That is one matmul more (two
with a reference).

Shapes: N tokens (rows), D channels, V vocabulary.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .checks import FLOATS, need, need_tensor, use_triton
from .head import BANNED, Head, Upstream
from .rows import bound_of_dz, run_rows


class LinearLogprob(NamedTuple):
    """Float32 (float64 for float64 inputs), in nats; 0 on ignored rows. Gradients flow to the hidden states."""

    logp_N: Tensor  # log p(target); has a gradient
    lse_N: Tensor  # log sum exp of the logits (after bias, softcap, temperature); has one with differentiable="logp"
    entropy_N: Tensor  # of the whole distribution; has a gradient with differentiable="all"
    kl_N: Tensor | None  # exact KL over the vocabulary, with reference hidden states; likewise


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reference_hidden_ND: Tensor | None = None,
    kl: Literal["policy||reference", "reference||policy"] = "policy||reference",
    differentiable: Literal["logp", "all"] = "logp",
    impl: str = "auto",
    chunk_rows: int | None = None,
) -> LinearLogprob:
    """Log-prob, logsumexp, entropy and (given reference hidden states for the same head) exact KL of every row.

    z = softcap(hidden W^T + bias) / temperature. A bias of -1e30 (or -inf) bans an id, whatever the softcap. Logits
    are accumulated in float32 whatever the dtype, and exist for one chunk of rows at a time (`chunk_rows`; by default
    as many as fit a fixed budget of memory). With a hidden that requires grad, one float32 (N,D) tensor is kept for
    the backward. `differentiable="all"` gives entropy and KL a gradient as well, for one more matmul (two with a
    reference); it is for losses with an entropy bonus or an exact KL. `kl` says which of its two directions.

    Raises ValueError for a weight or bias that requires grad, a non-contiguous weight, mismatched shapes, dtypes or
    devices, and targets outside 0..V-1 other than `ignore_index`. On a GPU that last check would stall the stream:
    such a row is never read out of bounds and comes out as NaN instead.
    """
    head = checked_head(hidden_ND, weight_VD, bias_V, temperature, softcap, chunk_rows)
    target_N, valid_N = checked_target(target_N, hidden_ND, weight_VD, ignore_index)
    reference_hidden_ND = checked_reference(reference_hidden_ND, hidden_ND)
    need(differentiable in ("logp", "all"), "differentiable", differentiable, '"logp" or "all"')
    need(kl in ("policy||reference", "reference||policy"), "kl", kl, '"policy||reference" or "reference||policy"')
    function = _AllDifferentiable if differentiable == "all" else _LogprobDifferentiable
    reverse_kl = reference_hidden_ND is not None and kl == "reference||policy"
    options = {"triton": use_triton(impl, hidden_ND), "chunk_rows": chunk_rows, "reverse_kl": reverse_kl}
    want_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    return LinearLogprob(*function.apply(hidden_ND, head, target_N, valid_N, reference_hidden_ND, want_grad, options))


class _LogprobDifferentiable(torch.autograd.Function):
    """The gradient of logp is made in the forward."""

    @staticmethod
    def forward(ctx, hidden_ND, head, target_N, valid_N, reference_hidden_ND, want_grad, options):
        rows = run_rows(
            hidden_ND, head, target_N, valid_N, reference_hidden_ND=reference_hidden_ND, want_grad=want_grad, **options
        )
        ctx.temperature, ctx.dtype = head.temperature, hidden_ND.dtype
        ctx.set_materialize_grads(False)
        if want_grad:
            ctx.save_for_backward(rows.grad_ND, head.weight_VD, target_N, rows.at_target_N)
        ctx.mark_non_differentiable(*(stat for stat in (rows.entropy_N, rows.kl_N) if stat is not None))
        return rows.logp_N, rows.lse_N, rows.entropy_N, rows.kl_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp_N, g_lse_N, _g_entropy, _g_kl):
        unit_ND, weight_VD, target_N, at_target_N = ctx.saved_tensors
        grad_ND = torch.empty_like(unit_ND, dtype=ctx.dtype)
        if g_lse_N is None:
            if g_logp_N is None:
                return (None,) * 7
            torch.mul(unit_ND, g_logp_N[:, None] / ctx.temperature, out=grad_ND)
        else:
            g_N = -g_lse_N if g_logp_N is None else g_logp_N - g_lse_N
            g_y_N = g_lse_N * at_target_N / ctx.temperature
            grad_ND.copy_(unit_ND * (g_N[:, None] / ctx.temperature) + g_y_N[:, None] * weight_VD[target_N])
        return (grad_ND,) + (None,) * 6


class _AllDifferentiable(torch.autograd.Function):
    """The gradient of logp, entropy and KL together is made in the backward, from logits computed again."""

    @staticmethod
    def forward(ctx, hidden_ND, head, target_N, valid_N, reference_hidden_ND, want_grad, options):
        rows = run_rows(
            hidden_ND, head, target_N, valid_N, reference_hidden_ND=reference_hidden_ND, want_grad=False, **options
        )
        ctx.head, ctx.options = head, options
        ctx.save_for_backward(hidden_ND, target_N, valid_N, reference_hidden_ND, rows.entropy_N, rows.kl_N)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows.lse_N)
        return rows.logp_N, rows.lse_N, rows.entropy_N, rows.kl_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp_N, _g_lse, g_entropy_N, g_kl_N):
        hidden_ND, target_N, valid_N, reference_hidden_ND, entropy_N, kl_N = ctx.saved_tensors
        zero_N = torch.zeros_like(entropy_N)
        upstream = [zero_N if g_N is None else g_N.where(valid_N, 0.0) for g_N in (g_logp_N, g_entropy_N, g_kl_N)]
        bound_N = bound_of_dz(*upstream, entropy_N, kl_N, ctx.options["reverse_kl"])
        rows = run_rows(
            hidden_ND,
            ctx.head,
            target_N,
            valid_N,
            reference_hidden_ND=reference_hidden_ND,
            want_grad=True,
            upstream=Upstream(*(g_N / bound_N for g_N in upstream)),
            **ctx.options,
        )
        grad_ND = torch.empty_like(hidden_ND)
        torch.mul(rows.grad_ND, (bound_N / ctx.head.temperature)[:, None], out=grad_ND)
        return (grad_ND,) + (None,) * 6


def frozen_head(lm_head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight_VD, bias_V or None) of an output layer, for the functions of this package.

    Raises ValueError for a layer they would get wrong: one that carries a LoRA or a copy to be trained, one that is
    trained itself, one that is quantised.
    """
    kind = type(lm_head).__name__
    if hasattr(lm_head, "lora_A") or hasattr(lm_head, "modules_to_save"):
        raise ValueError(
            f"the output layer ({kind}) carries an adapter of its own, so its weight is not frozen; "
            "leave lm_head out of LoRA's target_modules and of modules_to_save, or merge the adapter first"
        )
    weight_VD, bias_V = lm_head.weight, lm_head.bias if hasattr(lm_head, "bias") else None
    if weight_VD.dtype not in FLOATS:
        raise ValueError(
            f"the output layer ({kind}) is quantised (weight {weight_VD.dtype}, shape {tuple(weight_VD.shape)}); "
            "load the model with lm_head in bfloat16 (transformers does so unless told otherwise) or dequantise it once"
        )
    _need_frozen("the output layer's weight", weight_VD)
    return weight_VD, bias_V


def _need_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} ({tuple(tensor.shape)}) requires grad, and no gradient would reach it: this head is taken as "
            "frozen. Call requires_grad_(False) on it, or pass .detach() if you mean to train everything but the head"
        )


def checked_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_rows: int | None,
) -> Head:
    """The head as `run_rows` wants it, or a ValueError."""
    need(
        isinstance(weight_VD, Tensor),
        "weight_VD",
        weight_VD,
        "the weight as a (V,D) tensor: weight_VD, bias_V = frozen_head(lm_head)",
    )
    need_tensor("hidden_ND", hidden_ND, (None, None), weight_VD, FLOATS)
    need_tensor("weight_VD", weight_VD, (None, hidden_ND.shape[1]), hidden_ND, (hidden_ND.dtype,))
    need(weight_VD.shape[0] > 0, "weight_VD", weight_VD, "a vocabulary of one id at least")
    _need_frozen("weight_VD", weight_VD)
    need(
        weight_VD.is_contiguous(),
        f"weight_VD with strides {weight_VD.stride()}",
        weight_VD,
        "a contiguous weight: this one would be copied at every call; call .contiguous() once",
    )
    if bias_V is not None:
        need_tensor("bias_V", bias_V, (weight_VD.shape[0],), hidden_ND, FLOATS)
        _need_frozen("bias_V", bias_V)
        bias_V = bias_V.to(torch.promote_types(hidden_ND.dtype, torch.float32)).clamp(min=BANNED)
    need(0 < temperature < math.inf, "temperature", temperature, "a number above 0")
    need(softcap is None or 0 < softcap < math.inf, "softcap", softcap, "None or a number above 0")
    need(chunk_rows is None or chunk_rows > 0, "chunk_rows", chunk_rows, "None or a number of rows above 0")
    return Head(weight_VD, bias_V, float(temperature), None if softcap is None else float(softcap))


def checked_target(target_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets with 0 in place of the ignore index, and which rows are not ignored; or a ValueError."""
    need_tensor("target_N", target_N, (hidden_ND.shape[0],), hidden_ND, (torch.int64, torch.int32))
    V = weight_VD.shape[0]
    valid_N = target_N != ignore_index
    target_N = target_N.long().where(valid_N, 0)
    if not target_N.is_cuda and target_N.numel() and not (target_N.min() >= 0 and target_N.max() < V):
        row = int(((target_N < 0) | (target_N >= V)).nonzero()[0])
        raise ValueError(
            f"target_N[{row}] is {int(target_N[row])}; expected an id in 0..{V - 1} (the head has V={V} rows) "
            f"or ignore_index={ignore_index}"
        )
    return target_N, valid_N


def checked_reference(reference_hidden_ND: Tensor | None, hidden_ND: Tensor) -> Tensor | None:
    """Reference hidden states without their graph, or a ValueError."""
    if reference_hidden_ND is None:
        return None
    need_tensor("reference_hidden_ND", reference_hidden_ND, tuple(hidden_ND.shape), hidden_ND, (hidden_ND.dtype,))
    return reference_hidden_ND.detach()
