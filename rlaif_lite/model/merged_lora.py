"""LoRA on a CPU: one matmul with the merged float32 weight, where PEFT's layers take three.

    y = x (W + s B A)^T,   dx = dy (W + s B A),   dA = s (dy B)^T x,   dB = s dy^T (x A^T)

The merge is made anew in every pass, because the adapter is being trained, and costs far less than the matmul. A small
base keeps W dequantised between passes: at the embedded base's size dequantising takes as long as multiplying. Only in
float32: a merge in bfloat16 would round the adapter away. Adapters stay PEFT's parameters and PEFT folders. Variants
such as DoRA, other dtypes and GPUs keep PEFT's own forward.

Shapes: N tokens, D in, O out, R rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

# A base keeps its linear layers dequantised if they take no more than this in float32, all together.
KEEP_BYTES = 64 << 20


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
        dy_NO, x_ND = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
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
    dense_OD = dequantize_module_weight(frozen).detach() if weight_OD is None else weight_OD
    return torch.addmm(dense_OD, B_OR, A_RD, alpha=scale)


class MergedForward:
    """The forward of one LoRA layer; PEFT's own wherever the merge would not be exact."""

    def __init__(self, layer: LoraLayer, keep: bool):
        self.layer = layer
        self.plain: Callable[..., Tensor] = getattr(layer, "forward")  # noqa: B009  PEFT's; its class does not declare one
        self.weight_OD = dequantize_module_weight(layer.get_base_layer()).detach().clone() if keep else None

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer = self.layer
        active = layer.active_adapters
        one = len(active) == 1 and active[0] in layer.lora_A and active[0] not in layer.lora_variant
        if not one or layer.disable_adapters or layer.merged or x.dtype != torch.float32:
            return self.plain(x, *args, **kwargs)
        A_RD, B_OR = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
        frozen = layer.get_base_layer()
        return MergedLinear.apply(x, A_RD, B_OR, layer.scaling[active[0]], frozen, self.weight_OD)


def merge_forwards(layers: list[LoraLayer]) -> None:
    """Give the layers that have none yet the merged forward. For a base in float32 on a CPU; call it once per base."""
    inner = [layer.get_base_layer() for layer in layers]
    keep = sum(4 * module.in_features * module.out_features for module in inner) <= KEEP_BYTES
    for layer in layers:
        if not isinstance(vars(layer).get("forward"), MergedForward):
            setattr(layer, "forward", MergedForward(layer, keep))  # noqa: B010  as above
