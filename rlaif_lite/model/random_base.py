"""A base with random weights: what it costs to run does not depend on what it has learnt.

`checkpoint_of` writes a checkpoint's small files and no weights. For the bases of the shipped recipes they come
from the facts in `known_bases.py`, so nothing is downloaded. `load_random` is `load_base` without reading
weights: each linear layer is drawn on the device and quantised before the next, and the whole model is never
there in full precision.

The tokenizer is a real one, of as many words as the head has rows: every answer then reads back as it was sampled, and
the end of an answer is as unlikely as any other word, so answers have the longest length, the dearest case.
"""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from ..recipe import Model
from .base import Base, check_widths, finish, read_config, resolve_base, torch_dtype
from .families import family_of
from .known_bases import known_base
from .pixels import read_json

STD = 0.02  # of every weight, as these models are initialised
POSITIONS = 32768  # at least: a profile may be of longer sequences than the base was trained on
WORDS = "yes no A B video true false ."

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm")  # those that a tokenizer is made up for
SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json")  # of frames
SMOL_MARKS = ["<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>"]
QWEN_MARKS = ("vision_start", "vision_end", "image_pad", "video_pad")
# To rehearse without a GPU: the same architecture with two narrow layers.
SMALL_TEXT = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=2048)
SMALL_TEXT |= dict(num_attention_heads=2, num_key_value_heads=2)
SMALL_CLIP = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=168)
SMALL_QWEN = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2)
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }} {% else %}VIDEO {% endif %}{% endfor %}<|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def checkpoint_of(name: str, folder: Path, words: tuple[str, ...], small: bool = False) -> str:
    """The path to give `load_random` for base `name`: `folder`, filled from shipped facts, or where its own config is.

    words: those that must be single tokens. small: shrink a base of known facts to two narrow layers.
    """
    known = known_base(name)
    facts = known and read_json(known, "config.json", None)
    if not facts or facts["model_type"] not in FAMILIES:
        return resolve_base(name)
    kind, text, vision = facts["model_type"], facts["text_config"], facts["vision_config"]
    qwen, image, smol = kind.startswith("qwen"), kind == "llava", kind == "smolvlm"
    settings = {name: found for name in SETTINGS if (found := read_json(known, name, None))}
    text["max_position_embeddings"] = max(text["max_position_embeddings"], POSITIONS)
    if small:
        _shrink(kind, text, vision, settings)
    special = [*([] if image else ["<|im_start|>"]), *(f"<|{mark}|>" for mark in QWEN_MARKS if qwen)]
    special = SMOL_MARKS if smol else special + ([] if qwen else ["<image>", "<video>"])
    ends = ("</s>", "<s>") if image else ("<end_of_utterance>" if smol else "<|im_end|>", None)
    tokenizer = _tokenizer(text["vocab_size"], words, special, *ends)
    number = tokenizer.convert_tokens_to_ids
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if smol:
        tokenizer.chat_template = family_of(AutoConfig.for_model(kind)).template()
        facts |= {"image_token_id": number("<image>"), "pad_token_id": tokenizer.pad_token_id}
    elif not image:
        mark = "<|vision_start|><|video_pad|><|vision_end|>" if qwen else "<video>"
        tokenizer.chat_template = CHATML.replace("VIDEO", mark)
    if qwen:
        facts |= {f"{key}_token_id": number(f"<|{key}|>") for key in ("vision_start", "vision_end")}
        facts |= {"image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>")}
    elif not smol:
        facts |= {"image_token_index": number("<image>"), "video_token_index": number("<video>")}
    if kind == "qwen2_5_vl":
        part = text["hidden_size"] // text["num_attention_heads"] // 8  # of the rope: 16, 24, 24 for heads of 128
        text["rope_parameters"]["mrope_section"] = [part, 3 * part // 2, 3 * part // 2]
    AutoConfig.for_model(**facts).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, found in settings.items():
        (folder / name).write_text(json.dumps(found), encoding="utf-8")
    return str(folder)


def _shrink(kind: str, text: dict, vision: dict, settings: dict[str, dict]) -> None:
    """Two narrow layers, and small frames."""
    text |= SMALL_TEXT
    if kind == "smolvlm":  # twelve patches a side: both scale factors divide it
        side = {"longest_edge": 12 * vision["patch_size"]}
        vision |= SMALL_CLIP | {"image_size": side["longest_edge"]}
        settings[SETTINGS[0]] |= {"size": side, "max_image_size": side}
        return
    if not kind.startswith("qwen"):
        vision |= SMALL_CLIP
        side = SMALL_CLIP["image_size"]
        shape = {"height": side, "width": side}
        settings[SETTINGS[0]] |= (
            {"size": {"shortest_edge": side}, "crop_size": shape} if kind == "llava" else {"size": shape}
        )
        return
    vision |= SMALL_QWEN | {"out_hidden_size": text["hidden_size"]}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1]}
        settings[SETTINGS[0]] |= {"max_pixels": 28 * 28 * 16}
    else:
        vision |= {"deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 64}
        text["rope_parameters"]["mrope_section"] = [12, 10, 10]
        settings[SETTINGS[1]]["size"] = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}


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
