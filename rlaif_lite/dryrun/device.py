"""What answers for the GPU in a dry run, where the code asks it something: patches that last as long as a block."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import masking_utils

import rlaif_kernels.triton_kernels as triton_kernels

from ..model import random_base
from ..model.inputs import ALIGNED
from .tracker import Tracker


@contextmanager
def pretended(tracker: Tracker) -> Iterator[None]:
    """Inside, "cuda" is a device, and every operator on it passes the tracker."""
    swaps = [
        (random_base, "_quantised", quantised),
        (nn.Module, "_apply", apply),
        (nn.functional, "scaled_dot_product_attention", attention),
        (nn.functional, "rms_norm", lambda x, _, weight_D, eps: FusedNorm.apply(x, weight_D, tracker)),
        # transformers looks into masks, to leave out those of ones, except where it takes a FakeTensor for a trace
        (masking_utils, "is_tracing", lambda *_: False),
        (FakeTensor, "tolist", lambda self: self.cpu().tolist()),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_device_capability", lambda *_: tracker.card.capability),
        (torch.cuda, "graph_pool_handle", lambda: (0, 0)),
        (torch.cuda, "current_stream", lambda *_: None),
        (torch.cuda, "CUDAGraph", lambda: Graph(tracker)),
        (torch.cuda, "graph", captured),
    ]
    kernels = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
    swaps += [(triton_kernels, name, Launcher(name, tracker)) for name in kernels]
    only_lift = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for owner, name, value in swaps:
            stack.enter_context(patch.object(owner, name, value))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU and copied
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_lift)
        stack.enter_context(tracker)
        yield


class Graph:
    """A CUDA graph: what its capture counted is counted again by each replay."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.cost: Counter[str] = Counter()

    def replay(self) -> None:
        self.tracker.add(self.cost)


@contextmanager
def captured(graph: Graph, pool: tuple[int, int]) -> Iterator[None]:
    """A capture runs nothing: it costs memory, in a pool of its own, and no time. Raises RuntimeError where a sync or
    a copy from the host breaks it, as CUDA does."""
    tracker = graph.tracker
    before = Counter(tracker.sums)
    tracker.allocator.pool = "graph"
    try:
        yield
    finally:
        tracker.allocator.pool = ""
    graph.cost = tracker.sums - before
    tracker.sums = before
    if graph.cost["syncs"] or graph.cost["host_copies"]:
        raise RuntimeError(f"The captured step waits for the host: {dict(tracker.syncs)}, {dict(tracker.copies)}")


class Launcher:
    """A Triton kernel that is counted and not run."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker = name, tracker

    def __getitem__(self, grid: tuple):
        def launch(*args: object, **options: object) -> None:
            self.tracker.kernel(self.name, [argument for argument in args if isinstance(argument, Tensor)])

        return launch


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """torch's choice on a GPU without cuDNN's attention: flash without a mask, memory-efficient with one."""
    if query.device.type != "cuda":
        return torch._C._nn.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    aten = torch.ops.aten
    if attn_mask is None and query.element_size() == 2:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        if any(stride % ALIGNED for stride in attn_mask.stride()[:-1]):  # the kernel reads aligned rows
            width = attn_mask.shape[-1]
            attn_mask = nn.functional.pad(attn_mask, (0, ALIGNED - width % ALIGNED))[..., :width]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, differentiable, 0.0, is_causal, scale=scale
    )[0]


class FusedNorm(torch.autograd.Function):
    """torch's kernels for RMS norms on CUDA. A torch without CUDA would run several operators instead."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, tracker: Tracker) -> Tensor:
        y, scale_N1 = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        tracker.kernel("rms_norm", [x, weight_D, y])
        ctx.save_for_backward(x, weight_D, scale_N1)
        ctx.tracker = tracker
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight_D, scale_N1 = ctx.saved_tensors
        dx = torch.empty_like(x)
        ctx.tracker.kernel("rms_norm_backward", [x, weight_D, scale_N1, dy, dx])
        return dx, None, None


def quantised(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`random_base._quantised` without weights: bitsandbytes' own parameter refuses FakeTensors."""
    count = layer.weight.numel()
    blocks = -(-count // 64)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    weight = nn.Parameter(empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    nested = QuantState(absmax=empty(-(-blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
    weight.quant_state = QuantState(
        absmax=empty(blocks, dtype=torch.uint8),
        shape=layer.weight.shape,
        dtype=dtype,
        blocksize=64,
        code=empty(16),
        quant_type="nf4",
        offset=empty(),
        state2=nested,
    )
    weight.compress_statistics, weight.quant_type, weight.blocksize = True, "nf4", 64
    weight.bnb_quantized, weight.quant_storage = True, torch.uint8
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    made.weight, made.quant_state = weight, weight.quant_state
    if layer.bias is not None:
        made.bias = nn.Parameter(empty(layer.out_features, dtype=dtype), requires_grad=False)
    return made


def apply(module: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """`Module.to` and its like: parameters are replaced where they change their kind, as torch's own way refuses
    FakeTensors."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            moved = fn(parameter.detach())
            if isinstance(moved, FakeTensor) or isinstance(parameter, FakeTensor):
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            else:
                parameter.data = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fn(buffer)
    return module
