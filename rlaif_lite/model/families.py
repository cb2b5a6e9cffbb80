"""What differs between video language models: how frames become features, and which token marks the place of the video.

Everything else is one code path: features are put into the embeddings and the decoder is called with explicit positions
(`model/inputs.py`). A family adapter is a handful of lines; an architecture that is not listed is refused by name.

Shapes: T frames, P tokens per frame, D width of the language model, HWC an image.
"""

import json
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError


class ImageSpec(NamedTuple):
    """How a frame becomes pixel values; read from the checkpoint's preprocessor_config.json."""

    height: int  # pixels
    width: int  # pixels
    mean: tuple[float, ...]  # per channel, after rescaling to 0..1
    std: tuple[float, ...]


class Family(NamedTuple):
    """The few things a family does in its own way."""

    model_type: str  # config.model_type of transformers
    placeholder: Callable[[object], int]  # config -> id of the token that stands for one video token
    grid: Callable[[object], int]  # config -> side of the square grid of tokens that a frame becomes
    encode: Callable[[object, Tensor], Tensor]  # (model, pixels_TCHW) -> features_TPD, after the projector
    tower: tuple[str, ...]  # attributes of model.base_model that only `encode` needs; dropped afterwards
    mrope: bool = False  # positions are (time, row, column)


def _llava_next_video_encode(model, pixels_TCHW: Tensor) -> Tensor:
    frames = pixels_TCHW.shape[0]
    # by position: the parameter is `pixel_values` in transformers 5.17 and `pixel_values_videos` in newer ones
    output = model.base_model.get_video_features(pixels_TCHW[None], return_dict=True)
    features = output.pooler_output
    features_ND = (features if isinstance(features, Tensor) else torch.cat(tuple(features))).flatten(0, -2)
    return features_ND.reshape(frames, -1, features_ND.shape[-1])


def _llava_next_video_grid(config) -> int:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side // config.spatial_pool_stride


FAMILIES = {
    "llava_next_video": Family(
        model_type="llava_next_video",
        placeholder=lambda config: config.video_token_index,
        grid=_llava_next_video_grid,
        encode=_llava_next_video_encode,
        tower=("vision_tower", "multi_modal_projector", "vision_resampler"),
    ),
}


def family_of(config) -> Family:
    """The adapter for a transformers config; raises ModelError, naming the supported ones, when there is none."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"The base is of type `{config.model_type}`, which has no family adapter. "
            f"Supported: {', '.join(sorted(FAMILIES))}. Set `model.base` to a checkpoint of one of these."
        )
    return FAMILIES[config.model_type]


def image_spec(folder: Path) -> ImageSpec:
    """Read size, mean and standard deviation from `preprocessor_config.json`; raises ModelError when it is not
    there."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        raise ModelError(f"{path} is missing: the base needs its image processor's settings to prepare frames.")
    config = json.loads(path.read_text())
    size = config.get("crop_size") or config["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size}
    side = size.get("shortest_edge")
    return ImageSpec(
        height=size.get("height", side),
        width=size.get("width", side),
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
    )


def to_pixels(rgb_THWC: np.ndarray, spec: ImageSpec) -> Tensor:
    """uint8 frames of the spec's size -> normalised float32 pixels_TCHW."""
    pixels_THWC = torch.from_numpy(np.ascontiguousarray(rgb_THWC)).float() / 255.0
    pixels_THWC = (pixels_THWC - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    return pixels_THWC.permute(0, 3, 1, 2).contiguous()
