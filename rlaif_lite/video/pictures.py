"""Pictures as frames: a list or folder of them, one picture, or one animation (WebP, PNG). Pillow reads them.

They come out as a viewer shows them: turned by their EXIF orientation, 16-bit grey scaled to 8 bits. Both readers have
the attributes that `readers.py` lists.
"""

import itertools
import re

import numpy as np
from PIL import Image, ImageOps

from ..errors import VideoError
from .container import brief, require_file, require_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # none of Pillow's others: EPS, for one, starts Ghostscript
ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
USUAL_DELAY = 0.1  # seconds; browsers take it where an animation says 10 ms or less
Image.MAX_IMAGE_PIXELS = None  # `require_size` holds the recipe's own limit instead


class PictureReader:
    """Pictures of one size in order, each given one second, as pictures carry no times."""

    source, reason, timed = "images", "", False

    def __init__(self, paths: list[str], size: tuple[int, int] | None, frame_limit: int):
        if not paths:
            raise VideoError("a list of frames is empty.")
        self.paths, self.size, self.frame_limit = paths, size, frame_limit
        self.time_N, self.duration = np.arange(len(paths), dtype=np.float64), float(len(paths))
        self.pixels = len(paths) * frame_limit

    @property
    def shape(self) -> tuple[int, int]:
        return self.read(np.array([0])).shape[1:3]

    def read(self, indices: np.ndarray) -> np.ndarray:
        images = []
        for path in (self.paths[i] for i in indices):
            try:
                with open_picture(path, self.frame_limit) as picture:
                    if is_animated(picture):
                        raise VideoError(
                            f"{path}: it is an animation. Lists and folders of frames take still pictures."
                        )
                    images.append(_as_shown(picture, self.size))
            except ERRORS as error:
                raise VideoError(f"{path}: the frame cannot be read ({brief(error)}).") from None
            if images[-1].shape != images[0].shape:
                sizes = f"its size is {images[-1].shape[:2]}, that of the frames before {images[0].shape[:2]}"
                raise VideoError(f"{path}: {sizes}.")
        return np.stack(images)


class AnimationReader:
    """One animated WebP or PNG, with the times that it says."""

    source, reason, timed = "images", "", True

    def __init__(self, path: str, size: tuple[int, int] | None, frame_limit: int):
        self.path, self.size, self.frame_limit = path, size, frame_limit
        begin_N = list(itertools.accumulate((seconds for _, seconds in self._frames()), initial=0.0))
        self.time_N, self.duration = np.array(begin_N[:-1]), begin_N[-1]
        with open_picture(path, frame_limit) as picture:
            self.pixels = len(self.time_N) * picture.width * picture.height

    @property
    def shape(self) -> tuple[int, int]:
        return self.read(np.array([0])).shape[1:3]

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted = set(indices.tolist())
        return np.stack([_as_shown(picture, self.size) for i, (picture, _) in enumerate(self._frames()) if i in wanted])

    def _frames(self):
        """Yields (the picture at its next frame, seconds that the frame is shown)."""
        try:
            with open_picture(self.path, self.frame_limit) as picture:
                first = 1 if picture.info.get("default_image") else 0  # of a PNG: shown where animation is unknown
                for number in range(first, picture.n_frames):
                    picture.seek(number)
                    picture.load()
                    seconds = picture.info.get("duration", 0) / 1000
                    yield picture, seconds if seconds > 0.01 else USUAL_DELAY
        except ERRORS as error:
            raise VideoError(f"{self.path}: the animation cannot be read ({brief(error)}).") from None


def open_picture(path: str, frame_limit: int) -> Image.Image:
    """The picture, its pixels not yet read. Raises VideoError for what is no regular file or is too large."""
    require_file(path)
    try:
        picture = Image.open(path, formats=FORMATS)
    except ERRORS as error:
        raise VideoError(f"{path}: the frame cannot be read ({brief(error)}).") from None
    require_size(path, *picture.size, frame_limit)
    return picture


def is_animated(picture: Image.Image) -> bool:
    """Whether a viewer plays it. A JPEG of several pictures (MPO) shows the first."""
    return picture.format in ("PNG", "WEBP", "GIF") and getattr(picture, "is_animated", False)


def natural(path: str) -> list:
    """Sorts frame_2 before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _as_shown(picture: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 (H, W, 3), resized to `size` (H, W)."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion cuts it at 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("its grey values are floating point")
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    if size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)
