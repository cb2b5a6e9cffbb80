"""What the process holds besides the tensors that a stage computes with: records, and the features that were read.

On a GPU all of it is host memory. The constants were measured on Linux with the embedded base, as growth of the
resident set.
"""

from typing import NamedTuple

from ..recipe import Recipe
from ..video.cache import HELD_BYTES
from .lengths import Lengths
from .shapes import Shapes, video_tokens

RECORD = 1500  # bytes of a record in memory
WORD = 1000  # bytes of a word of the tokenizer: its text, its number and its merge
LIBRARIES = 35 << 20  # that the first training stage brings in
VIEW = 8000  # of the objects around the six tensors of a view, and what its file is larger in whole pages
# The world makes the records of these splits from the same videos.
SHARED = {"sft_easy": "sft", "sft_hard": "sft", "policy_init": "rl"}


class Videos(NamedTuple):
    """Videos that come together, in one split or in several."""

    count: int
    views: float  # of each: the whole, and clips
    features: float  # bytes of one, all its views
    known: bool  # false: the files of its records are not here


def videos_of(recipe: Recipe, bases: list[Shapes], lengths: Lengths) -> list[Videos]:
    """The videos of the run and what their features take, those for every base together."""
    section = recipe.features
    each = lambda shapes: shapes.width * shapes.dtype.itemsize * (1 + shapes.deepstack)
    whole, clip = (
        sum(video_tokens(shapes, section, frames) * each(shapes) for shapes in bases)
        for frames in (section.frames, section.clip_frames)
    )
    found: dict[str, Videos] = {}
    for split, texts in lengths.splits.items():
        name = SHARED.get(split, split) if recipe.data.world else split
        clips = section.clips if split in recipe.narrated else texts.clips
        before = found.get(name, Videos(0, 0.0, 0.0, True))
        clips = max(clips, before.views - 1)
        known = texts.known and before.known
        found[name] = Videos(max(texts.videos, before.count), 1 + clips, whole + clips * clip, known)
    return list(found.values())


def held(videos: list[Videos], lengths: Lengths, vocabulary: int) -> dict[str, int]:
    """Bytes by kind, when every record and as many features as the store keeps have been read, and all libraries."""
    features = sum(v.count * (v.features + v.views * VIEW) for v in videos)
    records = sum(texts.records for texts in lengths.splits.values())
    found = {"records": RECORD * records, "features": min(HELD_BYTES, int(features))}
    return found | {"tokenizer": WORD * vocabulary, "libraries": LIBRARIES}
