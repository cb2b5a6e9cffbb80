"""What a video's container says, read from its packets once and without decoding the video.

It also says where decord cannot be trusted. decord seeks, and is then wrong without an error for:
  - stream-copied cuts (edit lists): it counts the hidden frames and returns frames out of order;
  - MPEG-TS and other formats without an index: it loses the first frames and seeks several frames off;
  - open groups of pictures (x265's default, MPEG-4 and MPEG-2 with B-frames): it is some frames off after a seek;
  - key frames that are flagged but are none (3GP files of old phones): the frames after a seek are broken;
  - missing or repeated timestamps, a frame count or timestamps other than the container's, mirrored pictures.
"""

import os
import re
import stat
from typing import NamedTuple

import av
import numpy as np

from ..errors import VideoError
from .keyframes import is_intra

# ffmpeg's names. Left out are formats that name other files or addresses (playlists), and lists of pictures.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf,obu,mjpeg,mxf,"
    "rm,dv,nut,yuv4mpegpipe"
)
SEEKABLE = ("mov", "matroska", "avi")  # what decord can be trusted with at all
OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
FRAME_LIMIT = 2**26  # pixels of a frame, 67 million; 8K has 33 million


class Facts(NamedTuple):
    """What the packets of a file say."""

    path: str
    time_N: np.ndarray  # float64, seconds of each frame that is shown, from the first
    duration: float  # seconds
    origin: float  # seconds of the first frame on the container's own clock
    start: float  # on that clock: frames before it lack what they were predicted from; -inf: there are none
    frame_pixels: int
    frame_limit: int  # pixels; larger frames are refused
    why_not_decord: str  # "" where decord can be trusted, as far as the container shows


class _Packet(NamedTuple):
    """What one packet, of one frame, says; in decoding order."""

    pts: int | None  # when it is shown, in ticks
    duration: int | None
    is_key: bool
    is_hidden: bool  # by an edit list
    is_corrupt: bool


def require_file(path: str) -> None:
    """Raises VideoError unless `path` is a regular file with content. A pipe or a device may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error})"
        raise VideoError(f"{path}: {why}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(f"{path}: it is not a regular file. Pipes and devices are not read.")
    if found.st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes).")


def require_size(path: str, width: int, height: int, limit: int) -> None:
    """Raises VideoError for frames of more than `limit` pixels."""
    if width * height > limit:
        raise VideoError(
            f"{path}: its frames have {width} x {height} pixels, more than `features.max_source_pixels: {limit}`. "
            "Scale it down, or raise that key."
        )


def read_facts(path: str, frame_limit: int = FRAME_LIMIT) -> Facts:
    """Read all packets. Raises VideoError for a file that is not a whole video, or has frames above the limit."""
    require_file(path)
    try:
        with av.open(path, options=OPEN_OPTIONS) as container:
            stream = container.streams.best("video")
            if stream is None or "attached_pic" in str(stream.disposition):
                kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing that is whole"
                raise VideoError(f"{path}: it has no video stream, only {kinds}.")
            codec = stream.codec_context
            if codec is None:
                raise VideoError(f"{path}: no decoder reads its video stream; the header names an unknown codec.")
            codec.thread_count = 1  # one frame is decoded below
            width, height = stream.width, stream.height
            require_size(path, width, height, frame_limit)
            format, promised, frame_pixels = container.format.name, stream.frames, width * height
            expected = _expected_seconds(container, stream)
            tick = float(stream.time_base)
            step = float(1 / stream.average_rate) if stream.average_rate else tick
            packets, last = [], 0.0  # last: when the last packet ends, seconds (Matroska: of any stream)
            false_keys, is_mirrored = 0, None
            is_seekable = format.startswith(SEEKABLE)  # only there do the next two decide anything
            for packet in container.demux(list(container.streams) if format.startswith("matroska") else stream):
                if packet.size and packet.stream.index == stream.index:
                    flags = (packet.is_keyframe, packet.is_discard, packet.is_corrupt)
                    packets.append(_Packet(packet.pts, packet.duration, *flags))
                    if is_seekable and packet.is_keyframe:
                        false_keys += not is_intra(codec.name, bytes(packet), codec.extradata)
                    if is_seekable and is_mirrored is None:
                        for frame in packet.decode()[:1]:  # the first frame that the decoder gives
                            transpose, left_right, top_bottom = orientation(frame)
                            is_mirrored = transpose == (left_right == top_bottom)  # a rotation is two reflections
                if packet.size and packet.pts is not None:
                    last = max(last, (packet.pts + (packet.duration or 0)) * float(packet.time_base))
    except av.ArgumentError:
        raise VideoError(
            f"{path}: its content is not a video in a format that is read (mp4, mov, 3gp, mkv, webm, avi, ts, mpg, "
            "flv, wmv, gif, ...); the extension is wrong, or the file is damaged."
        ) from None
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: it is not a video that can be read ({brief(error)}).") from None
    shown = _shown(packets)
    if not shown:
        raise VideoError(f"{path}: it has no frames, only a header.")
    if all(packet.pts is not None for packet in shown):
        pts_N = np.array([packet.pts for packet in shown], dtype=np.float64) * tick
    else:  # a guess, which PyAV's decoder corrects
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
    if false_keys:
        why = why or f"{false_keys} of its flagged key frames are predicted from other frames"
    if is_mirrored:
        why = why or "its display matrix mirrors the picture"
    origin = float(sorted_N[0])
    start = -np.inf if packets[0].is_key else origin - tick / 2
    return Facts(path, sorted_N - origin, end - origin, origin, start, frame_pixels, frame_limit, why)


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip left to right, then flip top to bottom) that shows the frame as a viewer does.

    From the display matrix (ISO 14496-12): x' = a x + c y, y' = b x + d y. Angles other than quarter turns are rounded.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(memoryview(matrix), np.int32)[:5].tolist()
    return (False, a < 0, d < 0) if abs(a) >= abs(b) else (True, c < 0, b < 0)


def _shown(packets: list[_Packet]) -> list[_Packet]:
    """The packets of frames that a viewer sees. An edit list hides some. In a recording that begins between two key
    frames (a cut of a broadcast), those shown before the first key frame are left out too."""
    first = next((number for number, packet in enumerate(packets) if packet.is_key), 0)
    begin = packets[first].pts if first else None
    late = [packet for packet in packets[first:] if begin is None or packet.pts is None or packet.pts >= begin]
    return [packet for packet in late if not packet.is_hidden]


def _why_not_decord(format: str, packets: list[_Packet], pts_N: np.ndarray, promised: int) -> str:
    """What makes decord's frames wrong without an error. pts_N: seconds of the frames shown, in decoding order."""
    shown = _shown(packets)
    is_key_N = np.array([packet.is_key for packet in shown])
    earliest_later_N = np.minimum.accumulate(pts_N[::-1])[::-1]
    if not format.startswith(SEEKABLE):
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


def _expected_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the header says that the video lasts (Matroska: the longest stream); 0 where it says nothing."""
    format = container.format.name
    if format.startswith("mov"):
        return float((stream.duration or 0) * stream.time_base)
    if format.startswith("avi"):
        known = stream.average_rate and stream.frames < 1 << 30  # that number stands in an unfinished recording
        return float(stream.frames / stream.average_rate) if known else 0.0
    return (container.duration or 0) / av.time_base if format.startswith("matroska") else 0.0


def brief(error: Exception) -> str:
    """The last line of a decoder's message, without its stack trace and source file."""
    if isinstance(error, av.FFmpegError):
        return error.strerror or type(error).__name__
    lines = [line.strip() for line in str(error).split("Stack trace")[0].splitlines() if line.strip()]
    return re.sub(r"^\[[\d:]+\] \S+: ", "", lines[-1])[-200:] if lines else type(error).__name__
