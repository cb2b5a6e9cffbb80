"""Tiny random checkpoints of each family, written in the real format: config, tokenizer, processor files,
safetensors."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WIDTH, FRAME, PATCH = 64, 32, 8
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'video' %}VIDEO"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = CHATML.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>")
VICUNA = (  # images or the video first, then the text
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for part in m.content %}{% if part.type != 'text' %}"
    "{{ '<' + part.type + '>\n' }}{% endif %}{% endfor %}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CORPUS = ["Frame from 00:01: Time 1.0s: Frame1: <0.5 seconds> user assistant what happens in the video ?\n\n"] * 3
CORPUS += ["yes", "no", "A", "B", " yes", " no", " A", " B"] * 4  # a judge's words are one token


class Tiny(NamedTuple):
    """What is special about a family's checkpoint."""

    config: type
    model: type
    special: list[str]  # added tokens, besides bos, eos and pad
    template: str | None
    eos: str = "<|im_end|>"
    bos: str | None = None
    embeddings: float = 0.4  # deviation, large enough that the model does not repeat one token for ever
    seed: int = 2


QWEN_TOKENS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
LLAVA_TOKENS = ["<image>", "<video>"]
TINY = {
    "llava": Tiny(hf.LlavaConfig, hf.LlavaForConditionalGeneration, LLAVA_TOKENS, VICUNA, "</s>", "<s>"),
    "llava_next_video": Tiny(
        hf.LlavaNextVideoConfig, hf.LlavaNextVideoForConditionalGeneration, LLAVA_TOKENS, VICUNA, "</s>", "<s>"
    ),
    "video_llava": Tiny(hf.VideoLlavaConfig, hf.VideoLlavaForConditionalGeneration, LLAVA_TOKENS, None, "</s>", "<s>"),
    "llava_onevision": Tiny(
        hf.LlavaOnevisionConfig,
        hf.LlavaOnevisionForConditionalGeneration,
        ["<|im_start|>", *LLAVA_TOKENS],
        CHATML.replace("VIDEO", "<video>\n"),
    ),
    "qwen2_vl": Tiny(hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, QWEN_TOKENS, QWEN),
    "qwen2_5_vl": Tiny(hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, QWEN_TOKENS, QWEN),
    "qwen3_vl": Tiny(hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, QWEN_TOKENS, QWEN),
    "video_llama_3": Tiny(
        hf.VideoLlama3Config,
        hf.VideoLlama3ForConditionalGeneration,
        ["<|im_start|>", *LLAVA_TOKENS],
        CHATML.replace("VIDEO", "<video>\n"),
    ),
    "internvl": Tiny(
        hf.InternVLConfig,
        hf.InternVLForConditionalGeneration,
        ["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        CHATML.replace("VIDEO", "<video>\n"),
        embeddings=0.12,
        seed=4,
    ),
    "smolvlm": Tiny(
        hf.SmolVLMConfig,
        hf.SmolVLMForConditionalGeneration,
        ["<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"],
        CHATML.replace("VIDEO", "<video>"),
        "<end_of_utterance>",
    ),
}


def build_tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that how text is cut before it is tokenised shows in the ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tiny.bos,
        eos_token=tiny.eos,
        pad_token="<pad>",
        additional_special_tokens=tiny.special,
        clean_up_tokenization_spaces=False,
    )


def _text(kind: str, vocabulary: int, **more) -> dict:
    return dict(
        model_type=kind,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        **more,
    )


def build_config(name: str, tokenizer: PreTrainedTokenizerFast):
    """Vocabulary 8 rows larger than the tokenizer's, as real ones are padded."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vocabulary = len(tokenizer) + 8
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": FRAME,
        "patch_size": PATCH,
    }
    if name in ("llava", "llava_next_video", "video_llava", "llava_onevision"):
        tower = "siglip_vision_model" if name == "llava_onevision" else "clip_vision_model"
        text = _text("qwen2" if name == "llava_onevision" else "llama", vocabulary, **ends)
        more = {} if name == "llava" else {"video_token_index": ids["<video>"]}
        if name == "llava_next_video":
            more |= {"image_grid_pinpoints": [[FRAME, FRAME]]}
        if name == "llava_onevision":
            vision["vision_use_head"] = False
            more |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
        return TINY[name].config(
            text_config=text, vision_config=vision | {"model_type": tower}, image_token_index=ids["<image>"], **more
        )
    mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        marks = {f"{key}_token_id": ids[f"<|{key}|>"] for key in ("vision_start", "vision_end")}
        marks |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
        patches = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH, "num_heads": 2}
        if name == "qwen2_vl":
            vision = dict(embed_dim=32, hidden_size=WIDTH, depth=2, num_heads=2, mlp_ratio=2, **patches)
        elif name == "qwen2_5_vl":
            vision = dict(**sizes, depth=2, fullatt_block_indexes=[1], window_size=32, tokens_per_second=2, **patches)
        else:
            vision = dict(**sizes, depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1], **patches)
            mrope["rope_parameters"]["mrope_interleaved"] = True
            mrope["head_dim"] = 16
        text = _text(f"{name}_text", vocabulary, **ends, **mrope)
        return TINY[name].config(text_config=text, vision_config=vision, tie_word_embeddings=False, **marks)
    if name == "video_llama_3":
        del vision["image_size"]
        marks = {"image_token_id": ids["<image>"], "video_token_id": ids["<video>"]}
        return TINY[name].config(text_config=_text("qwen2", vocabulary, **ends), vision_config=vision, **marks)
    if name == "internvl":
        vision |= {"image_size": [FRAME, FRAME], "patch_size": [PATCH, PATCH]}
        return TINY[name].config(
            text_config=_text("qwen2", vocabulary, **ends),
            vision_config=vision,
            image_token_id=ids["<IMG_CONTEXT>"],
            image_seq_length=4,
            downsample_ratio=0.5,
        )
    return TINY[name].config(
        text_config=_text("llama", vocabulary, **ends),
        vision_config=vision,
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=ends["pad_token_id"],
    )


def processor_files(name: str) -> dict[str, dict]:
    """The settings by file name, spelled as the family's published checkpoints spell them."""
    common = {
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "do_normalize": True,
        "do_rescale": True,
    }
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    crop = {"size": {"shortest_edge": FRAME}, "crop_size": {"height": FRAME, "width": FRAME}, "do_center_crop": True}
    exact = {"size": {"height": FRAME, "width": FRAME}}
    if name in ("qwen2_vl", "qwen2_5_vl"):
        return {"preprocessor_config.json": common | patches | {"min_pixels": 256, "max_pixels": 1536}}
    if name == "qwen3_vl":
        area = {"size": {"shortest_edge": 512, "longest_edge": 6 * 1536}}
        return {
            "preprocessor_config.json": common | patches | {"size": {"shortest_edge": 1, "longest_edge": 2}},
            "video_preprocessor_config.json": common | patches | area,
        }
    if name == "video_llama_3":
        area = {"size": {"shortest_edge": 256, "longest_edge": 6 * 1536}, "temporal_patch_size": 1}
        return {"processor_config.json": {"video_processor": common | patches | area}}
    if name in ("llava", "video_llava", "llava_next_video"):
        return {"preprocessor_config.json": common | crop}
    if name == "smolvlm":
        return {
            "preprocessor_config.json": common
            | {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": FRAME}}
        }
    return {"preprocessor_config.json": common | exact, "video_preprocessor_config.json": common | exact}


def write(name: str, folder: Path) -> Path:
    """A checkpoint of family `name` in `folder`, with weights large enough for every part to show in the logits."""
    tiny = TINY[name]
    tokenizer = build_tokenizer(tiny)
    torch.manual_seed(tiny.seed)
    model = tiny.model(build_config(name, tokenizer)).eval()
    for key, weight in model.named_parameters():
        if weight.dim() > 1 or key.endswith(("image_newline", "class_embedding")):
            torch.nn.init.normal_(weight.data, std=tiny.embeddings if "embed_tokens" in key else 0.12)
    model.save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    for file, settings in processor_files(name).items():
        (folder / file).write_text(json.dumps(settings))
    if tiny.template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": tiny.template}))
    return folder
