"""The video narrative: captions of consecutive clips, joined in the order of time (VLM-RLAIF section 3.2).

The judge reads it together with the video. Each clip is seen with more frames per second than the whole video is, so
the narrative holds what the judge's own view of the video misses.
"""

from collections.abc import Sequence

from ..data.sentences import says_something
from ..video.cache import FeatureRecord


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
