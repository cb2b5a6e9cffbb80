"""What a base weighs and how wide it is, from its config files alone: the architecture is built without any memory.

Shapes: T frames, P tokens per frame.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from ..model.base import QUANT_BLOCK, read_config, resolve_base, torch_dtype
from ..model.families import Family, family_of
from ..model.known_bases import shipped_facts
from ..model.norms import fuses_norms
from ..model.pixels import ImageSpec, image_spec
from ..recipe import Features, Model
from ..rollout.dense import ATTENTION
from ..video.cache import FeatureRecord
from ..video.prune import count_kept

# NF4 with double quantisation: 4 bits, one byte per block of 64, one float32 per 256 of those bytes.
NF4_BITS = 4 + 8 / QUANT_BLOCK + 32 / (256 * QUANT_BLOCK)
FRAME = (360, 640)  # pixels, height and width assumed of a video for towers that keep a frame's shape


class Shapes(NamedTuple):
    """The numbers that memory follows from."""

    config: PretrainedConfig
    text: PretrainedConfig  # of the decoder
    family: Family
    images: ImageSpec
    dtype: torch.dtype  # of what is not quantised
    width: int  # H
    ffn: int  # I
    query: int  # heads x width of a head
    layers: int
    vocabulary: int
    linear: int  # parameters of the decoder's linears: in 4 bits, where the recipe says so
    attention: int  # of those of attention
    largest: int  # of the largest of them
    rest: int  # embeddings, norms, head: never quantised
    tower: int  # vision tower and projector
    lora: int  # parameters of one adapter
    frame_tokens: int  # P of towers of one size, before pruning; 0 where it depends on the video
    deepstack: int  # feature tensors per token beyond the first
    fused_norms: bool  # see `model/norms.py`

    def base_bytes(self, section: Model, tower: bool) -> int:
        bits = NF4_BITS if section.quantization == "nf4" else 8 * self.dtype.itemsize
        return int(self.linear * bits / 8) + self.dtype.itemsize * (self.rest + tower * self.tower)


def shapes_of(section: Model, device: torch.device) -> Shapes:
    """Raises ModelError for a base that is not one of the families, or cannot be read."""
    if shipped := shipped_facts(section):
        section = section.model_copy(update={"base": str(shipped), "revision": None})
    config = read_config(section)
    family = family_of(config)
    path = resolve_base(section.base)
    images = image_spec(path, section.revision, any_size=family.any_size, of_video=family.of_video)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    decoder, text = model.get_decoder(), config.get_text_config()
    linears = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    parts = [getattr(model.base_model, name, None) for name in family.tower]
    linear = sum(layer.weight.numel() for layer in linears.values())
    tower = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    adapted = [m for name, m in linears.items() if name.rpartition(".")[2] in section.lora.targets]
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        config,
        text,
        family,
        images,
        torch_dtype(section, device),
        width=text.hidden_size,
        ffn=text.intermediate_size,
        query=text.num_attention_heads * head_width,
        layers=text.num_hidden_layers,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        linear=linear,
        attention=sum(m.weight.numel() for name, m in linears.items() if name.rpartition(".")[2] in ATTENTION),
        largest=max(layer.weight.numel() for layer in linears.values()),
        rest=sum(p.numel() for p in model.parameters()) - linear - tower,
        tower=tower,
        lora=sum(section.lora.rank * (m.in_features + m.out_features) for m in adapted),
        frame_tokens=0 if family.any_size else _frame_tokens(model, family, images),
        deepstack=len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ()),
        fused_norms=fuses_norms(section, device),
    )


def file_bytes(section: Model) -> int:
    """Of a base's weight files that lie in a folder here; 0 of others."""
    return sum(path.stat().st_size for path in Path(resolve_base(section.base)).glob("*.safetensors"))


def text_model_bytes(name: str, on_gpu: bool) -> int:
    """Weights of a causal language model, whose linears are in 4 bits on a GPU; read from its config alone."""
    config = AutoConfig.from_pretrained(resolve_base(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total, head = sum(p.numel() for p in model.parameters()), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    size = (config.dtype or torch.float32).itemsize
    return int(linear * NF4_BITS / 8) + size * (total - linear) if on_gpu else size * total


def _frame_tokens(model: nn.Module, family: Family, images: ImageSpec) -> int:
    if family.frame_tokens is not None:
        return family.frame_tokens(model.config)
    pixels_1CHW = torch.empty(1, 3, images.size.height, images.size.width, device="meta")
    return family.encode(model, pixels_1CHW, images).features_LGPD.shape[2]


def frame_size(shapes: Shapes, section: Features, frames: int) -> tuple[int, int]:
    """(height, width) in pixels of a frame as the tower takes it, when so many make up a view."""
    if not shapes.images.patch:
        return shapes.images.size.height, shapes.images.size.width
    return shapes.images.size._replace(limit=section.max_pixels).of(frames)(*FRAME)


def video_tokens(shapes: Shapes, section: Features, frames: int) -> int:
    """Tokens of a view of so many frames, pruned as the recipe says; the most that `dtd` can leave of them."""
    groups, tokens = frames, shapes.frame_tokens
    if patch := shapes.images.patch:
        groups = -(-frames // patch.frames)
        height, width = frame_size(shapes, section, frames)
        tokens = (height // (patch.side * patch.merge)) * (width // (patch.side * patch.merge))
    for step in section.prune:
        ((name, value),) = step.model_dump().items()
        if name != "pool":
            return count_kept(name, value, groups, tokens)
        tokens = value**2
    return groups * tokens


def video_text(shapes: Shapes, frames: int, count: Callable[[str], int]) -> int:
    """Tokens of what a family writes around the frames of a view of so many, one a second: times, marks, a heading."""
    if shapes.family.write is None:
        return 0
    groups = -(-frames // shapes.images.patch.frames) if shapes.images.patch else frames
    none = torch.empty(0)
    view = FeatureRecord(none, none, none, torch.arange(groups), none, none, 0, frames, float(frames))
    return count(shapes.family.write(view, ""))
