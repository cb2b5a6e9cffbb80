"""A dense copy of a role's linear layers for the time of a rollout: dequantised, the adapter merged in.

One matmul then takes the place of up to eight kernels: dequantising, the base's matmul, and the adapter's casts and
matmuls. Each rollout makes the copy again, because the adapter has been trained in between. It costs one element of
the base's dtype for each parameter. Nothing is written back: the base and its adapters stay as they are, and scoring
and training never see the copy.

A copy of attention's layers alone takes a third of the memory or less, and most of the gain on a GPU: bitsandbytes has
a fused matmul for wide layers and few rows, and dequantises these narrower ones in every step (docs/dry_run.md).
"""

import contextlib
from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn

from ..model.lora import dense_weight
from ..model.roles import ActiveRole
from ..phases import phase

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@contextlib.contextmanager
def dense_copy(role: ActiveRole, attention_only: bool = False) -> Iterator[None]:
    """Inside, the decoder computes with merged dense weights; after, with its own layers again."""
    found = _linears(role.roles.base.decoder)
    held = [each for each in found if not attention_only or each[1] in ATTENTION]
    try:
        with phase("dense copy"):
            for parent, name, layer in held:
                setattr(parent, name, _merged(layer, role.name))
        yield
    finally:
        for parent, name, layer in held:
            setattr(parent, name, layer)


def _linears(parent: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every linear layer below `parent`, one with adapters on it counting as one."""
    for name, child in parent.named_children():
        if isinstance(child, (LoraLayer, nn.Linear)):
            yield parent, name, child
        else:
            yield from _linears(child)


def _merged(layer: nn.Module, role: str) -> nn.Module:
    inner = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = dense_weight(inner)
    if isinstance(layer, LoraLayer) and role in layer.lora_A:  # not so for the role without an adapter
        if role in layer.lora_variant:
            return layer  # such as DoRA, which is more than a sum
        weight = (weight.float() + layer.get_delta_weight(role).float()).to(weight.dtype)
    dense = nn.Linear(inner.in_features, inner.out_features, bias=inner.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = inner.bias
    return dense
