"""Small strips of frames for people to look at, made in worker processes."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from ..errors import VideoError
from .decode import View, open_video, read_views
from .workers import Job, Video, run_all, seconds_for

FRAMES = 6
HEIGHT = 96  # pixels
WIDEST = 4  # heights; a wider frame is squeezed


def strips(
    videos: dict[str, Video], workers: int, frame_limit: int, height: int = HEIGHT
) -> Iterator[tuple[str, np.ndarray | VideoError]]:
    """{name: video} -> for each its name and FRAMES frames from left to right, uint8 (height, W, 3), or why not.

    Raises as `workers.decode_all`.
    """
    return run_all([Job(name, _strip, (video, frame_limit, height)) for name, video in videos.items()], workers)


def _strip(report: Callable[[float], None], video: Video, frame_limit: int, height: int) -> np.ndarray:
    reader = open_video(video, None, frame_limit)
    report(seconds_for(reader))
    rgb_THWC = read_views(reader, {"strip": View(FRAMES)})["strip"].rgb_THWC
    tall, wide = rgb_THWC.shape[1:3]
    size = (max(1, min(WIDEST * height, round(wide * height / tall))), height)
    small = [np.asarray(Image.fromarray(rgb_HWC).resize(size, Image.Resampling.LANCZOS)) for rgb_HWC in rgb_THWC]
    return np.concatenate(small, axis=1)
