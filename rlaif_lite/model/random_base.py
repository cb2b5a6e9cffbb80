"""A base with random weights: what it costs to run does not depend on what it has learnt.

`checkpoint_of` writes a checkpoint's small files and no weights; for the 7B and smaller bases of the shipped recipes
(and LLaVA-1.5-13B) they come from the table below, so that nothing is downloaded. `load_random` is `load_base` without
reading weights: each linear layer is drawn on the device and quantised before the next, and the whole model is never
there in full precision.

The tokenizer is a real one, of as many words as the head has rows: every answer then reads back as it was sampled, and
the end of an answer is as unlikely as any other word, so answers have the longest length, the dearest case.
"""

import json
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from ..recipe import Model
from .base import Base, check_widths, finish, read_config, resolve_base, torch_dtype
from .families import family_of

STD = 0.02  # of every weight, as these models are initialised
WORDS = "yes no A B video true false ."

CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
QWEN_VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    window_size=112,
    patch_size=14,
    fullatt_block_indexes=[7, 15, 23, 31],
    spatial_merge_size=2,
    temporal_patch_size=2,
    tokens_per_second=2,
)
QWEN_MARKS = ("vision_start", "vision_end", "image_pad", "video_pad")


def _text(kind: str, width: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    return dict(
        model_type=kind,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
    )


# From the config.json of each base: the text model, and whether head and embeddings are one.
FACTS = {
    "llava-hf/llava-1.5-7b-hf": (_text("llama", 4096, 11008, 32, 32, 32, 32064), False),
    "llava-hf/llava-1.5-13b-hf": (_text("llama", 5120, 13824, 40, 40, 40, 32064), False),
    "Qwen/Qwen2.5-VL-3B-Instruct": (_text("qwen2_5_vl_text", 2048, 11008, 36, 16, 2, 151936), True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (_text("qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064), False),
}
# To rehearse without a GPU: the same architecture with two narrow layers.
SMALL_TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=2048,
)
SMALL_CLIP = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=168)
SMALL_QWEN = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, fullatt_block_indexes=[1])
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }} {% else %}<|vision_start|><|video_pad|><|vision_end|> {% endif %}{% endfor %}<|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def checkpoint_of(name: str, folder: Path, words: tuple[str, ...], small: bool = False) -> str:
    """The path to give `load_random` for base `name`: `folder`, filled from the table, or where its own config is.

    words: those that must be single tokens. small: shrink a base of the table to two narrow layers.
    """
    if name not in FACTS:
        return resolve_base(name)
    text, tied = FACTS[name]
    text = text | (SMALL_TEXT if small else {})
    qwen = text["model_type"].startswith("qwen")
    special = ["<|im_start|>", *(f"<|{mark}|>" for mark in QWEN_MARKS)] if qwen else ["<image>"]
    ends = ("<|im_end|>", None) if qwen else ("</s>", "<s>")
    tokenizer = _tokenizer(text["vocab_size"], words, special, *ends)
    number = tokenizer.convert_tokens_to_ids
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if qwen:
        tokenizer.chat_template = CHATML
        part = text["hidden_size"] // text["num_attention_heads"] // 8  # of the rope: 16, 24, 24 for heads of 128
        sections = [part, 3 * part // 2, 3 * part // 2]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        marks = {f"{key}_token_id": number(f"<|{key}|>") for key in ("vision_start", "vision_end")}
        marks |= {"image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>")}
        vision = QWEN_VISION | (SMALL_QWEN if small else {}) | {"out_hidden_size": text["hidden_size"]}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **marks
        )
        frames = {
            "min_pixels": 56 * 56,
            "max_pixels": 28 * 28 * 1280 if not small else 28 * 28 * 16,
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
        }
    else:
        vision = CLIP | (SMALL_CLIP if small else {})
        config = transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=number("<image>"), tie_word_embeddings=tied
        )
        frames = {
            "size": {"shortest_edge": vision["image_size"]},
            "do_center_crop": True,
            "crop_size": {"height": vision["image_size"], "width": vision["image_size"]},
        }
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    frames |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(frames), encoding="utf-8")
    return str(folder)


def _tokenizer(
    size: int, words: tuple[str, ...], special: list[str], eos: str, bos: str | None
) -> PreTrainedTokenizerFast:
    """`size` words, one token each."""
    marks = ["<unk>", "<pad>", eos, *([bos] if bos else []), *special]
    known = list(dict.fromkeys([*marks, *WORDS.split(), *words]))
    known += [f"w{i}" for i in range(size - len(known))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=eos,
        bos_token=bos,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def load_random(section: Model, device: torch.device, tower: bool = True) -> Base:
    """As `load_base`, with weights drawn instead of read."""
    config = read_config(section)
    family_of(config)
    dtype = torch_dtype(section, device)
    with init_empty_weights(include_buffers=False):  # buffers hold the rope's frequencies, which are no weights
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(0)
    if section.quantization == "nf4":
        check_widths(config, section.base)
        linears = {id(layer) for layer in model.get_decoder().modules() if isinstance(layer, nn.Linear)}
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in linears:
                    setattr(parent, name, _quantised(child, dtype, device))
        model.is_loaded_in_4bit = True  # PEFT asks for it
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(name, nn.Parameter(_drawn(name, parameter.shape, dtype, device)))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    model.tie_weights()
    return finish(model, section, device, tower)


def _drawn(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Vectors scale (ones) or shift (zeros); the rest is noise."""
    empty = torch.empty(shape, dtype=dtype, device=device)
    return empty.fill_(float(name == "weight")) if len(shape) == 1 else empty.normal_(0.0, STD)


def _quantised(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The layer in NF4 with double quantisation, its weights drawn in full precision and freed at once."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = _drawn("weight", layer.weight.shape, dtype, device)
    made.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made).to(
        device
    )
    return made
