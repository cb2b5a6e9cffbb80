"""The video narrative: captions of consecutive clips, joined in the order of time (VLM-RLAIF section 3.2).

The judge reads it beside the video. Each clip is seen with more frames per second than the whole video is, so the
narrative holds what the judge's own view of the video misses.
"""

from collections.abc import Sequence


def narrative(captions: Sequence[str], markers: Sequence[str], seconds: float) -> str:
    """Join clip captions in order. `markers` ("first", "then", ...) stand before them when the recipe gives as many;
    otherwise each caption is headed by the span of its clip, `seconds` being the video's length."""
    if markers:
        return " ".join(f"{marker} {caption}" for marker, caption in zip(markers, captions, strict=True))
    span = seconds / len(captions)
    return " ".join(f"[{i * span:.1f}s-{(i + 1) * span:.1f}s] {caption}" for i, caption in enumerate(captions))
