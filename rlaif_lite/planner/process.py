"""What the process holds beside the tensors that a stage computes with: records, the features that were read, and free
heap that no trimming gives back. On a GPU all of it is host memory.

Stages of one run share the process, so what one has read a later one still holds; a stage that was done before leaves
nothing. Every constant was measured on Linux with the embedded base, as growth of the resident set.
"""

from typing import NamedTuple

from ..data.splits import WORLD_VIDEOS
from ..recipe import Recipe
from ..video.cache import HELD_BYTES
from .lengths import Lengths
from .shapes import Shapes, video_tokens

RECORD = 1500  # bytes of a record in memory
VIEW = 7500  # of the objects around the six tensors of a view
FILE = 2500  # a video's file is mapped whole, and mapped memory comes in pages
LEFT = 0.1  # of what the largest activations before took beyond this stage's, still held after they were freed


class Videos(NamedTuple):
    """Videos that come together, in one split or in several."""

    count: int
    views: float  # of each: the whole, and clips
    features: float  # bytes of one, all its views
    known: bool  # false: the files of its records are not here

    @property
    def held(self) -> int:
        """Bytes in memory when all have been read."""
        return int(self.count * (self.features + self.views * VIEW + FILE))


def videos_of(recipe: Recipe, bases: list[Shapes], lengths: Lengths) -> dict[str, Videos]:
    """The videos behind each split and what their features take, those for every base together."""
    section = recipe.features
    each = lambda shapes: shapes.width * shapes.dtype.itemsize * (1 + shapes.deepstack)
    whole, clip = (
        sum(video_tokens(shapes, section, frames) * each(shapes) for shapes in bases)
        for frames in (section.frames, section.clip_frames)
    )
    found: dict[str, Videos] = {}
    for split, texts in lengths.splits.items():
        name = name_of(recipe, split)
        clips = section.clips if split in recipe.narrated else texts.clips
        before = found.get(name, Videos(0, 0.0, 0.0, True))
        clips = max(clips, before.views - 1)
        known = texts.known and before.known
        found[name] = Videos(max(texts.videos, before.count), 1 + clips, whole + clips * clip, known)
    return found


def name_of(recipe: Recipe, split: str) -> str:
    """The name under which the videos of `split` are shared."""
    return WORLD_VIDEOS.get(split, split) if recipe.data.world else split


def videos_read(recipe: Recipe) -> dict[str, set[str]]:
    """{stage: the videos whose features it reads}"""
    sft = (("easy", "sft_easy"), ("hard", "sft_hard"), ("policy_init", "policy_init"))
    splits = {
        "sft": [split for phase, split in sft if getattr(recipe.sft, phase) is not None],
        "context": recipe.narrated,
        "preference": ["preference"] if recipe.data.preference else [],
        "reward": ["preference"],
        "dpo": ["preference"],
        "ppo": ["rl"],
        "evaluate": ["test"] if recipe.evaluate.roles else [],
    }
    return {stage: {name_of(recipe, split) for split in splits.get(stage, ())} for stage in recipe.stages}


class Left(NamedTuple):
    """What a stage finds in the process, by who brought it there."""

    own: int  # features that it reads itself
    features: dict[str, int]  # that only earlier stages read, by the last of them
    heap: dict[str, int]  # free memory that earlier stages left behind


def left_over(recipe: Recipe, videos: dict[str, Videos], activations: dict[str, int]) -> dict[str, Left]:
    """{stage: Left} in a run from its beginning; `activations`: the most that each stage's take of the heap."""
    read, found = videos_read(recipe), {}
    for place, stage in enumerate(recipe.stages):
        seen, most = read[stage], activations[stage]
        room = HELD_BYTES
        room -= (own := min(room, size_of(videos, seen)))
        features, heap = {}, {}
        for earlier in reversed(recipe.stages[:place]):
            room -= (more := min(room, size_of(videos, read[earlier] - seen)))
            features[earlier] = more
            heap[earlier] = int(LEFT * max(0, activations[earlier] - most))
            seen, most = seen | read[earlier], max(most, activations[earlier])
        found[stage] = Left(own, features, heap)
    return found


def size_of(videos: dict[str, Videos], names: set[str]) -> int:
    """Bytes that the features of the videos of `names` hold in memory."""
    return sum(videos[name].held for name in names if name in videos)
