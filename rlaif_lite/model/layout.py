"""A video's tokens as they are cached: pruned, and placed on the layout that the family's processor would write.

Positions are computed once, before anything is dropped, and kept with the tokens (`video/cache.py`). In three
dimensions they are (time, row, column), and the text after a run goes on at the larger of its rows and columns, as
transformers has it from 5.3 on (earlier releases and the Qwen2-VL paper let the time count as well).

Shapes: T frames, G frames after merging in time, P tokens per frame, K tokens kept, N of the layout, C channels of a
position, D width, L = 1 + deepstack layers.
"""

import torch
from torch import Tensor

from ..errors import RecipeError
from ..video.cache import FeatureRecord
from ..video.prune import apply
from .families import Encoded, Family


def check_chain(family: Family, name: str, chain: list[dict]) -> None:
    """Raise RecipeError for a prune chain that a family cannot have."""
    if any("st_mean" in step for step in chain) and (family.write or family.mrope):
        raise RecipeError(
            f"features.prune: st_mean makes tokens of no time and place, and `{name}` gives each frame its own. "
            "Use another selector, such as evs or vidcom2, or pool and one of them."
        )


def merged_times(time_T: Tensor, frames: int) -> Tensor:
    """Seconds of frames merged by `frames`: the middle between the first and the last of each; short ones repeat."""
    short = -len(time_T) % frames
    groups_GF = torch.cat([time_T, time_T[-1:].expand(short)]).unflatten(0, (-1, frames))
    return (groups_GF[:, 0] + groups_GF[:, -1]) / 2


def lay_out(
    family: Family,
    config,
    encoded: Encoded,
    chain: list[dict],
    *,
    time_G: Tensor,
    frames: int,
    duration: float,
    seed: int = 0,
) -> FeatureRecord:
    """Prune one view of a video and place what is left. time_G: seconds of each merged frame; frames: as sampled; seed:
    the video's own."""
    _, groups, tokens, _ = encoded.features_LGPD.shape
    pruned = apply(chain, encoded.features_LGPD[0], encoded.grid, seed)
    rows, columns = encoded.grid
    pools = [step for step in chain if "pool" in step]
    if pools:
        rows = columns = pools[0]["pool"]
        tokens_left = rows * columns
    else:
        tokens_left = tokens
    numbered_anew = any("st_mean" in step for step in chain)
    per_frame = family.per_frame and not numbered_anew
    frame_K, within_K = pruned.position_K // tokens_left, pruned.position_K % tokens_left
    if family.mrope is not None:
        times_G = family.mrope(config, time_G).to(frame_K.device)
        position_CK = torch.stack([times_G[frame_K], within_K // columns, within_K % columns])
        span = max(rows, columns)
    else:
        position_CK = (within_K if per_frame else pruned.position_K)[None]
        span = tokens_left if per_frame else pruned.layout_tokens
    kept_R = torch.bincount(frame_K, minlength=groups) if per_frame else torch.tensor([len(frame_K)])
    span_R = torch.full((groups,) if per_frame else (1,), span)
    deepstack = [apply(pools, layer_GPD, encoded.grid).features_KC for layer_GPD in encoded.features_LGPD[1:]]
    record = FeatureRecord(
        features_KD=pruned.features_KC.cpu(),
        position_CK=position_CK.cpu(),
        frame_K=pruned.frame_K.cpu(),
        time_T=time_G,
        kept_R=kept_R.cpu(),
        span_R=span_R,
        layout_tokens=groups * tokens,
        frames=frames,
        duration=duration,
        deepstack_LKD=torch.stack([layer_ND[pruned.position_K] for layer_ND in deepstack]).cpu() if deepstack else None,
    )
    return record if encoded.tail_D is None else _with_tail(record, encoded.tail_D.cpu())


def _with_tail(record: FeatureRecord, tail_D: Tensor) -> FeatureRecord:
    """One more token behind the layout of a single run of 1-D positions, whatever was pruned of it."""
    return record._replace(
        features_KD=torch.cat([record.features_KD, tail_D[None]]),
        position_CK=torch.cat([record.position_CK, record.span_R[None]], 1),
        frame_K=torch.cat([record.frame_K, torch.tensor([-1])]),
        kept_R=record.kept_R + 1,
        span_R=record.span_R + 1,
        layout_tokens=record.layout_tokens + 1,
    )
