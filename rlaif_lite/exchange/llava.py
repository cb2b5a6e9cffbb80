"""Checkpoints in LLaVA's own layout -> transformers' LLaVA layout, which plain `from_pretrained` and a recipe load.

For the released VLM-RLAIF models (vlm_sft_video_llava_7b and 13b, vlm_rlaif_video_llava_7b) and LLaVA-1.5 itself. Key
by key: every tensor of the source has a place or is named in a refusal, every tensor of the target comes from
somewhere. Tensors keep their dtype and their bits. Written under the names that hub
checkpoints have (`language_model.model.*`, `vision_tower.vision_model.*`): every transformers version loads those.

Two things are made, because the source leaves them to its code. `<image>` becomes a token, and the embedding gains rows
(to a multiple of 64), each the mean of the others: an input never reads them, and as an output such a row gets an
average logit. The chat template is vicuna_v1's, with which the models were trained; the tokenizer puts a blank after
`<image>`, as the release does by tokenising the text around it piece by piece.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AddedToken, CLIPVisionConfig, LlamaConfig, LlamaTokenizer, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from ..errors import ModelError
from ..files import write_json
from ..model.families import VICUNA
from .files import SHARD_BYTES, ShardWriter, WeightFile, listed, read_json, weight_files, whole_folder

IMAGE = "<image>"
ROWS_MULTIPLE = 64
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # a row for each token
RENAMED = {
    "model.embed_tokens.": "language_model.model.embed_tokens.",
    "model.layers.": "language_model.model.layers.",
    "model.norm.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.vision_model.": "vision_tower.vision_model.",
}
RENAMED_TOWER = {"vision_model.": "vision_tower.vision_model."}  # a CLIP checkpoint's names
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")  # buffers that older versions stored
CLIP_TEXT = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")
# LLaVA-1.5 names its tower and leaves the settings to it. These are that tower's.
CLIP_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_336_NAME = "openai/clip-vit-large-patch14-336"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


class Imported(NamedTuple):
    """What a conversion did."""

    tensors: int
    bytes: int
    left_out: list[str]  # keys of the source that are computed, not learnt


class Part(NamedTuple):
    """Where a tensor of the target comes from."""

    file: WeightFile
    key: str


def import_llava(source: Path, out: Path, vision_tower: Path | None = None, shard_bytes: int = SHARD_BYTES) -> Imported:
    """Convert the checkpoint in `source` into the new folder `out`.

    `vision_tower` is a folder with CLIP's checkpoint: needed when the source holds no tower (LLaVA-1.5 itself), and its
    settings are taken when it is given. Raises ModelError with the keys that have no place, are missing, or have
    another shape than the configuration says; `out` is then not made."""
    settings = read_json(source / "config.json")
    _check_settings(settings)
    files = weight_files(source)
    parts, unmapped, left_out = _places(files, RENAMED, COMPUTED)
    if not any(target.startswith("vision_tower.") for target in parts):
        if vision_tower is None:
            raise ModelError(
                f"{source} holds no vision tower (it names {settings['mm_vision_tower']}). Download that one and give "
                "its folder as --vision-tower."
            )
        tower_parts, tower_unmapped, _ = _places(weight_files(vision_tower), RENAMED_TOWER, CLIP_TEXT, COMPUTED)
        parts, unmapped = parts | tower_parts, unmapped + tower_unmapped
    tokenizer = _tokenizer(source)
    rows = -(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    config = _config(settings, vision_tower, rows, tokenizer.convert_tokens_to_ids(IMAGE))
    _check(source, parts, unmapped, shapes_of(config), words=settings["vocab_size"])
    with whole_folder(out) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for target, part in parts.items():
            tensor = part.file[part.key]
            if target in EMBEDDINGS:  # more rows, each the mean of those there are
                mean_D = tensor.float().mean(0).to(tensor.dtype)
                tensor = torch.cat([tensor, mean_D.expand(rows - len(tensor), -1)])
            writer.add(target, tensor)
        writer.finish()
        first = parts[EMBEDDINGS[0]]
        config.dtype = first.file[first.key].dtype
        config.architectures = [Llava.__name__]
        config.save_pretrained(folder)
        _write_processor(folder, settings, vision_tower, config)
        tokenizer.save_pretrained(folder)
        # Under its own class transformers would build it anew, without `legacy`; tokenizer.json says it all.
        path = folder / "tokenizer_config.json"
        write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return Imported(len(parts), writer.bytes, left_out)


def shapes_of(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """The names on disk, and the shapes, of every tensor that this configuration asks for."""
    with torch.device("meta"):
        model = Llava(config)
    names = (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
    shapes = {}
    for name, tensor in model.state_dict().items():
        for pattern, start in names:
            name = re.sub(pattern, start, name)
        shapes[name] = tuple(tensor.shape)
    return shapes


# ---- the plan


def _check_settings(settings: dict) -> None:
    """Refuse what is not LLaVA-1.5's layout: other projectors, towers and special tokens would be mapped wrongly."""
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "rope_scaling": None}
    for key, value in expected.items():
        if settings.get(key) != value:
            raise ModelError(
                f"config.json has `{key}` = {settings.get(key)!r}; only LLaVA-1.5's layout ({value!r}) is converted."
            )
    if missing := [key for key in (*TEXT_KEYS[:4], "vocab_size", "mm_vision_tower") if key not in settings]:
        raise ModelError(f"config.json has no {', '.join(missing)}: it is not a checkpoint in LLaVA's own layout.")


def _places(
    files: list[WeightFile], renamed: dict[str, str], *not_needed: re.Pattern
) -> tuple[dict[str, Part], list[str], list[str]]:
    """(where each target comes from, keys without a place, keys that need none)."""
    parts, unmapped, left_out = {}, [], []
    for file in files:
        for key in file.shapes:
            start = next((start for start in renamed if key.startswith(start)), None)
            if any(pattern.search(key) for pattern in not_needed):
                left_out.append(key)
            elif start is None:
                unmapped.append(key)
            else:
                parts[renamed[start] + key.removeprefix(start)] = Part(file, key)
    return parts, unmapped, left_out


def _check(source: Path, parts: dict[str, Part], unmapped: list[str], shapes: dict, words: int) -> None:
    unmapped = unmapped + [part.key for target, part in parts.items() if target not in shapes]
    missing = [target for target in shapes if target not in parts]
    if unmapped or missing:
        said = [f"{len(unmapped)} tensors have no place in transformers' LLaVA:{listed(unmapped)}"] if unmapped else []
        said += [f"{len(missing)} tensors are missing, by their names there:{listed(missing)}"] if missing else []
        raise ModelError(f"{source} is not converted. " + "\n".join(said))
    wrong = []
    for target, part in parts.items():
        want = (words, shapes[target][1]) if target in EMBEDDINGS else shapes[target]
        if part.file.shapes[part.key] != want:
            wrong.append(f"{part.key}: {part.file.shapes[part.key]}, not {want}")
    if wrong:
        raise ModelError(
            f"{source} is not converted: {len(wrong)} tensors have another shape than the configuration "
            f"says. Is the vision tower another one?{listed(wrong)}"
        )


# ---- the files beside the weights


def _config(settings: dict, tower: Path | None, rows: int, image_id: int) -> LlavaConfig:
    if tower is not None:
        vision = read_json(tower / "config.json")
        vision = vision.get("vision_config", vision)
    elif settings["mm_vision_tower"].rstrip("/").endswith(CLIP_336_NAME.split("/")[1]):
        vision = CLIP_336
    else:
        raise ModelError(
            f"The vision tower is {settings['mm_vision_tower']}, whose settings are not known here (known: "
            f"{CLIP_336_NAME}). Give its folder as --vision-tower."
        )
    clip = CLIPVisionConfig(
        **{key: vision[key] for key in (*CLIP_336, "hidden_act", "layer_norm_eps") if key in vision}
    )
    text = {key: settings[key] for key in TEXT_KEYS if settings.get(key) is not None}
    text["rope_theta"] = settings.get("rope_theta", 10000.0)  # older files leave Llama's out
    strategy = {"patch": "default", "cls_patch": "full"}[settings.get("mm_vision_select_feature", "patch")]
    return LlavaConfig(
        vision_config=clip.to_dict(),
        text_config=LlamaConfig(**text, vocab_size=rows).to_dict(),
        image_token_index=image_id,
        image_seq_length=(clip.image_size // clip.patch_size) ** 2,
        vision_feature_layer=settings["mm_vision_select_layer"],
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )


def _tokenizer(source: Path) -> LlamaTokenizer:
    try:
        tokenizer = LlamaTokenizer.from_pretrained(source, legacy=True)  # legacy: a blank after each special token
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(
            f"The tokenizer in {source} cannot be read: {error}\nA tokenizer.model needs sentencepiece and protobuf: "
            "pip install 'rlaif-lite[import]'."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token  # as the release sets it
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    tokenizer.chat_template = VICUNA
    return tokenizer


def _write_processor(folder: Path, settings: dict, tower: Path | None, config: LlavaConfig) -> None:
    side = config.vision_config.image_size
    frames = {
        "image_processor_type": "LlavaImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        given = read_json(tower / "preprocessor_config.json")
        frames |= {key: given[key] for key in ("image_mean", "image_std", "resample") if key in given}
    frames["do_pad"] = settings.get("image_aspect_ratio") == "pad"  # to a square of the mean colour, before resizing
    write_json(folder / "preprocessor_config.json", frames)
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        },
    )
    ids = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
