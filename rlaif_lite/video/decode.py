"""Frames with their true times, from a video file, a folder of frames, or a list of them.

Sampling is uniform: the middle frame of each of `count` equal segments, of the whole video or of one of its clips. Times come from
the decoder, never from an index and an average rate (wrong for variable frame rates); they count from the first frame.

decord decodes. Where it is known to be silently wrong the file goes to PyAV, which decodes from the start and in order:
  - stream-copied cuts (edit lists): decord counts the hidden frames and returns frames out of order;
  - MPEG-TS: it loses the first frames and seeks several frames off;
  - timestamps that run backwards, or a frame count other than the container's.
A file that decord refuses is tried with PyAV too (newer codecs). What neither reads raises VideoError with both reasons.

Shapes: T frames, H rows, W columns, C = 3 (RGB).
"""

import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from rlaif_lite.errors import VideoError

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for this platform: PyAV decodes everything
    decord = None

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class View(NamedTuple):
    """One sampling of a video."""

    count: int  # frames
    clip: int | None = None  # which of `clips` equal segments, from 0; None is the whole video
    clips: int = 1


class Frames(NamedTuple):
    """Decoded frames of one view."""

    rgb_THWC: np.ndarray  # uint8
    time_T: np.ndarray  # float64, seconds since the first frame of the video
    duration: float  # seconds, of the whole video
    source: str  # "decord", "pyav" or "images"
    timed: bool  # False for frame images: they carry no times, so each is given one second


class Probe(NamedTuple):
    """What a video is, without decoding it."""

    frames: int
    duration: float  # seconds
    height: int
    width: int
    source: str  # who will decode it: "decord", "pyav" or "images"
    reason: str  # why not decord; "" where it is decord
    timed: bool


def sample_indices(frames: int, view: View) -> np.ndarray:
    """int64 indices of `view` in a video of `frames` frames: floor((i + .5) * n / count) within the segment.

    Asking for more frames than there are repeats some. A clip of a video with fewer frames than clips has one frame.
    """
    first, end = 0, frames
    if view.clip is not None:
        first = min(view.clip * frames // view.clips, frames - 1)
        end = max(first + 1, (view.clip + 1) * frames // view.clips)
    step = np.arange(view.count)
    return first + (2 * step + 1) * (end - first) // (2 * view.count)


def decode(path_or_frames, *, count: int, clip: int | None = None, clips: int = 1, size: tuple[int, int] | None = None) -> Frames:
    """`count` frames of a video, or of segment number `clip` of `clips`; `size` (H, W) resizes while decoding.

    Raises VideoError naming the file and the decoder's reason.
    """
    return decode_views(path_or_frames, {"view": View(count, clip, clips)}, size=size)["view"]


def decode_views(path_or_frames, views: dict[str, View], *, size: tuple[int, int] | None = None) -> dict[str, Frames]:
    """Several samplings of one video in one pass over it; only frames that some view needs are held. Raises as `decode`."""
    for name, view in views.items():
        if view.count < 1 or view.clips < 1 or not 0 <= (view.clip or 0) < view.clips:
            raise ValueError(f"view {name}: {view} does not name frames")
    video = _open(path_or_frames, size)
    try:
        return _read(video, views)
    except VideoError as error:
        if not isinstance(video, _Decord):
            raise
        return _read(_PyAV(video.facts, size, f"decord: {error}"), views)


def probe(path_or_frames) -> Probe:
    """What a video is; nothing but its first frame is decoded. Raises as `decode`."""
    video = _open(path_or_frames, None)
    return Probe(len(video.time_N), video.duration, *video.shape, video.source, video.reason, video.timed)


def _read(video, views: dict[str, View]) -> dict[str, Frames]:
    index = {name: sample_indices(len(video.time_N), view) for name, view in views.items()}
    wanted = np.unique(np.concatenate(list(index.values())))
    rgb_NHWC = video.read(wanted)
    return {
        name: Frames(rgb_NHWC[np.searchsorted(wanted, at)], video.time_N[at], video.duration, video.source, video.timed)
        for name, at in index.items()
    }


def _open(path_or_frames, size: tuple[int, int] | None):
    """The reader for this video: frames in a list or a folder, else decord, else PyAV. Size is (H, W)."""
    if isinstance(path_or_frames, (tuple, list)):
        return _Images([str(path) for path in path_or_frames], size)
    path = str(path_or_frames)
    if os.path.isdir(path):
        found = [str(entry) for entry in Path(path).iterdir() if entry.suffix.lower() in IMAGES]
        if not found:
            raise VideoError(f"{path}: the folder holds no frames ({', '.join(IMAGES)}).")
        return _Images(sorted(found, key=_natural), size)
    if path.lower().endswith(IMAGES):
        return _Images([path], size)
    if not os.path.exists(path):
        raise VideoError(f"{path}: there is no such file.")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes).")
    facts = _facts(path)
    why_not = "decord is not installed" if decord is None else facts.why_not_decord
    if not why_not:
        try:
            return _Decord(facts, size)
        except VideoError as error:
            why_not = str(error)
    return _PyAV(facts, size, why_not)


# ---- what the container says ------------------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What the packets of a file say, without decoding any."""

    path: str
    time_N: np.ndarray  # float64, seconds of each frame that is shown, from the first
    duration: float
    why_not_decord: str  # "" where decord can be trusted, as far as the container shows


def _facts(path: str) -> _Facts:
    """Read all packets (a fraction of a millisecond for a small file). Raises VideoError for a file that is not a whole video."""
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if stream is None or "attached_pic" in str(stream.disposition):
                raise VideoError(f"{path}: it has no video stream, only {_kinds(container)}.")
            format, alone = container.format.name, len(container.streams) == 1
            packets = [packet for packet in container.demux(stream) if packet.size]
            expected = _expected_seconds(container, stream, format, alone)
            tick = float(stream.time_base)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: it is not a video that can be read ({_brief(error)}).") from None
    if format.endswith("_pipe") or format in ("image2", "tty"):
        raise VideoError(f"{path}: its content is not a video ({format}); the extension is wrong.")
    if not packets:
        raise VideoError(f"{path}: its video stream holds no frames.")
    shown = [packet for packet in packets if not packet.is_discard]
    stamped = bool(shown) and all(packet.pts is not None for packet in shown)
    pts = np.array(sorted(packet.pts for packet in shown) if stamped else range(len(shown)), dtype=np.float64) * tick
    gap = float(np.median(np.diff(pts))) if len(pts) > 1 else 0.0
    last = (shown[-1].duration or 0) * tick or gap
    time_N, duration = pts - pts[0], float(pts[-1] - pts[0] + last)
    if format.startswith("mov") and any(packet.is_corrupt for packet in packets):
        raise VideoError(f"{path}: it is cut short; a frame of its index lies beyond the end of the file.")
    if expected - duration > max(3 * gap, 0.02 * expected):
        raise VideoError(f"{path}: it is cut short; it should last {expected:.2f} s and its frames end at {duration:.2f} s.")
    why = ""
    if not format.startswith(("mov", "matroska", "avi")):
        why = f"decord cannot be trusted with {format}"
    elif len(shown) < len(packets):
        why = f"an edit list hides {len(packets) - len(shown)} frames (a stream-copied cut)"
    elif not packets[0].is_keyframe:
        why = "it does not begin with a key frame"
    elif not stamped or (np.diff(pts) <= 0).any():
        why = "timestamps are missing or repeated"
    return _Facts(path, time_N, duration, why)


def _expected_seconds(container, stream, format: str, alone: bool) -> float:
    """How long the header says that the video lasts; 0 where it says nothing about this stream."""
    if format.startswith("mov"):
        return float((stream.duration or 0) * stream.time_base)
    if format.startswith("avi"):
        return float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    return (container.duration or 0) / av.time_base if format.startswith("matroska") and alone else 0.0


def _kinds(container) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


# ---- the readers: time_N, duration, shape (H, W), source, reason, timed, read(indices in rising order) -> rgb_THWC -------------


class _Decord:
    source, reason, timed = "decord", "", True

    def __init__(self, facts: _Facts, size: tuple[int, int] | None):
        self.facts, self.time_N, self.duration = facts, facts.time_N, facts.duration
        height, width = size or (-1, -1)
        try:
            self.reader = decord.VideoReader(facts.path, num_threads=1, height=height, width=width)
            begin_N = self.reader.get_frame_timestamp(range(len(self.reader)))[:, 0].astype(np.float64)
        except Exception as error:  # decord's errors share no useful base class
            raise VideoError(f"decord: {_brief(error)}") from None
        if len(begin_N) != len(self.time_N):
            raise VideoError(f"decord counts {len(begin_N)} frames, the container {len(self.time_N)}")
        if not np.allclose(begin_N - begin_N[0], self.time_N, rtol=1e-5, atol=2e-3):  # decord's times are float32
            raise VideoError("decord's timestamps are not the container's")

    @property
    def shape(self) -> tuple[int, int]:
        return self.reader[0].shape[:2]

    def read(self, indices: np.ndarray) -> np.ndarray:
        try:
            return self.reader.get_batch(indices.tolist()).asnumpy()
        except Exception as error:
            raise VideoError(f"decord: {_brief(error)}") from None


class _PyAV:
    """Decodes from the start and in order, which is right for every file and slow for long ones."""

    source, timed = "pyav", True

    def __init__(self, facts: _Facts, size: tuple[int, int] | None, reason: str):
        self.path, self.time_N, self.duration, self.size, self.reason = facts.path, facts.time_N, facts.duration, size, reason
        _say(self.path, reason)

    @property
    def shape(self) -> tuple[int, int]:
        return self.read(np.array([0])).shape[1:3]

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted, images, count = set(indices.tolist()), [], 0
        try:
            with av.open(self.path) as container:
                for count, frame in enumerate(container.decode(container.streams.best("video"))):
                    if count in wanted:
                        images.append(self._rgb(frame))
                    if len(images) == len(wanted):
                        break
        except av.FFmpegError as error:
            raise VideoError(f"{self.path}: it cannot be decoded after frame {count} ({_brief(error)}; {self.reason}).") from None
        if len(images) < len(wanted):
            raise VideoError(f"{self.path}: only {count} of {len(self.time_N)} frames can be decoded ({self.reason}).")
        return np.stack(images)

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """The frame upright (PyAV leaves the rotation of phone videos to its caller) and at the size asked for."""
        turns = round(frame.rotation / 90)
        height, width = self.size or (None, None)
        if turns % 2:
            height, width = width, height
        rgb_HWC = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")  # decord's own scaling
        return np.ascontiguousarray(np.rot90(rgb_HWC, turns))


class _Images:
    source, reason, timed = "images", "frames are images", False

    def __init__(self, paths: list[str], size: tuple[int, int] | None):
        if not paths:
            raise VideoError("a list of frames is empty.")
        self.paths, self.size = paths, size
        self.time_N, self.duration = np.arange(len(paths), dtype=np.float64), float(len(paths))

    @property
    def shape(self) -> tuple[int, int]:
        return self.read(np.array([0])).shape[1:3]

    def read(self, indices: np.ndarray) -> np.ndarray:
        images = []
        for path in (self.paths[i] for i in indices):
            try:
                with Image.open(path) as image:
                    image = image.convert("RGB")
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise VideoError(f"{path}: the frame cannot be read ({_brief(error)}).") from None
            if self.size:
                image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
            images.append(np.asarray(image))
            if images[-1].shape != images[0].shape:
                raise VideoError(f"{path}: {images[-1].shape[:2]} pixels, the frames before it {images[0].shape[:2]}; give a size.")
        return np.stack(images)


@lru_cache(maxsize=None)
def _say(path: str, reason: str) -> None:
    """Once for each file and reason; a GIF is no surprise."""
    level = logging.INFO if path.lower().endswith(".gif") else logging.WARNING
    log.log(level, "%s: decoded with PyAV, in order: %s.", path, reason)


def _natural(path: str) -> list:
    """Sorts frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _brief(error: Exception) -> str:
    """The last line of a decoder's message, without its stack trace."""
    lines = [line.strip() for line in str(error).split("Stack trace")[0].splitlines() if line.strip()]
    return lines[-1][-200:] if lines else type(error).__name__
