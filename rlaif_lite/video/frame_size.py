"""What size frames are given to a vision tower, from the size of the video; decoding resizes to it.

Towers of one size squash a frame, fit its shorter side and cut out the middle, or fit its longer side and fill the
rest up. Towers of any size keep the frame's shape: sides are rounded to a multiple, and the area is kept within bounds.
"""

import math
from typing import NamedTuple


class FrameSize(NamedTuple):
    """Called with (height, width) of a video's frames, it says to which (height, width) they are resized."""

    height: int = 0  # pixels that a tower of one size takes; 0: a tower of any size
    width: int = 0
    shorter: int = 0  # pixels of the shorter side before the middle is cut out; 0: nothing is cut
    longer: int = 0  # pixels of the longer side before the rest is filled with the mean colour; 0: nothing is filled
    multiple: int = 0  # of a tower of any size: sides are multiples of this
    min_pixels: float = 0  # of a frame, or of a video where the next fields say so
    max_pixels: float = 0
    min_of_video: bool = False
    max_of_video: bool = False
    limit: int | None = None  # pixels of a frame, the recipe's own bound

    def of(self, frames: int) -> "FrameSize":
        """For a video of so many frames."""
        least = self.min_pixels / (frames if self.min_of_video else 1)
        most = self.max_pixels / (frames if self.max_of_video else 1)
        most = min(most, self.limit or most)
        return self._replace(min_pixels=min(least, most), max_pixels=most, min_of_video=False, max_of_video=False)

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """The area rule is that of Qwen2-VL's processor (`smart_resize`)."""
        if self.shorter:
            side = min(height, width)  # the longer side is cut down to the whole pixel, as torchvision and PIL do
            return self.shorter * height // side, self.shorter * width // side
        if self.longer:
            side = max(height, width)
            return max(1, round(self.longer * height / side)), max(1, round(self.longer * width / side))
        if not self.multiple:
            return self.height, self.width
        rows, columns = round(height / self.multiple), round(width / self.multiple)
        area = rows * columns * self.multiple**2
        if area > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (height * width)) / self.multiple
            rows, columns = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        elif area < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width)) / self.multiple
            rows, columns = math.ceil(height * scale), math.ceil(width * scale)
        return max(1, rows) * self.multiple, max(1, columns) * self.multiple
