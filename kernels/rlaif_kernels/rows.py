"""The one loop behind `linear_logprob`: chunks of rows through the head, statistics out, gradient out.

For every chunk of R rows: logits (float32 whatever the inputs) -> one pass for the statistics -> one pass that turns
the logits into dz, the gradient of the loss with respect to them -> dz @ W. No more than one chunk of logits (two with
a reference) is ever held.

Formulas. s = h W^T + b, softcap s <- c tanh(s/c), z = s/T; p = softmax(z), r = softmax(z') of the reference:
    lse = log sum exp z        logp = z_y - lse        H = lse - sum p z        KL = sum p (z - z') - lse + lse'
and for upstream gradients g of logp, h of H, k of KL (all per row)
    dz_j = g 1[j=y] + p_j (-g - h (log p_j + H) + k (log p_j - log r_j - KL)),      ds_j = dz_j (1 - tanh^2(s_j/c)) / T
|dz_j| <= G = |g| + |h| (H + 1/e) + |k| (2 KL + 1/e), so dz is kept as dz/G, which fits any dtype, and G/T is applied to
the D-vector after the second matmul.
The other direction is KL(r || p) = sum r (z' - z) - lse' + lse, whose part of dz_j is k (p_j - r_j), at most |k|.

Shapes: N tokens (rows), R rows of a chunk, D channels, V vocabulary.
"""

import torch
from torch import Tensor

from .head import BANNED, Head, Rows, Upstream, dz_unit, take

# Bytes of one chunk of logits. On a GPU wide enough for full matmul speed (384 rows of a 152k vocabulary), on a CPU for
# its caches.
LOGITS_BYTES_GPU = 256 << 20
LOGITS_BYTES_CPU = 32 << 20
# Where no matmul takes low precision in and gives float32 out (the CPU), the head is upcast this many bytes at a time.
UPCAST_BYTES = 32 << 20


def chunk_size(rows: int, vocabulary: int, itemsize: int, on_gpu: bool) -> int:
    """Rows per chunk: the budget, spread evenly over the chunks, in multiples of 128 where there are that many."""
    budget = LOGITS_BYTES_GPU if on_gpu else LOGITS_BYTES_CPU
    most = max(1, budget // (vocabulary * itemsize))
    if most >= rows:
        return rows
    most = most // 128 * 128 or most
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // 128) * 128)


def run_rows(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    valid_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    want_grad: bool,
    upstream: Upstream | None = None,
    reverse_kl: bool = False,
    triton: bool,
    chunk_rows: int | None,
) -> Rows:
    """Statistics of every row and, with `want_grad`, T times the gradient of the row's log-prob or, with `upstream`, of
    the loss whose derivatives these are. `reverse_kl`: KL(r || p) in place of KL(p || r)."""
    N, D = hidden_ND.shape
    V = head.weight_VD.shape[0]
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    new = lambda *shape: hidden_ND.new_zeros(shape, dtype=dtype)
    out = Rows(
        logp_N=new(N),
        lse_N=new(N),
        entropy_N=new(N),
        kl_N=None if reference_hidden_ND is None else new(N),
        at_target_N=new(N) if want_grad and upstream is None else None,
        grad_ND=hidden_ND.new_empty((N, D), dtype=dtype) if want_grad else None,
    )
    step = max(1, min(N, chunk_rows or chunk_size(N, V, dtype.itemsize, hidden_ND.is_cuda)))
    streams = 1 if reference_hidden_ND is None else 2
    row_stride = (
        -(-V // 16) * 16 if triton else V
    )  # whole 64-byte lines: a ragged vocabulary, too, is stored in vectors
    buffer_2RV = hidden_ND.new_empty((streams, step, row_stride), dtype=dtype)[:, :, :V]
    row_pass = row_pass_torch
    if triton:
        from .triton_kernels import row_pass  # here, so that a machine without Triton imports this module
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, N, step):
            stop = min(start + step, N)
            logits_RV = head_logits(hidden_ND[start:stop], head.weight_VD, buffer_2RV[0, : stop - start])
            ref_RV = None
            if reference_hidden_ND is not None:
                ref_RV = head_logits(reference_hidden_ND[start:stop], head.weight_VD, buffer_2RV[1, : stop - start])
            dz_RV = row_pass(logits_RV, ref_RV, head, target_N, valid_N, out, upstream, reverse_kl, want_grad, start)
            if want_grad:
                times_weight(dz_RV, head.weight_VD, out.grad_ND[start:stop])
    return out


def head_logits(hidden_RD: Tensor, weight_VD: Tensor, out_RV: Tensor) -> Tensor:
    """h W^T accumulated and written in float32 (float64 for float64), before bias, softcap and temperature."""
    if hidden_RD.dtype == out_RV.dtype:
        return torch.mm(hidden_RD, weight_VD.T, out=out_RV)
    if hidden_RD.is_cuda:
        return torch.mm(hidden_RD, weight_VD.T, out_dtype=out_RV.dtype, out=out_RV)
    for block in upcast_blocks(weight_VD):
        torch.mm(hidden_RD.to(out_RV.dtype), weight_VD[block].to(out_RV.dtype).T, out=out_RV[:, block])
    return out_RV


def times_weight(dz_RV: Tensor, weight_VD: Tensor, out_RD: Tensor) -> Tensor:
    """dz W accumulated and written in float32 (or float64); dz has that dtype, or the weight's and its unit."""
    if weight_VD.dtype == out_RD.dtype:
        return torch.mm(dz_RV, weight_VD, out=out_RD)
    if dz_RV.is_cuda:
        torch.mm(dz_RV, weight_VD, out_dtype=out_RD.dtype, out=out_RD)
    else:
        out_RD.zero_()
        for block in upcast_blocks(weight_VD):
            out_RD.addmm_(dz_RV[:, block].to(out_RD.dtype), weight_VD[block].to(out_RD.dtype))
    return out_RD if dz_RV.dtype == out_RD.dtype else out_RD.div_(dz_unit(weight_VD.dtype))


def upcast_blocks(weight_VD: Tensor) -> list[slice]:
    """Slices of the vocabulary whose float32 copy stays within UPCAST_BYTES."""
    V, D = weight_VD.shape
    step = max(1, UPCAST_BYTES // (4 * D))
    return [slice(v, v + step) for v in range(0, V, step)]


def row_pass_torch(
    s_RV: Tensor,
    s_ref_RV: Tensor | None,
    head: Head,
    target_N: Tensor,
    valid_N: Tensor,
    out: Rows,
    upstream: Upstream | None,
    reverse_kl: bool,
    want_grad: bool,
    row0: int,
) -> Tensor | None:
    """Fills `out` for one chunk of logits and returns dz, or None without `want_grad`.

    The logits are consumed. Passes work in place: on a CPU a fresh buffer costs more in page faults than arithmetic.
    """
    chunk = slice(row0, row0 + s_RV.shape[0])
    y_R1, valid_R, out = target_N[chunk, None], valid_N[chunk], take(out, chunk)
    keep = upstream is not None  # the second pass needs what the statistics would otherwise overwrite
    z_RV, chain_RV = bend_logits(s_RV, head, want_chain=want_grad)
    top_R, exp_RV, sum_R, log_sum_R = centre(z_RV)
    out.logp_N.copy_((z_RV.gather(1, y_R1)[:, 0] - log_sum_R).where(valid_R, 0.0))
    out.lse_N.copy_((top_R + log_sum_R).where(valid_R, 0.0))
    if s_ref_RV is not None:
        gap_RV, _ = bend_logits(s_ref_RV, head, want_chain=False)
        _, ref_exp_RV, ref_sum_R, ref_log_sum_R = centre(gap_RV)
        torch.sub(z_RV, gap_RV, out=gap_RV)
        if reverse_kl:
            kl_R = log_sum_R - ref_log_sum_R - gap_RV.mul_(ref_exp_RV).sum(1) / ref_sum_R
        else:
            del ref_exp_RV  # a chunk of memory
            mean_gap_R = (gap_RV * exp_RV if keep else gap_RV.mul_(exp_RV)).sum(1) / sum_R
            kl_R = mean_gap_R + ref_log_sum_R - log_sum_R
        out.kl_N.copy_(kl_R.where(valid_R, 0.0))
    mean_z_R = (z_RV * exp_RV if keep else z_RV.mul_(exp_RV)).sum(1) / sum_R
    out.entropy_N.copy_((log_sum_R - mean_z_R).where(valid_R, 0.0))
    if not want_grad:
        return None
    if upstream is None:
        g_R = valid_R.to(exp_RV.dtype)
        dz_RV = exp_RV.mul_((-g_R / sum_R)[:, None])
    else:
        g_R, h_R, k_R = take(upstream, chunk)
        dz_RV = z_RV.mul_(-h_R[:, None])  # log p_j + H is z_j - mean z, log p_j - log r_j - KL is gap_j - mean gap
        constant_R = h_R * mean_z_R - g_R
        if reverse_kl:
            constant_R += k_R
        elif s_ref_RV is not None:
            dz_RV.addcmul_(gap_RV, k_R[:, None])
            constant_R -= k_R * mean_gap_R
        dz_RV.add_(constant_R[:, None]).mul_(exp_RV.div_(sum_R[:, None]))
        if reverse_kl:
            dz_RV.addcmul_(ref_exp_RV, (-k_R / ref_sum_R)[:, None])
    dz_RV.scatter_add_(1, y_R1, g_R[:, None])
    if chain_RV is not None:
        dz_RV *= chain_RV
    unit = 1.0
    if dz_RV.is_cuda and dz_RV.dtype != head.weight_VD.dtype:
        unit = dz_unit(head.weight_VD.dtype)
        dz_RV = (dz_RV * unit).to(head.weight_VD.dtype)
    if out.at_target_N is not None:
        p_y_R = out.logp_N.exp() if chain_RV is None else out.logp_N.exp() * chain_RV.gather(1, y_R1)[:, 0]
        out.at_target_N.copy_((dz_RV.gather(1, y_R1)[:, 0] / unit + p_y_R).where(valid_R, 0.0))
    return dz_RV


def centre(z_RV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Subtracts each row's maximum in place, lest logits of 1e4 cancel; returns (maximum, exp, sum, log sum)."""
    top_R = z_RV.amax(1)
    z_RV -= top_R[:, None]
    exp_RV = z_RV.exp()
    sum_R = exp_RV.sum(1)
    return top_R, exp_RV, sum_R, sum_R.log()


def bend_logits(s_RV: Tensor, head: Head, want_chain: bool) -> tuple[Tensor, Tensor | None]:
    """Bias, softcap, temperature, in place; with `want_chain` also T dz/ds where a softcap makes it differ from 1."""
    chain_RV = None
    if head.bias_V is not None:
        s_RV += head.bias_V
    if head.softcap is not None:
        s_RV.div_(head.softcap).tanh_()
        if want_chain:
            chain_RV = 1 - s_RV.square()
        s_RV *= head.softcap
        if head.bias_V is not None:  # the cap would lift a banned id back among the living
            s_RV.masked_fill_(head.bias_V <= BANNED / 2, BANNED)
    if head.temperature != 1.0:
        s_RV.div_(head.temperature).clamp_(min=BANNED)
    return s_RV, chain_RV


def bound_of_dz(
    g_R: Tensor, h_R: Tensor, k_R: Tensor, entropy_R: Tensor, kl_R: Tensor | None, reverse_kl: bool = False
) -> Tensor:
    """G of the module docstring: no element of dz is larger. Never 0, so that it can be divided by."""
    bound_R = g_R.abs() + h_R.abs() * (entropy_R + 0.37)
    if reverse_kl:
        bound_R = bound_R + k_R.abs()
    elif kl_R is not None:
        bound_R = bound_R + k_R.abs() * (2 * kl_R + 0.37)
    return bound_R.clamp(min=1e-20)
