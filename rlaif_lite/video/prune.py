"""Token pruning on the features of one video, after the projector: pure tensor functions, chained by the recipe.

Shapes: T frames, P tokens per frame, C width, K tokens kept, N = T*P tokens of the layout.

A chain is a list of one-key mappings, e.g. `[{"pool": 12}, {"evs": 0.25}]`: an optional `pool` first (it makes a
smaller layout), then at most one reduction. Selected tokens keep their positions on the layout, so that the model sees
the time and place each token came from; renumbering them changes the logits. `st_mean` makes new tokens and so numbers
them from 0.

How many tokens a selector keeps follows from the shape of the layout (`count_kept`). `dtd` is the exception: it keeps
what changed by more than a threshold, so the count depends on the content, and only a bound is known before.

Departure from the sources: scores are float32 whatever the dtype of the features. In bfloat16 the cosine of
neighbouring frames has a handful of distinct values and ties fall to the early frames: up to a third of the tokens kept
are then the wrong ones.
"""

from math import floor, isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlaif_kernels import frame_dissimilarity, select_and_gather

from ..errors import RecipeError

SHARES = ("evs", "vidcom2", "v_cast", "random")  # selectors whose value is the share of tokens that stays
REDUCTIONS = (*SHARES, "dtd", "st_mean")  # the last step of a chain
SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # VidCom2: variances of its Gaussians
FRAME_TEMPERATURE = 0.01  # VidCom2: of the softmax over frames
CURVATURE_TEMPERATURE = 0.7  # V-CAST: of the softmax over frames


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

    Efficient Video Sampling, arXiv 2510.14624, as in vLLM (multimodal/video_prune/evs.py): score = 1 - cosine, the
    largest over the whole video, ties to the earlier token. At least one frame's worth of tokens is kept.
    """
    everything = _all(features_TPC)
    count = count_kept("evs", keep, *features_TPC.shape[:2])
    score_N = frame_dissimilarity(features_TPC).flatten()
    kept = select_and_gather(score_N, count, everything.features_KC, everything.position_K, everything.frame_K)
    return Pruned(kept.features_KC, kept.position, kept.frame_K, everything.layout_tokens)


def dtd(features_TPC: torch.Tensor, threshold: float) -> Pruned:
    """Drop the tokens whose cosine to the same cell one frame earlier is above `threshold`; frame 0 stays whole.

    Differential Token Drop on features (TimeChat-Online, arXiv 2504.17343; 0.5 in its release). The cell of the frame
    before counts whether it was kept or not. The number of tokens depends on the video.
    """
    count_kept("dtd", threshold, *features_TPC.shape[:2])  # refuses what is no cosine
    return _gather(features_TPC, (frame_dissimilarity(features_TPC).flatten() >= 1 - threshold).nonzero()[:, 0])


def vidcom2(features_TPC: torch.Tensor, keep: float) -> Pruned:
    """Keep the share `keep` of the tokens that are least like the mean of the video and of their frame.

    Video Compression Commander, arXiv 2505.14454, as in vLLM (multimodal/video_prune/vidcom2.py). Likeness is a sum of
    Gaussians over the half of the channels that varies least. A frame that is unlike the video gets more tokens than
    others; rounding is then evened out over the whole video by likeness. At least one token per frame is kept in all.
    """
    frames, tokens, width = features_TPC.shape
    features_NC = features_TPC.flatten(0, 1).float()
    calm_H = features_NC.var(0, unbiased=False).sort(stable=True).indices[: max(1, width // 2)]
    unit_TPH = F.normalize(features_NC[:, calm_H], dim=-1).unflatten(0, (frames, tokens))
    to_video_TP = _gaussians(unit_TPH - unit_TPH.mean((0, 1)))
    likeness_TP = to_video_TP + _gaussians(unit_TPH - unit_TPH.mean(1, keepdim=True))

    weight_T = (-to_video_TP.mean(1) / FRAME_TEMPERATURE).softmax(0)
    share_T = (keep * (1 + weight_T - weight_T.mean())).clamp(max=1)
    count_T = (share_T * tokens).round().clamp(1, tokens)
    first_N = (likeness_TP.argsort(dim=1, stable=True).argsort(dim=1) < count_T[:, None]).flatten()
    # those that their frames give come first: the count is then cut, or filled up, by likeness
    order_N = likeness_TP.flatten().argsort(stable=True)
    order_N = torch.cat([order_N[first_N[order_N]], order_N[~first_N[order_N]]])
    return _gather(features_TPC, order_N[: count_kept("vidcom2", keep, frames, tokens)].sort().values)


def v_cast(features_TPC: torch.Tensor, keep: float) -> Pruned:
    """Keep the share `keep` of the tokens: more of them in frames where the video turns, and there the tokens that are
    unlike their frame or large.

    V-CAST (github.com/xinyouu/V-CAST). A frame's weight is the softmax of 1 - cosine between the step to it and the
    step from it; a token's score is 1 - cosine to its frame's mean, plus its norm scaled to 0..1 in its frame. Every
    frame keeps a token, and a single frame all of them. Departure: tokens left over by rounding go to one frame after
    another, by largest remainder; the release gives all of them to one.
    """
    frames, tokens, _ = features_TPC.shape
    count = count_kept("v_cast", keep, frames, tokens)
    if frames == 1:
        return _all(features_TPC)
    wide_TPC = features_TPC.float()
    frame_TC = F.normalize(wide_TPC.mean(1), dim=-1, eps=1e-6)
    step_TC = frame_TC.diff(dim=0)
    turn_T = F.pad(1 - F.cosine_similarity(step_TC[:-1], step_TC[1:], dim=-1, eps=1e-6), (1, 1), value=1.0)
    count_T = shared_out(count, (turn_T / CURVATURE_TEMPERATURE).softmax(0).tolist(), tokens)

    norm_TP = wide_TPC.norm(dim=-1)
    low_T1, high_T1 = norm_TP.amin(1, keepdim=True), norm_TP.amax(1, keepdim=True)
    size_TP = (norm_TP - low_T1) / (high_T1 - low_T1 + 1e-6)
    score_TP = 1 - F.cosine_similarity(wide_TPC, frame_TC[:, None], dim=-1, eps=1e-6) + size_TP
    place_TP = score_TP.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept_TP = place_TP < torch.tensor(count_T, device=features_TPC.device)[:, None]
    return _gather(features_TPC, kept_TP.flatten().nonzero()[:, 0])


def random(features_TPC: torch.Tensor, keep: float, seed: int) -> Pruned:
    """Keep the share `keep` of all tokens, each set of that size equally likely: what a selector has to beat."""
    frames, tokens, _ = features_TPC.shape
    generator = torch.Generator().manual_seed(seed)
    index_K = torch.randperm(frames * tokens, generator=generator)[: count_kept("random", keep, frames, tokens)]
    return _gather(features_TPC, index_K.sort().values.to(features_TPC.device))


def count_kept(name: str, value: float, frames: int, tokens: int) -> int:
    """How many tokens the last step of a chain leaves of `frames` times `tokens`; of `dtd`, the most it can leave.

    `value` is the step's, as the recipe has it. Raises RecipeError for a share or threshold out of range."""
    layout = frames * tokens
    if name == "st_mean":
        return frames + tokens
    if name == "dtd":
        if not -1 <= value <= 1:
            raise RecipeError(f"features.prune: dtd: {value} is not a cosine between -1 and 1.")
        return layout
    if not 0 < value <= 1:
        raise RecipeError(f"features.prune: {name}: {value} is not a share between 0 (excluded) and 1.")
    share = floor(value * layout + 1e-9)  # 1e-9: .29 * 100 is 28.999...
    if name == "v_cast":
        return tokens if frames == 1 else max(frames, round(value * layout))
    return max({"evs": tokens, "vidcom2": frames, "random": 1}[name], share)


def apply(chain: list[dict], features_TPC: torch.Tensor, grid: tuple[int, int] | None = None, seed: int = 0) -> Pruned:
    """Run the chain on one video; an empty one keeps every token. `grid` is (rows, columns) of a frame, None if square;
    only `pool` uses it. `seed` is the video's own; only `random` uses it.

    Raises RecipeError for a chain or a grid that does not fit.
    """
    names = [name for step in chain for name in step]
    last = names[1:] if names[:1] == ["pool"] else names
    if len(last) > 1 or not set(last) <= set(REDUCTIONS):
        either = ", ".join(REDUCTIONS)
        raise RecipeError(f"features.prune: {chain} is not an optional pool, then at most one of {either}.")
    pruned = _all(features_TPC)
    for step in chain:
        match step:
            case {"pool": side}:
                pruned = pool(features_TPC, grid or (isqrt(features_TPC.shape[1]),) * 2, side)
                features_TPC = pruned.features_KC.unflatten(0, (features_TPC.shape[0], side * side))
            case {"evs": keep}:
                pruned = evs(features_TPC, keep)
            case {"vidcom2": keep}:
                pruned = vidcom2(features_TPC, keep)
            case {"v_cast": keep}:
                pruned = v_cast(features_TPC, keep)
            case {"dtd": threshold}:
                pruned = dtd(features_TPC, threshold)
            case {"random": keep}:
                pruned = random(features_TPC, keep, seed)
            case {"st_mean": _}:
                pruned = st_mean(features_TPC)
    return pruned


def shared_out(count: int, weight_T: list[float], most: int) -> list[int]:
    """`count` tokens for the frames: one each, the rest by weight (it sums to 1), at most `most`; what rounding leaves
    goes to one frame after another by largest remainder. Needs len(weight_T) <= count <= most * len(weight_T)."""
    wanted_T = [(count - len(weight_T)) * weight for weight in weight_T]
    count_T = [min(most, 1 + floor(wanted)) for wanted in wanted_T]
    by_rest = sorted(range(len(weight_T)), key=lambda t: (floor(wanted_T[t]) - wanted_T[t], t))
    while left := count - sum(count_T):
        for t in [t for t in by_rest if count_T[t] < most][:left]:
            count_T[t] += 1
    return count_T


def _gaussians(away_TPH: torch.Tensor) -> torch.Tensor:
    """The sum of Gaussians of a distance, TP, for VidCom2: high near 0."""
    square_TP = away_TPH.square().sum(-1)
    return torch.stack([(-square_TP / (2 * scale)).exp() for scale in SCALES]).sum(0)


def _gather(features_TPC: torch.Tensor, index_K: torch.Tensor) -> Pruned:
    """The tokens at rising indices."""
    frames, tokens, _ = features_TPC.shape
    return Pruned(features_TPC.flatten(0, 1)[index_K], index_K, index_K // tokens, frames * tokens)


def _all(features_TPC: torch.Tensor) -> Pruned:
    """Every token of the layout, in order."""
    frames, tokens, _ = features_TPC.shape
    position_N = torch.arange(frames * tokens, device=features_TPC.device)
    return Pruned(features_TPC.flatten(0, 1), position_N, position_N // tokens, frames * tokens)
