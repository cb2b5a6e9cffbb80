"""Frames as a vision tower takes them, by the settings in the checkpoint's own processor files.

transformers' video processors need torchvision; resizing happens while decoding and what is left is arithmetic.

Shapes: T frames, HWC an image, G frames after merging in time, N patches, F numbers of a patch.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import cached_file

from ..errors import ModelError
from ..video.frame_size import FrameSize

SOURCES = (  # where a checkpoint may hold the settings, the first that does counts (as in transformers)
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
    ("preprocessor_config.json", None),
)


class Patch(NamedTuple):
    """How a tower of any size cuts frames up."""

    side: int  # pixels
    merge: int  # merge x merge patches become one token
    frames: int  # frames that become one


class ImageSpec(NamedTuple):
    """How a frame becomes pixel values."""

    size: FrameSize
    mean: tuple[float, ...]  # per channel, after rescaling to 0..1
    std: tuple[float, ...]
    patch: Patch | None  # of a tower of any size


def read_file(path: str | Path, name: str, revision: str | None = None) -> str | None:
    """A text file of a checkpoint (folder or hub id); None when it has no such file."""
    found = cached_file(
        str(path),
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).read_text(encoding="utf-8")


def read_json(path: str | Path, name: str, revision: str | None = None) -> dict | None:
    """The same, for a JSON file."""
    text = read_file(path, name, revision)
    return None if text is None else json.loads(text)


def image_spec(
    path: str | Path,
    revision: str | None = None,
    *,
    any_size: bool = False,
    of_video: tuple[bool, bool] = (False, False),
) -> ImageSpec:
    """Read how frames are prepared; `any_size` and `of_video` as in `Family`. Raises ModelError where it is not
    said."""
    for file, section in SOURCES:
        settings = read_json(path, file, revision)
        if settings is not None and section is not None:
            settings = settings.get(section)
        if settings is not None:
            break
    else:
        raise ModelError(
            f"{path}: preprocessor_config.json is missing: the base needs its image processor's settings to prepare "
            "frames."
        )
    try:
        patch = None
        if any_size:
            patch = Patch(settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"])
        size = _any_size(settings, patch, of_video) if patch else _one_size(settings)
        return ImageSpec(size, tuple(settings["image_mean"]), tuple(settings["image_std"]), patch)
    except KeyError as error:
        raise ModelError(f"{path}: {file} does not say {error}; take it from the base's original files.") from None


def _any_size(settings: dict, patch: Patch, of_video: tuple[bool, bool]) -> FrameSize:
    bounds = settings.get("size") or {}
    least = settings["min_pixels"] if "min_pixels" in settings else bounds["shortest_edge"]
    most = settings["max_pixels"] if "max_pixels" in settings else bounds["longest_edge"]
    return FrameSize(
        multiple=patch.side * patch.merge,
        min_pixels=least,
        max_pixels=most,
        min_of_video=of_video[0],
        max_of_video=of_video[1],
    )


def _one_size(settings: dict) -> FrameSize:
    crop = settings.get("crop_size") if settings.get("do_center_crop") is not False else None
    size = crop or settings.get("max_image_size") or settings["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size}
    side = size.get("shortest_edge", size.get("longest_edge"))
    height, width = size.get("height", side), size.get("width", side)
    if settings.get("do_pad") and settings.get("image_processor_type", "").startswith("LlavaImageProcessor"):
        return FrameSize(height, width, longer=height)  # other processors mean something else by `do_pad`
    resized = settings["size"] if crop else {}
    return FrameSize(height, width, resized.get("shortest_edge", 0) if isinstance(resized, dict) else resized)


def to_pixels(rgb_THWC: np.ndarray, spec: ImageSpec) -> Tensor:
    """uint8 frames, resized as `spec.size` says -> normalised float32 pixels_TCHW.

    Where frames are larger than the tower takes, the middle is cut out; where smaller, they stand in the middle of the
    mean colour. LLaVA fills up before it resizes, and rounds the colour down: we differ by that at the edge.
    """
    if spec.size.shorter:
        top, left = (rgb_THWC.shape[1] - spec.size.height) // 2, (rgb_THWC.shape[2] - spec.size.width) // 2
        rgb_THWC = rgb_THWC[:, top : top + spec.size.height, left : left + spec.size.width]
    pixels_THWC = torch.from_numpy(np.ascontiguousarray(rgb_THWC)).float() / 255.0
    pixels_THWC = (pixels_THWC - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    if spec.size.longer:
        down, right = spec.size.height - rgb_THWC.shape[1], spec.size.width - rgb_THWC.shape[2]
        around = (0, 0, right // 2, right - right // 2, down // 2, down - down // 2)
        pixels_THWC = torch.nn.functional.pad(pixels_THWC, around)  # 0 is the mean colour now
    return pixels_THWC.permute(0, 3, 1, 2).contiguous()


def to_patches(pixels_TCHW: Tensor, patch: Patch) -> tuple[Tensor, Tensor]:
    """Frames, a multiple of `patch.frames`, as towers of any size take them -> (patches_NF, grid_13: G, rows, columns).

    The patches that become one token stand next to each other, tokens in reading order."""
    frames, channels, height, width = pixels_TCHW.shape
    groups, rows, columns = frames // patch.frames, height // patch.side, width // patch.side
    cut = pixels_TCHW.reshape(
        groups,
        patch.frames,
        channels,
        rows // patch.merge,
        patch.merge,
        patch.side,
        columns // patch.merge,
        patch.merge,
        patch.side,
    )
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid_13 = torch.tensor([[groups, rows, columns]], device=pixels_TCHW.device)
    return cut.reshape(groups * rows * columns, -1), grid_13
