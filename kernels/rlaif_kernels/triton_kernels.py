"""The Triton kernels and their launchers. One program per row (of logits, of a batch, of tokens); no autotuning.

Every load is turned to float32 at once, and no kernel holds a `tl.dot`: the matmuls are cuBLAS's, with float32 output,
because that is what the fastest published kernels reach or fall short of. What remains is bound by memory traffic.

Bounds: columns at or beyond V are set to BANNED (not to zero, which would add exp(0) columns to the sum), and products
with BANNED stay finite in float32, so there is no inf - inf anywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import configs_for
from .head import BANNED, Head, Rows, Upstream, dz_unit

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(BANNED)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _log(x):
    # the hardware's logarithm is off by 2^-22 of its result, 3e-6 at a 150k vocabulary; one Newton step mends it
    rough = tl.log(x)
    return rough + (x * _exp(-rough) - 1.0)


@triton.jit
def _tanh(x):
    # series below 0.6, where 1 - exp(-2|x|) would cancel; libdevice's tanh cannot run in the interpreter
    xx = x * x
    series = x + x * xx * (
        -0.333332819422
        + xx * (0.133314422036 + xx * (-0.0537397155531 + xx * (0.0206390887954 - xx * 0.00570498872745)))
    )
    shrunk = _exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.6, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def _bend(s_ptr, bias_ptr, at, live, inv_temperature, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits at `at` after bias, softcap and temperature, BANNED where not live; and the tanh, for the chain rule."""
    s = tl.load(s_ptr + at, mask=live, other=0.0)
    bent = s
    if BIAS:
        bias = tl.load(bias_ptr + at, mask=live, other=0.0)
        s += bias
    if SOFTCAP:
        bent = _tanh(s / softcap)
        s = softcap * bent
        if BIAS:
            s = tl.where(bias <= 0.5 * LOWEST, LOWEST, s)
    z = tl.maximum(s * inv_temperature, LOWEST)
    return tl.where(live, z, LOWEST), bent


@triton.jit(do_not_specialize=["row0"])
def row_kernel(
    s_ptr,
    ref_ptr,
    dz_ptr,
    s_stride,
    dz_stride,
    V,
    row0,
    bias_ptr,
    inv_temperature,
    softcap,
    target_ptr,
    valid_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    kl_ptr,
    at_target_ptr,
    up_logp_ptr,
    up_entropy_ptr,
    up_kl_ptr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF: tl.constexpr,
    GRAD: tl.constexpr,
    UPSTREAM: tl.constexpr,
    REVERSE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of one row of logits and, in their place, dz (see rows.py). `dz_ptr` may be `s_ptr`'s address."""
    local = tl.program_id(0)
    row = row0 + local
    s_ptr += tl.cast(local, tl.int64) * s_stride
    ref_ptr += tl.cast(local, tl.int64) * s_stride
    dz_ptr += tl.cast(local, tl.int64) * dz_stride
    lane = tl.arange(0, BLOCK)

    # every lane keeps its own running maximum m and its sums of exp(z - m), S; times (z - m), X; times (z - z'), D
    # (REVERSE: D is over exp(z' - m'), the reference's)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    S = tl.zeros([BLOCK], tl.float32)
    X = tl.zeros([BLOCK], tl.float32)
    if REF:
        D = tl.zeros([BLOCK], tl.float32)
        m_ref = tl.full([BLOCK], LOWEST, tl.float32)
        S_ref = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + lane
        z, _ = _bend(s_ptr, bias_ptr, at, at < V, inv_temperature, softcap, BIAS, SOFTCAP)
        rise = z - m
        e = _exp(-tl.abs(rise))  # one exponential serves both cases: rescale the sums, or add to them
        if REF:
            z_ref, _ = _bend(ref_ptr, bias_ptr, at, at < V, inv_temperature, softcap, BIAS, SOFTCAP)
            gap = z - z_ref
            rise_ref = z_ref - m_ref
            e_ref = _exp(-tl.abs(rise_ref))
            if REVERSE:
                D = tl.where(rise_ref > 0, D * e_ref + gap, D + e_ref * gap)
            else:
                D = tl.where(rise > 0, D * e + gap, D + e * gap)
            S_ref = tl.where(rise_ref > 0, S_ref * e_ref + 1.0, S_ref + e_ref)
            m_ref = tl.maximum(m_ref, z_ref)
        X = tl.where(rise > 0, e * (X - rise * S), X + e * rise)
        S = tl.where(rise > 0, S * e + 1.0, S + e)
        m = tl.maximum(m, z)

    top = tl.max(m, 0)
    shrink = _exp(m - top)
    total = tl.sum(S * shrink, 0)
    log_total = _log(total)
    entropy = log_total - tl.sum(shrink * (X + (m - top) * S), 0) / total
    valid = tl.load(valid_ptr + row) != 0
    y = tl.load(target_ptr + row)
    inside = (y >= 0) & (y < V)
    z_y, bent_y = _bend(s_ptr, bias_ptr, y, inside, inv_temperature, softcap, BIAS, SOFTCAP)
    logp = tl.where(inside, (z_y - top) - log_total, float("nan"))  # out of range: never read, never silent
    logp = tl.where(valid, logp, 0.0)
    entropy = tl.where(valid, entropy, 0.0)
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, tl.where(valid, top + log_total, 0.0))
    tl.store(entropy_ptr + row, entropy)
    kl = 0.0
    if REF:
        top_ref = tl.max(m_ref, 0)
        shrink_ref = _exp(m_ref - top_ref)
        total_ref = tl.sum(S_ref * shrink_ref, 0)
        log_total_ref = _log(total_ref)
        if REVERSE:
            kl = (top - top_ref) + (log_total - log_total_ref) - tl.sum(D * shrink_ref, 0) / total_ref
        else:
            kl = tl.sum(D * shrink, 0) / total + (top_ref - top) + (log_total_ref - log_total)
        kl = tl.where(valid, kl, 0.0)
        tl.store(kl_ptr + row, kl)

    if GRAD:
        g = tl.where(valid, 1.0, 0.0)
        if UPSTREAM:
            g = tl.load(up_logp_ptr + row)
            h = tl.load(up_entropy_ptr + row)
            k = tl.load(up_kl_ptr + row)
        else:
            # what the target's element of dz will be once rounded, and what it takes to make it the softmax again
            chain_y = 1.0
            if SOFTCAP:
                chain_y = 1.0 - bent_y * bent_y
            p_y = _exp(logp)
            dz_y = ((g - p_y * g) * chain_y * UNIT).to(dz_ptr.dtype.element_ty).to(tl.float32) / UNIT
            tl.store(at_target_ptr + row, tl.where(valid, dz_y + p_y * chain_y, 0.0))
        for start in range(0, V, BLOCK):
            at = start + lane
            z, bent = _bend(s_ptr, bias_ptr, at, at < V, inv_temperature, softcap, BIAS, SOFTCAP)
            logp_at = (z - top) - log_total
            slope = -g
            if UPSTREAM:
                slope -= h * (logp_at + entropy)
                if REF:
                    z_ref, _ = _bend(ref_ptr, bias_ptr, at, at < V, inv_temperature, softcap, BIAS, SOFTCAP)
                    logr_at = (z_ref - top_ref) - log_total_ref
                    if REVERSE:
                        slope += k
                    else:
                        slope += k * (logp_at - logr_at - kl)
            dz = _exp(logp_at) * slope + tl.where(at == y, g, 0.0)
            if REVERSE and UPSTREAM:
                dz -= k * _exp(logr_at)
            if SOFTCAP:
                dz *= 1.0 - bent * bent
            # in place: dz is no wider than s, so what this step overwrites has been read once every thread is here
            tl.debug_barrier()
            tl.store(dz_ptr + at, (dz * UNIT).to(dz_ptr.dtype.element_ty), mask=at < V)


def row_pass(
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
    """`row_pass_torch` as one launch; dz takes the place of the logits."""
    R, V = s_RV.shape
    dtype = head.weight_VD.dtype
    # with their padding, so that whole rows of float32 can be seen as rows of 16 bit
    padded_rows = s_RV.as_strided((R, s_RV.stride(0)), (s_RV.stride(0), 1))
    dz_RV = padded_rows.view(dtype)[:, :V]
    configs = configs_for(s_RV.device)
    config = configs.rows if s_ref_RV is None else configs.rows_with_reference

    def pointer(tensor: Tensor | None) -> Tensor:
        return out.logp_N if tensor is None else tensor  # one that is not used must still be one

    row_kernel[(R,)](
        s_RV,
        s_RV if s_ref_RV is None else s_ref_RV,
        dz_RV,
        s_RV.stride(0),
        dz_RV.stride(0),
        V,
        row0,
        pointer(head.bias_V),
        1.0 / head.temperature,
        head.softcap or 1.0,
        target_N,
        valid_N.view(torch.uint8),
        out.logp_N,
        out.lse_N,
        out.entropy_N,
        pointer(out.kl_N),
        pointer(out.at_target_N),
        *map(pointer, upstream or (None, None, None)),
        BIAS=head.bias_V is not None,
        SOFTCAP=head.softcap is not None,
        REF=s_ref_RV is not None,
        GRAD=want_grad,
        UPSTREAM=upstream is not None,
        REVERSE=reverse_kl,
        UNIT=dz_unit(dtype),
        BLOCK=min(config.block, triton.next_power_of_2(V)),
        num_warps=config.num_warps,
    )
    return dz_RV if want_grad else None


@triton.jit
def _later_then_now(decay_later, sum_later, decay_now, sum_now):
    """A_t = sum_t + decay_t A_{t+1}, composed."""
    return decay_later * decay_now, sum_now + decay_now * sum_later


@triton.jit
def gae_kernel(reward_ptr, value_ptr, real_ptr, advantage_ptr, return_ptr, T, gamma, decay, BLOCK: tl.constexpr):
    """One row, from its end to its beginning in blocks of BLOCK tokens; masked tokens are not even read."""
    base = tl.cast(tl.program_id(0), tl.int64) * T
    lane = tl.arange(0, BLOCK)
    carry = 0.0
    blocks = tl.cdiv(T, BLOCK)
    for i in range(blocks):
        at = (blocks - 1 - i) * BLOCK + lane
        real = tl.load(real_ptr + base + at, mask=at < T, other=0) != 0
        real_next = tl.load(real_ptr + base + at + 1, mask=at + 1 < T, other=0) != 0
        reward = tl.load(reward_ptr + base + at, mask=real, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + base + at, mask=real, other=0.0).to(tl.float32)
        value_next = tl.load(value_ptr + base + at + 1, mask=real_next, other=0.0).to(tl.float32)
        delta = tl.where(real, reward + gamma * value_next - value, 0.0)
        decays = tl.zeros([BLOCK], tl.float32) + decay
        reach, advantage = tl.associative_scan((decays, delta), 0, _later_then_now, reverse=True)
        advantage = tl.where(real, advantage + reach * carry, 0.0)
        tl.store(advantage_ptr + base + at, advantage, mask=at < T)
        tl.store(return_ptr + base + at, advantage + value, mask=at < T)
        carry = tl.sum(tl.where(lane == 0, advantage, 0.0), 0)


def gae(reward_BT: Tensor, value_BT: Tensor, real_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, float32."""
    B, T = reward_BT.shape
    advantage_BT = torch.empty(B, T, dtype=torch.float32, device=reward_BT.device)
    return_BT = torch.empty_like(advantage_BT)
    config = configs_for(reward_BT.device).gae
    if B and T:
        gae_kernel[(B,)](
            reward_BT.contiguous(),
            value_BT.contiguous(),
            real_BT.contiguous().view(torch.uint8),
            advantage_BT,
            return_BT,
            T,
            float(gamma),
            float(gamma) * float(lam),
            BLOCK=min(config.block, triton.next_power_of_2(T)),
            num_warps=config.num_warps,
        )
    return advantage_BT, return_BT


@triton.jit
def dissimilarity_kernel(features_ptr, score_ptr, P, C, tiny_norm, BLOCK: tl.constexpr):
    """One cell of one frame against the same cell of the frame before."""
    cell = tl.program_id(0)
    score = float("inf")
    if cell >= P:
        now_ptr = features_ptr + tl.cast(cell, tl.int64) * C
        before_ptr = features_ptr + tl.cast(cell - P, tl.int64) * C
        lane = tl.arange(0, BLOCK)
        dot = tl.zeros([BLOCK], tl.float32)
        now_square = tl.zeros([BLOCK], tl.float32)
        before_square = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            at = start + lane
            now = tl.load(now_ptr + at, mask=at < C, other=0.0).to(tl.float32)
            before = tl.load(before_ptr + at, mask=at < C, other=0.0).to(tl.float32)
            dot += now * before
            now_square += now * now
            before_square += before * before
        # correctly rounded root and quotient: equal cells give a cosine of exactly 1
        norms = tl.sqrt_rn(tl.sum(now_square, 0) * tl.sum(before_square, 0))
        score = 1.0 - tl.div_rn(tl.sum(dot, 0), tl.maximum(norms, tiny_norm))
    tl.store(score_ptr + cell, score)


def dissimilarity(features_TPC: Tensor, tiny_norm: float) -> Tensor:
    """score_TP, float32."""
    T, P, C = features_TPC.shape
    score_TP = torch.empty(T, P, dtype=torch.float32, device=features_TPC.device)
    config = configs_for(features_TPC.device).dissimilarity
    if T * P:
        dissimilarity_kernel[(T * P,)](
            features_TPC.contiguous(),
            score_TP,
            P,
            C,
            tiny_norm,
            BLOCK=min(config.block, triton.next_power_of_2(max(C, 1))),
            num_warps=config.num_warps,
        )
    return score_TP


@triton.jit
def gather_kernel(
    index_ptr,
    features_ptr,
    position_ptr,
    frame_ptr,
    features_out_ptr,
    position_out_ptr,
    frame_out_ptr,
    N,
    K,
    C,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One kept token: its features, its position on every axis and its frame."""
    k = tl.program_id(0)
    n = tl.load(index_ptr + k)
    lane = tl.arange(0, BLOCK)
    for start in range(0, C, BLOCK):
        at = start + lane
        value = tl.load(features_ptr + n * C + at, mask=at < C)
        tl.store(features_out_ptr + tl.cast(k, tl.int64) * C + at, value, mask=at < C)
    tl.store(frame_out_ptr + k, tl.load(frame_ptr + n))
    for axis in tl.static_range(AXES):
        tl.store(position_out_ptr + axis * K + k, tl.load(position_ptr + axis * N + n))


def gather(index_K: Tensor, features_NC: Tensor, position: Tensor, frame_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(features_KC, position, frame_K) of the tokens `index_K`."""
    (K,), (N, C) = index_K.shape, features_NC.shape
    features_KC, frame_K = features_NC.new_empty(K, C), frame_N.new_empty(K)
    position_K = position.new_empty(*position.shape[:-1], K)
    config = configs_for(features_NC.device).gather
    if K:
        gather_kernel[(K,)](
            index_K,
            features_NC.contiguous(),
            position.contiguous(),
            frame_N.contiguous(),
            features_KC,
            position_K,
            frame_K,
            N,
            K,
            C,
            AXES=position.ndim if position.ndim == 1 else position.shape[0],
            BLOCK=min(config.block, triton.next_power_of_2(max(C, 1))),
            num_warps=config.num_warps,
        )
    return features_KC, position_K, frame_K
