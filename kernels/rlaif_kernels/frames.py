"""Which video tokens to keep: scores in float32, stable ties, one gather.

EVS (vLLM, efficient video sampling) keeps the tokens that differ most from the same cell of the previous frame. Scored
in bf16, as it is shipped, cosines near 1 take a dozen distinct values and up to a third of the kept tokens are the
wrong ones; here products are accumulated in float32 whatever the dtype of the features.

Shapes: T frames, P cells per frame, C channels, N tokens of a video, K kept tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, need, need_tensor, use_triton

# Below this product of norms a cosine is taken as 0 (torch's cosine_similarity does the same), so an all-zero cell
# scores 1.
TINY_NORM = 1e-8
# The torch path upcasts this many bytes of features at a time.
SCRATCH_BYTES = 64 << 20


class Selected(NamedTuple):
    """The kept tokens, in their original order."""

    features_KC: Tensor  # rows of features_NC, same dtype
    position: Tensor  # (K,) or (3,K), as the positions came
    frame_K: Tensor  # frame of each kept token
    index_K: Tensor  # int64, row of each kept token in features_NC


def frame_dissimilarity(features_TPC: Tensor, *, impl: str = "auto") -> Tensor:
    """score_TP, float32 (float64 for float64): 1 - cosine to the same cell of the frame before; +inf on frame 0.

    From 0 (exactly, for a bit-equal cell) to 2. An all-zero cell has no direction and scores 1. No gradient.
    Raises ValueError for anything but a 3-D floating tensor.
    """
    need_tensor("features_TPC", features_TPC, (None, None, None), features_TPC, FLOATS)
    with torch.no_grad():
        if use_triton(impl, features_TPC):
            from . import triton_kernels

            return triton_kernels.dissimilarity(features_TPC, TINY_NORM)
        return _dissimilarity_torch(features_TPC)


def _dissimilarity_torch(features_TPC: Tensor) -> Tensor:
    T, P, C = features_TPC.shape
    dtype = torch.promote_types(features_TPC.dtype, torch.float32)
    score_TP = torch.full((T, P), torch.inf, dtype=dtype, device=features_TPC.device)
    step = max(1, SCRATCH_BYTES // max(1, P * C * dtype.itemsize))
    for start in range(1, T, step):
        window = features_TPC[start - 1 : start + step].to(dtype)
        now, before = window[1:], window[:-1]
        square = window.square().sum(-1)
        # sqrt(x*x) is x in IEEE arithmetic, so equal cells give a cosine of exactly 1
        norms = (square[1:] * square[:-1]).sqrt().clamp_(min=TINY_NORM)
        score_TP[start : start + step] = 1 - (now * before).sum(-1) / norms
    return score_TP


def select_and_gather(
    score_N: Tensor, k: int, features_NC: Tensor, position: Tensor, frame_N: Tensor, *, impl: str = "auto"
) -> Selected:
    """The k tokens of highest score, gathered in their original order. Of equal scores the lower index is kept.

    `position` is (N,), or (3,N) for the three axes of M-RoPE. k is a host number, so nothing waits for the device.
    Gradient reaches `features_NC` on the torch path, which "auto" takes when they require one.
    Raises ValueError when k is not in 0..N, or shapes, dtypes or devices do not fit.
    """
    need_tensor("features_NC", features_NC, (None, None), features_NC, FLOATS)
    N = features_NC.shape[0]
    need_tensor("score_N", score_N, (N,), features_NC, FLOATS)
    need_tensor("frame_N", frame_N, (N,), features_NC, (torch.int64, torch.int32))
    need(
        isinstance(position, Tensor) and position.ndim in (1, 2),
        "position",
        position,
        f"a tensor of shape ({N},) or (3, {N})",
    )
    need_tensor("position", position, (N,) if position.ndim == 1 else (3, N), features_NC, (torch.int64, torch.int32))
    need(0 <= k <= N, "k", k, f"a number of tokens between 0 and N={N}")
    # torch.topk promises no order among equals; a stable sort does
    index_K = score_N.detach().sort(descending=True, stable=True).indices[:k].sort().values
    if use_triton(impl, features_NC, differentiable=not features_NC.requires_grad):
        from . import triton_kernels

        return Selected(*triton_kernels.gather(index_K, features_NC, position, frame_N), index_K)
    return Selected(features_NC.index_select(0, index_K), position[..., index_K], frame_N[index_K], index_K)
