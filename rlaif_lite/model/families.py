"""What differs between video language models: how frames become features, and how a video is written into a prompt.

Everything else is one code path: features are put into the embeddings and the decoder is called with explicit positions
(`model/inputs.py`). A family adapter is a handful of lines; an architecture that is not listed is refused by name.

A video is written as its family's processor writes it, with the decoder's own times. Two departures: VideoLLaMA3's
compression of still pixels is left out, the recipe's prune chain stands in for it; and Qwen2.5-VL's times are those of
the frames, where the processor takes them to be evenly spaced.

Shapes: T frames, G frames after merging in time (G = T in most families), P tokens per frame, D width of the language
model, L = 1 + deepstack layers.
"""

from collections.abc import Callable
from importlib import import_module
from math import isqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError
from ..video.cache import FeatureRecord
from .pixels import ImageSpec, to_patches


class Encoded(NamedTuple):
    """What a tower makes of frames, after the projector."""

    features_LGPD: Tensor  # layer 0 stands in the prompt, the others are deepstack
    grid: tuple[int, int]  # rows and columns of a frame's tokens
    tail_D: Tensor | None = None  # a token that ends every video


class Family(NamedTuple):
    """The few things a family does in its own way."""

    placeholder: Literal["video", "image"]  # which token of the config stands for one video token
    encode: Callable[[object, Tensor, ImageSpec], Encoded]  # (model, pixels_TCHW, how they were made)
    tower: tuple[str, ...]  # attributes of model.base_model that only `encode` needs; dropped afterwards
    content: Literal["video", "image"] = "video"  # what the chat template is given: a video, or an image for each frame
    per_frame: bool = False  # a run of tokens for each frame, with text between them; else one run
    mark: str | None = None  # what the chat template writes for a video; None: the placeholder itself
    write: Callable[[FeatureRecord, str], str] | None = None  # (video, token) -> text in place of the mark
    # positions are (time, row, column): (config, seconds_G) -> time_G
    mrope: Callable[[Any, Tensor], Tensor] | None = None
    any_size: bool = False  # the tower takes frames of any shape
    of_video: tuple[bool, bool] = (False, False)  # the smallest and largest area are those of a video, not of a frame
    template: Callable[[], str] | None = None  # the processor's own chat template for prompts with a video
    fallback_template: str | None = None  # where the checkpoint has none
    # config -> tokens of a frame, for a tower that looks at the pixels and so cannot be traced without any
    frame_tokens: Callable[[Any], int] | None = None


# ---- frames to features


def _flat(found: Tensor | tuple | list) -> Tensor:
    """Features as (N,D): the container differs between families, and between releases of transformers."""
    return (found if isinstance(found, Tensor) else torch.cat(tuple(found))).flatten(0, -2)


def _square(found: Tensor | tuple | list, frames: int) -> Encoded:
    features_ND = _flat(found)
    features_GPD = features_ND.unflatten(0, (frames, -1))
    tokens = features_GPD.shape[1]
    return Encoded(features_GPD[None], (isqrt(tokens), isqrt(tokens)))


def _encode_images(model, pixels_TCHW: Tensor, images: ImageSpec) -> Encoded:
    return _square(model.base_model.get_image_features(pixels_TCHW, return_dict=True).pooler_output, len(pixels_TCHW))


def _encode_video(model, pixels_TCHW: Tensor, images: ImageSpec) -> Encoded:
    # by position: the parameter is `pixel_values` in transformers 5.17 and `pixel_values_videos` in newer ones
    return _square(
        model.base_model.get_video_features(pixels_TCHW[None], return_dict=True).pooler_output, len(pixels_TCHW)
    )


def _encode_smolvlm(model, pixels_TCHW: Tensor, images: ImageSpec) -> Encoded:
    # Its own `get_image_features` reads all values to leave out pictures of zeros, which pad its batches.
    inner = model.base_model
    seen = inner.vision_model(pixel_values=pixels_TCHW, return_dict=True).last_hidden_state
    return _square(inner.connector(seen), len(pixels_TCHW))


def _encode_onevision(model, pixels_TCHW: Tensor, images: ImageSpec) -> Encoded:
    # the newline that ends a video comes with the features or, in transformers 5.17, is added to them later
    found_ND = _flat(model.base_model.get_video_features(pixels_TCHW[None], return_dict=True).pooler_output)
    frames = len(pixels_TCHW)
    side = isqrt(len(found_ND) // frames)
    return _square(found_ND[: frames * side**2], frames)._replace(tail_D=model.base_model.image_newline)


def _encode_patches(model, pixels_TCHW: Tensor, images: ImageSpec) -> Encoded:
    patches_NF, grid_13 = to_patches(pixels_TCHW, images.patch)
    merge = images.patch.merge
    # VideoLLaMA3's tower takes the merge of each video, and Qwen3-VL's gives deepstack layers as well
    merges = [torch.tensor([merge], device=patches_NF.device)] * (model.config.model_type == "video_llama_3")
    output = model.base_model.get_video_features(patches_NF, grid_13, *merges, return_dict=True)
    layers = [output.pooler_output, *(output.get("deepstack_features") or ())]
    groups, rows, columns = grid_13[0].tolist()
    features_LND = torch.stack([_flat(layer) for layer in layers])
    return Encoded(features_LND.unflatten(1, (groups, -1)), (rows // merge, columns // merge))


# ---- how a video is written


def _write_smolvlm(video: FeatureRecord, token: str) -> str:
    hours, minutes, seconds = (int(video.duration) // n for n in (3600, 60, 1))
    length = f"{hours}:{minutes % 60:02d}:{seconds % 60:02d}"
    count = _in_words(video.frames)
    text = f"You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n"
    for at in video.time_T.tolist():
        stamp = f"{int(at // 60):02d}:{int(at % 60):02d}"
        text += f"\nFrame from {stamp}:<fake_token_around_image><global-img>{token}<fake_token_around_image>"
    return text + "\n\n"


_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_ONES += ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def _in_words(number: int) -> str:
    """English, below 1000, as SmolVLM's processor has it from the package num2words."""
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{_ONES[hundreds]} hundred" + (f" and {_in_words(rest)}" if rest else "")
    return _ONES[rest] if rest < 20 else _TENS[rest // 10 - 2] + (f"-{_ONES[rest % 10]}" if rest % 10 else "")


# The conversation vicuna_v1, with which LLaVA-1.5, Video-LLaVA and VLM-RLAIF were trained.
VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0].role != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.content is string %}{% set text = message.content %}{% else %}"
    "{% set parts = namespace(text='') %}{% for part in message.content %}"
    "{% set parts.text = parts.text + (part.text if part.type == 'text' else '<' + part.type + '>\n') %}"
    "{% endfor %}{% set text = parts.text %}{% endif %}"
    "{% if message.role == 'system' %}{{ text }} "
    "{% elif message.role == 'user' %}USER: {{ text }} "
    "{% else %}ASSISTANT: {{ text }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

CHAT_TEMPLATES = {"vicuna_v1": VICUNA}  # that a recipe may name


# ---- the families


LLAVA_TOWER = ("vision_tower", "multi_modal_projector")

FAMILIES = {  # by config.model_type of transformers
    "llava": Family("image", _encode_images, LLAVA_TOWER, content="image", per_frame=True, fallback_template=VICUNA),
    "llava_next_video": Family("video", _encode_video, (*LLAVA_TOWER, "vision_resampler")),
    "video_llava": Family(
        "video", _encode_video, ("video_tower", "image_tower", "multi_modal_projector"), fallback_template=VICUNA
    ),
    "llava_onevision": Family("video", _encode_onevision, LLAVA_TOWER),
    "qwen2_vl": Family(  # time is the order of the frames
        "video", _encode_patches, ("visual",), mrope=lambda _, seconds_G: torch.arange(len(seconds_G)), any_size=True
    ),
    "qwen2_5_vl": Family(  # time is counted in steps; 1e-6: .3 * 10 is 2.999...
        "video",
        _encode_patches,
        ("visual",),
        mrope=lambda config, at_G: ((at_G - at_G[0]) * config.vision_config.tokens_per_second + 1e-6).long(),
        any_size=True,
    ),
    "qwen3_vl": Family(
        "video",
        _encode_patches,
        ("visual",),
        per_frame=True,
        write=lambda video, token: "".join(
            f"<{seconds:.1f} seconds><|vision_start|>{token}<|vision_end|>" for seconds in video.time_T.tolist()
        ),
        mrope=lambda _, seconds_G: torch.zeros(len(seconds_G), dtype=torch.int64),  # time is written in the text
        any_size=True,
        of_video=(True, True),
    ),
    "video_llama_3": Family(
        "video",
        _encode_patches,
        ("vision_model", "projector"),
        per_frame=True,
        write=lambda video, token: ",".join(f"Time {seconds:.1f}s:{token}" for seconds in video.time_T.tolist()),
        any_size=True,
        of_video=(False, True),
    ),
    "internvl": Family(
        "image",
        _encode_images,
        LLAVA_TOWER,
        per_frame=True,
        mark="<video>",
        write=lambda video, token: "\n".join(f"Frame{n}: <img>{token}</img>" for n in range(1, video.frames + 1)),
    ),
    "smolvlm": Family(
        "image",
        _encode_smolvlm,
        ("vision_model", "connector"),
        per_frame=True,
        mark="<video>",
        write=_write_smolvlm,
        template=lambda: import_module("transformers.models.smolvlm.processing_smolvlm").DEFAULT_CHAT_TEMPLATE,
        frame_tokens=lambda config: (
            (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
        ),
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
