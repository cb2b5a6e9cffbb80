"""The video narrative: captions of consecutive clips, joined in the order of time (VLM-RLAIF section 3.2).

The judge reads it together with the video. Each clip is seen with more frames per second than the whole video is, so
the narrative holds what the judge's own view of the video misses.

i-SRT (arXiv 2406.11280) makes it again in every round: the policy describes each clip while it reads its own last
description. With `features.clips: 1` it describes the whole video at once, as published.
"""

from collections.abc import Sequence

from ..data.records import VIDEO_MARK, Message
from ..data.sentences import says_something
from ..model.inputs import encode_prompt
from ..model.roles import ActiveRole
from ..recipe import Context
from ..rollout import greedy_texts
from ..video.cache import FeatureRecord


def captions_of(
    role: ActiveRole, videos: Sequence[Sequence[FeatureRecord]], prompts: Sequence[str], section: Context
) -> list[list[str]]:
    """What a role writes of each clip of each video, in order; `prompts`: the request for each video. Decoding is
    greedy, so a caption is a function of the adapter and its request."""
    rows = []
    for clips, prompt in zip(videos, prompts, strict=True):
        content = prompt if VIDEO_MARK in prompt else f"{VIDEO_MARK}\n{prompt}"
        rows += [encode_prompt(role.roles.base, [Message("user", content)], clip) for clip in clips]
    found = iter(greedy_texts(role, rows, section.max_new_tokens, section.batch_size))
    return [[next(found) for _ in clips] for clips in videos]


def narrative(captions: Sequence[str], markers: Sequence[str], spans: Sequence[tuple[float, float]]) -> str:
    """Join clip captions in order. `markers` ("first", "then", ...) precede them when the recipe gives one per clip.

    Otherwise each caption is headed by its clip's entry of `spans`, the times of the clip's first and last frame in
    seconds. Clips have equal counts of frames, which are unequal spans of time at a variable frame rate. A
    caption without a word is left out, with its marker.
    """
    heads = markers or [f"[{start:.1f}s-{end:.1f}s]" for start, end in spans]
    said = zip(heads, captions, strict=True)
    return " ".join(f"{head} {caption}" for head, caption in said if says_something(caption))


def spans_of(clips: Sequence[FeatureRecord]) -> list[tuple[float, float]]:
    """Seconds of each clip's first and last frame."""
    return [(float(clip.time_T[0]), float(clip.time_T[-1])) for clip in clips]
