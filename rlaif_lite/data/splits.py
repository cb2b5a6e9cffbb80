"""The splits of a run: which files each is read from, one identity for every record and every video, held-out shares.

A record's `key` is "<split>/<place>", its place among all records of the split's files, counted before any is left out.
So keys are unique whatever ids the files carry, and the same in every run over the same files.

A video has one name in the run's files (`name_videos`) and one key in the feature cache (`video.cache.feature_key`).
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import DataError
from ..recipe import SPLITS, Data, Recipe
from .objects import files_of
from .readers import split_by_answer_length, with_videos
from .records import Record

T = TypeVar("T")
Video = str | tuple[str, ...]

WORLD = "world:"
# The world makes the records of these splits from the same videos.
WORLD_VIDEOS = {
    "sft_easy": "sft",
    "sft_hard": "sft",
    "policy_init": "rl",
    "sft_questions": "sft",
    "rl_questions": "rl",
    "test_questions": "test",
}


class Split(NamedTuple):
    """Where a split's records come from."""

    name: str  # as the stages call it; "sft" before it is cut into easy and hard
    key: str  # of the recipe
    paths: list[str]


class Loaded(NamedTuple):
    """The records of a run."""

    records: dict[str, list[Record]]
    video_names: dict[Video, str]  # of every video that a record has
    missing: set[str]  # names of the videos that are not on the disk


def splits_of(data: Data, folder: Path) -> list[Split]:
    """Every split that the recipe names; `world:rl` is the file that the `data` stage writes into `folder`."""
    keys = {"sft": "sft", **{name: name for name in SPLITS}}
    if data.pairs:
        keys["preference"] = "pairs"
    found = [Split(name, f"data.{key}", [path_of(p, folder) for p in getattr(data, key)]) for name, key in keys.items()]
    return [split for split in found if split.paths]


def path_of(entry: str, folder: Path) -> str:
    """The file that an entry of the recipe's `data` names."""
    return str(folder / f"{entry.removeprefix(WORLD)}.jsonl") if entry.startswith(WORLD) else entry


def own_files(data: Data) -> list[str]:
    """The data files that are the user's, not the world's. Raises DataError for one that is not there."""
    named = [path for key in ("sft", *SPLITS, "pairs") for path in getattr(data, key)]
    files = [Path(path) for path in named if not path.startswith(WORLD)]
    if missing := [str(path) for path in files if not path.exists()]:
        raise DataError(f"There is no data file {', '.join(missing)}. Paths start at {Path.cwd()}.")
    return [str(file) for path in files for file in files_of(path)]


def load_splits(recipe: Recipe, folder: Path, read: Callable[[str], list[Record]]) -> Loaded:
    """Read every split; `sft` files are cut into `sft_easy` and `sft_hard` by the length of the answer.

    `read` gives the records of a file. Those whose video is missing stop the run with their list, or are left out
    (`data.on_missing: skip`)."""
    data, loaded, missing = recipe.data, {}, set()
    for split in splits_of(data, folder):
        loaded[split.name], lost = read_split(split, data, read)
        missing |= lost
    if "sft" in loaded:
        easy, hard = cut_by_length(loaded.pop("sft"), recipe)
        loaded["sft_easy"] = loaded.get("sft_easy", []) + easy
        loaded["sft_hard"] = loaded.get("sft_hard", []) + hard
    videos = (record.video for records in loaded.values() for record in records if record.video is not None)
    return Loaded(loaded, name_videos(videos, roots_of(data, folder)), missing)


def cut_by_length(records: list[Record], recipe: Recipe) -> tuple[list[Record], list[Record]]:
    """(easy, hard) by the length of the answer. Raises DataError where a phase that is to be trained gets none."""
    most = recipe.data.max_easy_words
    easy, hard = split_by_answer_length(records, most, recipe.sft.train_on)
    phases = (("easy", easy, recipe.sft.easy, "every record has"), ("hard", hard, recipe.sft.hard, "no record has"))
    for name, found, section, why in phases:
        if not found and section is not None:
            raise DataError(
                f"data.sft: no record is for sft.{name}, as {why} an answer of more words than "
                f"`data.max_easy_words: {most}`. Change that number, or set `sft.{name}: null`."
            )
    return easy, hard


def read_split(split: Split, data: Data, read: Callable[[str], list[Record]]) -> tuple[list[Record], set[str]]:
    """(the records of a split, each with its key; names of the videos that are missing). Raises DataError."""
    records: list[Record] = []
    for path in split.paths:
        records += read(path)
    records = [replace(record, key=f"{split.name}/{place:05d}") for place, record in enumerate(records)]
    records, missing = with_videos(records)
    names = {video_name(r.video) for r in missing}
    if missing and data.on_missing == "error":
        shown = "\n  ".join(sorted(names)[:20])
        raise DataError(
            f"{split.key}: {len(missing)} records have a video that is not there, among them:\n  {shown}\n"
            "Set `data.video_root` to their folder, or `data.on_missing: skip` to go on without them."
        )
    if split.key == "data.pairs" and (alone := [r.source for r in records if r.chosen is None]):
        raise DataError(
            f"{split.key}: {len(alone)} records hold no pair, the first {alone[0]}. Each needs `chosen` and "
            "`rejected`, or the release's `output_1`, `output_2` and `preference`. Prompts alone go to "
            "`data.preference`."
        )
    return records, names


# ---- videos


def video_name(video: Video) -> str:
    """The path; of frames the first path and a hash of all."""
    if isinstance(video, str):
        return video
    return f"{video[0]} and {len(video) - 1} more ({hashlib.sha256(chr(10).join(video).encode()).hexdigest()[:16]})"


def roots_of(data: Data, folder: Path) -> list[str]:
    """The folders that videos' names leave out: the world's and `data.video_root`."""
    return [str(folder), *([data.video_root] if data.video_root else [])]


def name_videos(videos: Iterable[Video], roots: Sequence[str] = ()) -> dict[Video, str]:
    """{video: its name in the run's files}. Names leave out the first of `roots` that a video lies in, so that a run
    can be moved. Two videos never share a name: the second is then named by its whole path. One file under two
    spellings of its path has one name."""
    names: dict[Video, str] = {}
    place_of: dict[str, Video] = {}
    name_of: dict[Video, str] = {}
    starts = [f"{root}{os.sep}" for root in roots]
    below = lambda path: path.removeprefix(next(filter(path.startswith, starts), ""))
    for video in dict.fromkeys(videos):
        place = os.path.abspath(video) if isinstance(video, str) else tuple(map(os.path.abspath, video))
        if place not in name_of:
            short = below(video) if isinstance(video, str) else tuple(map(below, video))
            name = video_name(short)
            name_of[place] = name if name not in place_of else video_name(place)
            place_of[name_of[place]] = place
        names[video] = name_of[place]
    return names


def hold_out_videos(
    items: Sequence[T], share: float, video_of: Callable[[T], str], seed_of: Callable[[str], int]
) -> tuple[list[T], list[T]]:
    """(rest, held out): all items about a random `share` of the videos, at least one video, are held out.

    `seed_of(video)` orders the videos, so that the order of the items decides nothing."""
    videos = sorted({video_of(item) for item in items}, key=seed_of)
    held = set(videos[: math.ceil(round(share * len(videos), 9))])
    return [i for i in items if video_of(i) not in held], [i for i in items if video_of(i) in held]
