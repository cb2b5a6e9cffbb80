"""Token pruning on the features of one video, after the projector: pure tensor functions, chained by the recipe.

Shapes: T frames, P tokens per frame, C width, K tokens kept, N = T*P tokens of the layout.

A chain is a list of one-key mappings, e.g. `[{"pool": 12}, {"evs": 0.25}]`: an optional `pool` first (it makes a
smaller layout), then at most one reduction, `evs` or `st_mean`. Selected tokens keep their positions on the layout, so
that the model sees the time and place each token came from; renumbering them changes the logits. `st_mean` makes new
tokens and so numbers them from 0.

Departure from the sources: EVS scores are float32 whatever the dtype of the features. In bfloat16 the cosine of
neighbouring frames has a handful of distinct values and ties fall to the early frames: up to a third of the tokens kept
are then the wrong ones.
"""

from math import floor, isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlaif_kernels import frame_dissimilarity, select_and_gather

from ..errors import RecipeError

CHAINS = ([], ["pool"], ["evs"], ["st_mean"], ["pool", "evs"], ["pool", "st_mean"])


class Pruned(NamedTuple):
    """The tokens of one video that are left."""

    features_KC: torch.Tensor  # dtype of the input
    position_K: torch.Tensor  # int64, index on the layout after `pool` and before selection (st_mean: 0..K-1)
    frame_K: torch.Tensor  # int64, index of the token's frame; -1 for a token that is a mean over all frames
    layout_tokens: int  # tokens of that layout


def pool(features_TPC: torch.Tensor, grid: tuple[int, int], side: int) -> Pruned:
    """Adaptive average pooling of each frame from `grid` (rows, columns) to side x side (PLLaVA, arXiv 2404.16994)."""
    frames, tokens, width = features_TPC.shape
    if grid[0] * grid[1] != tokens:
        raise RecipeError(f"features.prune: pool: {tokens} tokens per frame are no grid of {grid[0]} x {grid[1]}.")
    if type(side) is not int or not 0 < side <= min(grid):
        raise RecipeError(f"features.prune: pool: {side!r}; a frame of this model is {grid[0]} x {grid[1]} tokens.")
    image_TCHW = features_TPC.float().transpose(1, 2).reshape(frames, width, *grid)
    pooled_TPC = F.adaptive_avg_pool2d(image_TCHW, side).flatten(2).transpose(1, 2).to(features_TPC.dtype)
    return _all(pooled_TPC.contiguous())


def st_mean(features_TPC: torch.Tensor) -> Pruned:
    """T temporal tokens (each frame's mean) followed by P spatial tokens (each cell's mean over time), numbered anew.

    VLM-RLAIF, Evaluation/llava/model/llava_arch.py of the release: 50 + 576 tokens of LLaVA-1.5; from Video-ChatGPT.
    """
    frames, tokens, _ = features_TPC.shape
    features_TPC32 = features_TPC.float()
    features_KC = torch.cat([features_TPC32.mean(1), features_TPC32.mean(0)]).to(features_TPC.dtype)
    frame_K = torch.cat([torch.arange(frames), torch.full((tokens,), -1)]).to(features_TPC.device)
    count = frames + tokens
    return Pruned(features_KC, torch.arange(count, device=features_TPC.device), frame_K, count)


def evs(features_TPC: torch.Tensor, keep: float) -> Pruned:
    """Keep the share `keep` of all tokens that differ most from the same cell one frame earlier, frame 0 always.

    Efficient Video Sampling, arXiv 2510.14624, as in vLLM (multimodal/evs.py): score = 1 - cosine, the largest over the
    whole video, ties to the earlier token. At least one frame's worth of tokens is kept.
    """
    frames, tokens, _ = features_TPC.shape
    if not 0 < keep <= 1:
        raise RecipeError(f"features.prune: evs: {keep} is not a share between 0 (excluded) and 1.")
    everything = _all(features_TPC)
    count = max(tokens, floor(keep * frames * tokens + 1e-9))  # 1e-9: .29 * 100 is 28.999...
    score_N = frame_dissimilarity(features_TPC).flatten()
    kept = select_and_gather(score_N, count, everything.features_KC, everything.position_K, everything.frame_K)
    return Pruned(kept.features_KC, kept.position, kept.frame_K, frames * tokens)


def apply(chain: list[dict], features_TPC: torch.Tensor, grid: tuple[int, int] | None = None) -> Pruned:
    """Run the chain on one video; an empty one keeps every token. `grid` is (rows, columns) of a frame, None if square.

    Only `pool` uses the grid. Raises RecipeError for a chain or a grid that does not fit.
    """
    if [name for step in chain for name in step] not in CHAINS:
        raise RecipeError(f"features.prune: {chain} is not an optional pool, then at most one of evs and st_mean.")
    pruned = _all(features_TPC)
    for step in chain:
        (name, value), *_ = step.items()
        if name == "pool":
            pruned = pool(features_TPC, grid or (isqrt(features_TPC.shape[1]),) * 2, value)
            features_TPC = pruned.features_KC.unflatten(0, (features_TPC.shape[0], value * value))
        elif name == "evs":
            pruned = evs(features_TPC, value)
        else:
            pruned = st_mean(features_TPC)
    return pruned


def _all(features_TPC: torch.Tensor) -> Pruned:
    """Every token of the layout, in order."""
    frames, tokens, _ = features_TPC.shape
    position_N = torch.arange(frames * tokens, device=features_TPC.device)
    return Pruned(features_TPC.flatten(0, 1), position_N, position_N // tokens, frames * tokens)
