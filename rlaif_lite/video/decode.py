"""Frames with their true times, from a video file, a folder of frames, or a list of them.

Sampling is uniform: the middle frame of each of `count` equal segments, of the whole video or of one of its clips.
Times are the file's own, never an index over an average rate (wrong for variable frame rates), from the first frame.

decord decodes. Where it is known to be wrong without an error (`container.py` lists it) the file goes to PyAV, which
decodes from the start and in order. A file that decord refuses is tried with PyAV too (newer codecs). What neither
reads raises VideoError with the reasons. `Frames.reason` says why it was not decord.

A run calls this in worker processes only (`workers.py`): a file may crash its decoder.

Shapes: T frames, H rows, W columns, C = 3 (RGB).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import VideoError
from . import readers
from .container import FRAME_LIMIT, read_facts, require_file
from .frame_size import FrameSize
from .pictures import SUFFIXES as IMAGES
from .pictures import AnimationReader, PictureReader, is_animated, natural, open_picture
from .readers import DecordReader, PyAVReader

__all__ = ["IMAGES", "Frames", "Reader", "View", "decode", "decode_views", "open_video", "read_views"]

Reader = DecordReader | PyAVReader | PictureReader | AnimationReader


class View(NamedTuple):
    """One sampling of a video."""

    count: int  # frames
    clip: int | None = None  # which of `clips` equal segments, from 0; None is the whole video
    clips: int = 1
    seconds: tuple[float, float] | None = None  # the part between two times since the first frame, in place of a clip


class Frames(NamedTuple):
    """Decoded frames of one view."""

    rgb_THWC: np.ndarray  # uint8
    time_T: np.ndarray  # float64, seconds since the first frame of the video
    duration: float  # seconds, of the whole video
    source: str  # "decord", "pyav" or "images"
    reason: str  # why PyAV and not decord; "" where it is not PyAV
    timed: bool  # False for still pictures: they carry no times, so each is given one second


def sample_indices(frames: int, view: View) -> np.ndarray:
    """int64 indices of `view` in a video of `frames` frames: floor((i + .5) * n / count) within the segment.

    Asking for more frames than there are repeats some. A clip of a video with fewer frames than clips has one frame.
    """
    first, end = 0, frames
    if view.clip is not None:
        first, end = view.clip * frames // view.clips, (view.clip + 1) * frames // view.clips
    step = np.arange(view.count)
    return first + (2 * step + 1) * (end - first) // (2 * view.count)


def indices_between(time_N: np.ndarray, view: View) -> np.ndarray:
    """int64 indices of `view`, of the frames between its two times; of the one frame next to them where there is none.

    time_N: seconds of all frames, not falling."""
    if view.seconds is None:
        return sample_indices(len(time_N), view)
    first = min(int(np.searchsorted(time_N, view.seconds[0], "left")), len(time_N) - 1)
    end = max(int(np.searchsorted(time_N, view.seconds[1], "right")), first + 1)
    return first + sample_indices(end - first, View(view.count))


def decode(
    path_or_frames: str | os.PathLike | Sequence[str],
    *,
    count: int,
    clip: int | None = None,
    clips: int = 1,
    size: tuple[int, int] | None = None,
) -> Frames:
    """`count` frames of a video, or of segment number `clip` of `clips`; `size` (H, W) resizes while decoding.

    The video is a file, a folder of frames (in natural order of their names) or the frames' paths in order.
    Raises VideoError naming the file and the decoder's reason.
    """
    return decode_views(path_or_frames, {"view": View(count, clip, clips)}, size=size)["view"]


def decode_views(
    path_or_frames: str | os.PathLike | Sequence[str],
    views: dict[str, View],
    *,
    size: tuple[int, int] | FrameSize | None = None,
    frame_limit: int = FRAME_LIMIT,
) -> dict[str, Frames]:
    """Several samplings of one video in one pass; only frames that some view needs are held. Raises as `decode`.

    frame_limit: pixels; a video or picture with larger frames is refused.
    """
    return read_views(open_video(path_or_frames, size, frame_limit), views)


def open_video(
    path_or_frames: str | os.PathLike | Sequence[str],
    size: tuple[int, int] | FrameSize | None = None,
    frame_limit: int = FRAME_LIMIT,
) -> Reader:
    """The reader for a video; at most its first frame is decoded. size: (H, W) of the frames it will give.

    A list or a folder is read as pictures, a file by decord or else by PyAV. Raises as `decode`.
    """
    if isinstance(size, FrameSize):
        by_shape = size.shorter or size.longer or size.multiple
        shape = open_video(path_or_frames, None, frame_limit).shape if by_shape else (0, 0)
        size = size(*shape)
    if isinstance(path_or_frames, (tuple, list)):
        return PictureReader([str(path) for path in path_or_frames], size, frame_limit)
    path = str(path_or_frames)
    if os.path.isdir(path):
        found = [str(entry) for entry in Path(path).iterdir() if entry.suffix.lower() in IMAGES]
        if not found:
            raise VideoError(f"{path}: the folder holds no frames ({', '.join(IMAGES)}).")
        return PictureReader(sorted(found, key=natural), size, frame_limit)
    require_file(path)
    if path.lower().endswith(IMAGES):
        with open_picture(path, frame_limit) as picture:
            animated = is_animated(picture)
        return AnimationReader(path, size, frame_limit) if animated else PictureReader([path], size, frame_limit)
    facts = read_facts(path, frame_limit)
    why_not = "decord is not installed" if readers.decord is None else facts.why_not_decord
    if not why_not:
        try:
            return DecordReader(facts, size)
        except VideoError as error:
            why_not = str(error)
    return PyAVReader(facts, size, why_not)


def read_views(video: Reader, views: dict[str, View]) -> dict[str, Frames]:
    """The frames of all views. Where decord fails on a frame, PyAV reads the file again. Raises as `decode`."""
    for name, view in views.items():
        if view.count < 1 or view.clips < 1 or not 0 <= (view.clip or 0) < view.clips:
            raise ValueError(f"view {name}: {view} does not name frames")
    try:
        return _read(video, views)
    except VideoError as error:
        if not isinstance(video, DecordReader):
            raise
        return _read(PyAVReader(video.facts, video.size, str(error)), views)


def _read(video: Reader, views: dict[str, View]) -> dict[str, Frames]:
    rgb_NHWC = None
    while rgb_NHWC is None:  # None: there are fewer frames than the container said, and time_N has been corrected
        index = {name: indices_between(video.time_N, view) for name, view in views.items()}
        wanted = np.unique(np.concatenate(list(index.values())))
        rgb_NHWC = video.read(wanted)
    about = (video.duration, video.source, video.reason, video.timed)
    return {name: Frames(rgb_NHWC[np.searchsorted(wanted, at)], video.time_N[at], *about) for name, at in index.items()}
