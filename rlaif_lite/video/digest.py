"""The sha256 of a video, whatever form it has."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import VideoError
from .container import require_file


def video_digest(video: str | tuple[str, ...], sized: Callable[[int], None] = lambda size: None) -> str:
    """sha256 of the bytes of a video file, or of its frames' digests in order (a folder: the files in it, by name).

    sized: is called with the bytes that will be read. Raises VideoError for a file that cannot be read.
    """
    is_file = isinstance(video, str) and not os.path.isdir(video)
    if is_file:
        frames = (video,)
    elif isinstance(video, str):
        frames = tuple(sorted(str(path) for path in Path(video).iterdir() if path.is_file()))
    else:
        frames = video
    for frame in frames:
        require_file(frame)
    sized(sum(os.path.getsize(frame) for frame in frames))
    digests = []
    for frame in frames:
        try:
            with open(frame, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise VideoError(f"{frame}: it cannot be read ({error.strerror}).") from None
    return digests[0] if is_file else hashlib.sha256("".join(digests).encode()).hexdigest()
