"""Frames with their true times, from a video file, a folder of frames, or a list of them.

Sampling is uniform: the middle frame of each of `count` equal segments, of the whole video or of one of its clips.
Times are the file's own, never an index over an average rate (wrong for variable frame rates), from the first frame.

decord decodes. Where it is known to be silently wrong the file goes to PyAV, which decodes from the start and in order
(slower for long files, right for all). It shows in the packets, which are read once per file without decoding:
  - stream-copied cuts (edit lists): decord counts the hidden frames and returns frames out of order;
  - MPEG-TS and other formats without an index: it loses the first frames and seeks several frames off;
  - open groups of pictures (x265's default, MPEG-4 and MPEG-2 with B-frames): it is some frames off after a seek;
  - missing or repeated timestamps; a frame count or timestamps other than the container's.
A file that decord refuses is tried with PyAV too (newer codecs). What neither reads raises VideoError with the reasons.
`Frames.reason` says why it was not decord.

Shapes: T frames, H rows, W columns, C = 3 (RGB).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from ..errors import VideoError
from .frame_size import FrameSize

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for this platform: PyAV decodes everything
    decord = None

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
    reason: str  # why PyAV and not decord; "" where it is not PyAV
    timed: bool  # False for frame images: they carry no times, so each is given one second


class Probe(NamedTuple):
    """What a video is, without decoding it."""

    frames: int
    duration: float  # seconds
    height: int
    width: int
    source: str  # who will decode it: "decord", "pyav" or "images"
    reason: str  # why PyAV and not decord; "" where it is not PyAV
    timed: bool


def sample_indices(frames: int, view: View) -> np.ndarray:
    """int64 indices of `view` in a video of `frames` frames: floor((i + .5) * n / count) within the segment.

    Asking for more frames than there are repeats some. A clip of a video with fewer frames than clips has one frame.
    """
    first, end = 0, frames
    if view.clip is not None:
        first, end = view.clip * frames // view.clips, (view.clip + 1) * frames // view.clips
    step = np.arange(view.count)
    return first + (2 * step + 1) * (end - first) // (2 * view.count)


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
) -> dict[str, Frames]:
    """Several samplings of one video in one pass; only frames that some view needs are held. Raises as `decode`."""
    for name, view in views.items():
        if view.count < 1 or view.clips < 1 or not 0 <= (view.clip or 0) < view.clips:
            raise ValueError(f"view {name}: {view} does not name frames")
    if isinstance(size, FrameSize):
        about = probe(path_or_frames) if size.needs_shape else None
        size = size(about.height, about.width) if about else size(0, 0)
    video = _open(path_or_frames, size)
    try:
        return _read(video, views)
    except VideoError as error:
        if not isinstance(video, _Decord):
            raise
        return _read(_PyAV(video.facts, size, str(error)), views)


def probe(path_or_frames) -> Probe:
    """What a video is; nothing but its first frame is decoded. Raises as `decode`."""
    video = _open(path_or_frames, None)
    return Probe(len(video.time_N), video.duration, *video.shape, video.source, video.reason, video.timed)


def _read(video, views: dict[str, View]) -> dict[str, Frames]:
    rgb_NHWC = None
    while rgb_NHWC is None:  # None: there are fewer frames than the container said, and time_N has been set right
        index = {name: sample_indices(len(video.time_N), view) for name, view in views.items()}
        wanted = np.unique(np.concatenate(list(index.values())))
        rgb_NHWC = video.read(wanted)
    about = (video.duration, video.source, video.reason, video.timed)
    return {name: Frames(rgb_NHWC[np.searchsorted(wanted, at)], video.time_N[at], *about) for name, at in index.items()}


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


# ---- what the container says


class _Facts(NamedTuple):
    """What the packets of a file say, without decoding any."""

    path: str
    time_N: np.ndarray  # float64, seconds of each frame that is shown, from the first
    duration: float
    origin: float  # seconds of the first frame on the container's own clock
    start: float  # on that clock: what is shown before it has lost the frames it was predicted from; -inf: nothing has
    why_not_decord: str  # "" where decord can be trusted, as far as the container shows


class _Packet(NamedTuple):
    """What one packet, of one frame, says; in decoding order."""

    pts: int | None  # when it is shown, in ticks
    duration: int | None
    is_key: bool
    is_hidden: bool  # by an edit list
    is_corrupt: bool


def _facts(path: str) -> _Facts:
    """Read all packets. Raises VideoError for a file that is not a whole video."""
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if stream is None or "attached_pic" in str(stream.disposition):
                kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing that is whole"
                raise VideoError(f"{path}: it has no video stream, only {kinds}.")
            format, promised = container.format.name, stream.frames
            expected = _expected_seconds(container, stream)
            tick = float(stream.time_base)
            step = float(1 / stream.average_rate) if stream.average_rate else tick
            packets, last = [], 0.0  # last: when the last packet ends, seconds (Matroska: of any stream)
            for packet in container.demux(list(container.streams) if format.startswith("matroska") else stream):
                if packet.size and packet.stream.index == stream.index:
                    flags = (packet.is_keyframe, packet.is_discard, packet.is_corrupt)
                    packets.append(_Packet(packet.pts, packet.duration, *flags))
                if packet.size and packet.pts is not None:
                    last = max(last, (packet.pts + (packet.duration or 0)) * float(packet.time_base))
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: it is not a video that can be read ({_brief(error)}).") from None
    if format.endswith("_pipe") or format in ("image2", "tty"):
        raise VideoError(f"{path}: its content is not a video ({format}); the extension is wrong.")
    shown = _shown(packets)
    if not shown:
        raise VideoError(f"{path}: it has no frames, only a header.")
    if all(packet.pts is not None for packet in shown):
        pts_N = np.array([packet.pts for packet in shown], dtype=np.float64) * tick
    else:  # a guess, mended by PyAV's decoder
        pts_N = np.arange(len(shown)) * step
    sorted_N = np.sort(pts_N)
    gap = float(np.median(np.diff(sorted_N))) if len(shown) > 1 else step
    end = float(sorted_N[-1]) + ((shown[-1].duration or 0) * tick or gap)
    if format.startswith("mov") and any(packet.is_corrupt for packet in packets):
        raise VideoError(f"{path}: it is cut short; a frame of its index lies beyond the end of the file.")
    if expected - max(end, last) > max(3 * gap, 0.02 * expected):
        raise VideoError(
            f"{path}: it is cut short; it should last {expected:.2f} s, it ends at {max(end, last):.2f} s."
        )
    why = _why_not_decord(format, packets, pts_N, promised)
    origin = float(sorted_N[0])
    start = -np.inf if packets[0].is_key else origin - tick / 2
    return _Facts(path, sorted_N - origin, end - origin, origin, start, why)


def _shown(packets: list[_Packet]) -> list[_Packet]:
    """The packets of frames that a viewer sees: not those that an edit list hides, and in a recording that begins
    between two key frames (a cut of a broadcast) not those that are shown before the first."""
    first = next((number for number, packet in enumerate(packets) if packet.is_key), 0)
    begin = packets[first].pts if first else None
    late = [packet for packet in packets[first:] if begin is None or packet.pts is None or packet.pts >= begin]
    return [packet for packet in late if not packet.is_hidden]


def _why_not_decord(format: str, packets: list[_Packet], pts_N: np.ndarray, promised: int) -> str:
    """What makes decord's frames wrong without an error. pts_N: seconds of the frames shown, in decoding order."""
    shown = _shown(packets)
    is_key_N = np.array([packet.is_key for packet in shown])
    earliest_later_N = np.minimum.accumulate(pts_N[::-1])[::-1]
    if not format.startswith(("mov", "matroska", "avi")):
        return f"decord cannot be trusted with {format}"
    if not packets[0].is_key:
        return f"it begins between two key frames, {len(packets) - len(shown)} frames of it cannot be decoded"
    if len(shown) < len(packets):
        return f"an edit list hides {len(packets) - len(shown)} frames (a stream-copied cut)"
    if any(packet.pts is None for packet in shown) or (np.diff(np.sort(pts_N)) <= 0).any():
        return "timestamps are missing or repeated"
    if (is_key_N & (earliest_later_N < pts_N)).any():
        return "it has open groups of pictures"
    if promised not in (0, len(packets)):
        return f"its header promises {promised} frames, it holds {len(packets)}"
    return ""


def _expected_seconds(container, stream) -> float:
    """How long the header says that the video lasts (Matroska: the longest stream); 0 where it says nothing."""
    format = container.format.name
    if format.startswith("mov"):
        return float((stream.duration or 0) * stream.time_base)
    if format.startswith("avi"):
        known = stream.average_rate and stream.frames < 1 << 30  # that number stands in an unfinished recording
        return float(stream.frames / stream.average_rate) if known else 0.0
    return (container.duration or 0) / av.time_base if format.startswith("matroska") else 0.0


# ---- the readers: time_N, duration, shape (H, W), source, reason, timed, read(indices in rising order) -> rgb_THWC


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
        if not np.allclose(begin_N - begin_N[0], self.time_N, rtol=5e-7, atol=2e-3):  # decord's times are float32
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
        self.facts, self.duration, self.origin = facts, facts.duration, facts.origin
        self.time_N, self.size, self.reason = facts.time_N.copy(), size, reason

    @property
    def shape(self) -> tuple[int, int]:
        return self.read(np.array([0])).shape[1:3]

    def read(self, indices: np.ndarray) -> np.ndarray | None:
        """The frames, their times set by the decoder. None, after mending time_N, where a few promised ones are not."""
        wanted, images, times = set(indices.tolist()), [], []
        try:
            with av.open(self.facts.path) as container:
                for frame in container.decode(container.streams.best("video")):
                    if frame.time is not None and frame.time < self.facts.start:
                        continue
                    if len(times) in wanted:
                        images.append(self._rgb(frame))
                    times.append(self.time_N[len(times)] if frame.time is None else frame.time - self.origin)
                    if len(images) == len(wanted):
                        self._set(times)
                        return np.stack(images)
        except av.FFmpegError as error:
            reason = f"{_brief(error)}; {self.reason}"
            raise VideoError(f"{self.facts.path}: it cannot be decoded after frame {len(times)} ({reason}).") from None
        if len(times) < 0.9 * len(self.time_N):
            some = f"only {len(times)} of {len(self.time_N)} frames"
            raise VideoError(f"{self.facts.path}: {some} can be decoded ({self.reason}).")
        self.time_N = self.time_N[: len(times)]
        self._set(times)
        self.time_N, self.origin = self.time_N - self.time_N[0], self.origin + self.time_N[0]
        return None

    def _set(self, times: list[float]) -> None:
        """The decoder's times replace the packets', unless they go back (AVI files with B-frames have no true ones)."""
        if (np.diff(times) >= 0).all():
            self.time_N[: len(times)] = times

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """The frame upright (PyAV leaves the rotation of phone videos to its caller) and at the size asked for."""
        turns = round(frame.rotation / 90)
        height, width = self.size or (None, None)
        if turns % 2:
            height, width = width, height
        # BILINEAR is what decord scales with: the same bytes come out
        rgb_HWC = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")
        return np.ascontiguousarray(np.rot90(rgb_HWC, turns))


class _Images:
    source, reason, timed = "images", "", False

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
                sizes = f"its size is {images[-1].shape[:2]}, that of the frames before {images[0].shape[:2]}"
                raise VideoError(f"{path}: {sizes}.")
        return np.stack(images)


def _natural(path: str) -> list:
    """Sorts frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _brief(error: Exception) -> str:
    """The last line of a decoder's message, without its stack trace and source file."""
    if isinstance(error, av.FFmpegError):
        return error.strerror
    lines = [line.strip() for line in str(error).split("Stack trace")[0].splitlines() if line.strip()]
    return re.sub(r"^\[[\d:]+\] \S+: ", "", lines[-1])[-200:] if lines else type(error).__name__
