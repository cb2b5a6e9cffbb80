"""A video with its frames in another order, or some of them missing, made from features before they are pruned.

No tower runs: the frames' features are permuted, and keep the times and positions of the places that they move to.
Families that merge frames before the decoder (Qwen-VL: two) move the merged ones.

Shapes: L levels (1 + deepstack layers), G frames after merging in time, P tokens per frame, D width.
"""

import math

import torch
from torch import Tensor

MARK = "~"  # in a view's name, before how it was altered: "video~shuffled"


def altered(kind: str, features_LGPD: Tensor, time_G: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(features, times) of the altered video.

    shuffled: in a random order, never the true one where there are two frames. reversed: the last frame first. dropped:
    a random half of the frames, in order, at their own times. Raises ValueError for another kind.
    """
    frames, generator = len(time_G), torch.Generator().manual_seed(seed)
    if kind == "reversed":
        return features_LGPD.flip(1), time_G
    if kind == "dropped":
        kept = torch.randperm(frames, generator=generator)[: math.ceil(frames / 2)].sort().values
        return features_LGPD[:, kept.to(features_LGPD.device)], time_G[kept]
    if kind != "shuffled":
        raise ValueError(f"a video is altered as {kind!r}; known are shuffled, reversed and dropped")
    order = torch.randperm(frames, generator=generator)
    if torch.equal(order, torch.arange(frames)):
        order = order.roll(1)
    return features_LGPD[:, order.to(features_LGPD.device)], time_G


def name_of(view: str, kind: str) -> str:
    """The altered view's name."""
    return f"{view}{MARK}{kind}"


def parts_of(name: str) -> tuple[str, str]:
    """(the view, how it was altered, "" where it was not) of a view's name."""
    view, _, kind = name.partition(MARK)
    return view, kind
