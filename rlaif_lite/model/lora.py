"""LoRA with fewer and smaller kernels than PEFT's layers take. Adapters stay PEFT's parameters and PEFT folders.

    y = x (W + s B A)^T,   dx = dy (W + s B A),   dA = s (dy B)^T x,   dB = s dy^T (x A^T)

In bfloat16 (`AddedLinear`) the adapter is two matmuls, of which the second adds into the base's output. PEFT's layer
instead copies the input to float32, computes the adapter there, rounds the result, and adds it to a copy of the base's
output. Output and dx have the rounding of bfloat16 either way. dA and dB are float32 and right to about 1e-5: each
float32 factor enters its matmul as the sum of two bfloat16 halves.

In float32 on a CPU (`MergedLinear`) W and adapter are merged, and one matmul does both. The merge is made again in
every pass, because the adapter is being trained, and costs far less than the matmul. A small base keeps W dequantised
between passes: at the embedded base's size dequantising takes as long as multiplying.

Variants such as DoRA, other dtypes, and a base of unsloth's keep PEFT's own forward.

Shapes: N tokens, D in, O out, R rank, K either of N, D and O.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

# A base keeps its linear layers dequantised if they take no more than this in float32, all together.
KEEP_BYTES = 64 << 20


def dense_weight(frozen: nn.Linear) -> Tensor:
    """The weight (O,D) of a layer of the base, dequantised into a new tensor where it is held in 4 bits."""
    weight = frozen.weight.detach()
    if not isinstance(frozen, Linear4bit):
        return weight
    return dequantize_4bit(weight, cast(Params4bit, frozen.weight).quant_state)


class AddedLinear(torch.autograd.Function):
    """y of x (..., D) -> (..., O), both bfloat16, through a frozen layer with one float32 adapter. Backward reads x,
    and computes x A^T again."""

    @staticmethod
    def forward(ctx, x: Tensor, A_RD: Tensor, B_OR: Tensor, scale: float, frozen: nn.Linear):
        ctx.save_for_backward(x, A_RD, B_OR)
        ctx.scale, ctx.frozen = scale, frozen
        y = frozen(x)
        inner_NR = flat(x) @ A_RD.to(x.dtype).T
        flat(y).addmm_(inner_NR, B_OR.to(x.dtype).T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, A_RD, B_OR = ctx.saved_tensors
        x_ND, dy_NO, rank = flat(x), flat(dy), len(A_RD)
        dx = dA_RD = dB_OR = None
        A_2RD = halves(A_RD, x.dtype)
        dinner_2RN = halves(product(halves(ctx.scale * B_OR.T, x.dtype), dy_NO.T), x.dtype)
        if ctx.needs_input_grad[0]:
            dx_ND = dy_NO @ dense_weight(ctx.frozen)
            dx = dx_ND.addmm_(dinner_2RN[:rank].T, A_2RD[:rank]).view_as(x)
        if ctx.needs_input_grad[1]:
            dA_RD = product(dinner_2RN, x_ND)
            inner_2RN = halves(product(A_2RD, x_ND.T), x.dtype)
            dB_OR = ctx.scale * product(inner_2RN, dy_NO).T
        return dx, dA_RD, dB_OR, None, None


def flat(x: Tensor) -> Tensor:
    """(..., K) -> (N,K); what is contiguous is viewed."""
    return x.reshape(-1, x.shape[-1])


def halves(t_RK: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> (2R,K) whose first R rows are `t_RK` rounded to `dtype`, and the others what the rounding left."""
    out_2RK = t_RK.new_empty(2, *t_RK.shape, dtype=dtype)
    out_2RK[0].copy_(t_RK)
    torch.sub(t_RK, out_2RK[0], out=out_2RK[1])
    return out_2RK.flatten(0, 1)


def product(halves_2RN: Tensor, factor_NK: Tensor) -> Tensor:
    """The matmul of what `halves` stand for with `factor_NK`, summed up in float32 -> float32 (R,K)."""
    if factor_NK.device.type == "cuda":
        out_2RK = torch.mm(halves_2RN, factor_NK, out_dtype=torch.float32)
    else:
        out_2RK = halves_2RN.float() @ factor_NK.float()
    return out_2RK.unflatten(0, (2, -1)).sum(0)


class MergedLinear(torch.autograd.Function):
    """y of x (..., D) -> (..., O) through a frozen layer with one adapter; weight_OD is None or W dequantised."""

    @staticmethod
    def forward(ctx, x: Tensor, A_RD: Tensor, B_OR: Tensor, scale: float, frozen: nn.Linear, weight_OD: Tensor | None):
        ctx.save_for_backward(x, A_RD, B_OR)
        ctx.scale, ctx.frozen, ctx.weight_OD = scale, frozen, weight_OD
        return F.linear(x, merged(frozen, weight_OD, A_RD, B_OR, scale), frozen.bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, A_RD, B_OR = ctx.saved_tensors
        dy_NO, x_ND = flat(dy), flat(x)
        dx = dA_RD = dB_OR = None
        if ctx.needs_input_grad[0]:
            dx = (dy_NO @ merged(ctx.frozen, ctx.weight_OD, A_RD, B_OR, ctx.scale)).view_as(x)
        if ctx.needs_input_grad[1]:
            dA_RD = (dy_NO @ B_OR).mul_(ctx.scale).T @ x_ND
        if ctx.needs_input_grad[2]:
            dB_OR = dy_NO.T @ (x_ND @ A_RD.T).mul_(ctx.scale)
        return dx, dA_RD, dB_OR, None, None, None


def merged(frozen: nn.Linear, weight_OD: Tensor | None, A_RD: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """W + s B A, a new tensor."""
    return torch.addmm(dense_weight(frozen) if weight_OD is None else weight_OD, B_OR, A_RD, alpha=scale)


class LoraForward:
    """The forward of one LoRA layer: one of the two above, or PEFT's own where neither serves.

    `weight_OD` is the base's weight in float32, where it is kept."""

    def __init__(self, layer: LoraLayer, weight_OD: Tensor | None):
        self.layer, self.weight_OD = layer, weight_OD
        self.plain: Callable[..., Tensor] = getattr(layer, "forward")  # noqa: B009  PEFT's; its class does not declare one

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer = self.layer
        active = layer.active_adapters
        one = len(active) == 1 and active[0] in layer.lora_A and active[0] not in layer.lora_variant
        if not one or layer.disable_adapters or layer.merged:
            return self.plain(x, *args, **kwargs)
        A_RD, B_OR = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
        scale, frozen = layer.scaling[active[0]], layer.get_base_layer()
        if x.dtype == torch.bfloat16 and A_RD.dtype == torch.float32:
            return AddedLinear.apply(x, A_RD, B_OR, scale, frozen)
        if x.dtype == torch.float32 and x.device.type == "cpu":
            return MergedLinear.apply(x, A_RD, B_OR, scale, frozen, self.weight_OD)
        return self.plain(x, *args, **kwargs)


def quicken(layers: list[LoraLayer], dtype: torch.dtype) -> None:
    """Give those layers of one base of `dtype` that have PEFT's forward the one of this module."""
    inner = [layer.get_base_layer() for layer in layers]
    size = sum(4 * module.in_features * module.out_features for module in inner)
    keep = dtype == torch.float32 and inner[0].weight.device.type == "cpu" and size <= KEEP_BYTES
    for layer, frozen in zip(layers, inner, strict=True):
        if not isinstance(vars(layer).get("forward"), LoraForward):
            weight_OD = dense_weight(frozen).clone() if keep else None
            setattr(layer, "forward", LoraForward(layer, weight_OD))  # noqa: B010  as above
