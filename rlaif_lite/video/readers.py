"""The two readers of video files: decord, which seeks, and PyAV, which decodes in order.

A reader has: time_N (seconds of each frame), duration, shape (H, W), source, reason, timed, pixels (to decode at most),
and read(indices in rising order) -> rgb_THWC, uint8.
"""

import av
import numpy as np

from ..errors import VideoError
from .container import OPEN_OPTIONS, Facts, brief, orientation, require_size

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for this platform: PyAV decodes everything
    decord = None


class DecordReader:
    """Raises VideoError where decord refuses the file or disagrees with its container."""

    source, reason, timed = "decord", "", True

    def __init__(self, facts: Facts, size: tuple[int, int] | None):
        self.facts, self.size, self.time_N, self.duration = facts, size, facts.time_N, facts.duration
        self.pixels = len(self.time_N) * facts.frame_pixels
        height, width = size or (-1, -1)
        try:
            self.reader = decord.VideoReader(facts.path, num_threads=1, height=height, width=width)
            begin_N = self.reader.get_frame_timestamp(range(len(self.reader)))[:, 0].astype(np.float64)
        except Exception as error:  # decord's errors share no useful base class
            raise VideoError(f"decord: {brief(error)}") from None
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
            raise VideoError(f"decord: {brief(error)}") from None


class PyAVReader:
    """Decodes from the start and in order. This is right for every file, and slow for long ones."""

    source, timed = "pyav", True

    def __init__(self, facts: Facts, size: tuple[int, int] | None, reason: str):
        self.facts, self.duration, self.origin = facts, facts.duration, facts.origin
        self.time_N, self.size, self.reason = facts.time_N.copy(), size, reason
        self.pixels = len(self.time_N) * facts.frame_pixels

    @property
    def shape(self) -> tuple[int, int]:
        return self.read(np.array([0])).shape[1:3]

    def read(self, indices: np.ndarray) -> np.ndarray | None:
        """The frames; their times are then the decoder's. None where a few promised frames are missing: time_N is
        shorter then, and the caller samples again."""
        wanted, images, times = set(indices.tolist()), [], []
        try:
            with av.open(self.facts.path, options=OPEN_OPTIONS) as container:
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
            reason = f"{brief(error)}; {self.reason}"
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
        """The frame as a viewer shows it (PyAV leaves turning it to its caller) and at the size asked for."""
        require_size(self.facts.path, frame.width, frame.height, self.facts.frame_limit)
        transpose, left_right, top_bottom = orientation(frame)
        height, width = self.size or (None, None)
        if transpose:
            height, width = width, height
        # BILINEAR is what decord scales with: the same bytes come out
        rgb_HWC = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")
        rgb_HWC = rgb_HWC.swapaxes(0, 1) if transpose else rgb_HWC
        return np.ascontiguousarray(rgb_HWC[:: -1 if top_bottom else 1, :: -1 if left_right else 1])
