"""The architecture of the embedded base: a genuine transformers LLaVA-NeXT-Video, very small.

A CLIP tower reads 32 x 32 frames in 8 x 8 patches; LLaVA-NeXT-Video's own 2 x 2 pooling leaves 4 tokens per frame; a
6-layer Llama reads them. Every linear layer of the Llama takes a multiple of 64 inputs: bitsandbytes' CPU kernel for
NF4 is silently wrong for other widths.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from rlaif_lite.data.world_text import COLOURS, MOTIONS, ORDINALS, SHAPES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>", "<ans>")
WORDS = [
    ".",
    "?",
    ":",
    "-",
    "A",
    "B",
    "a",
    "and",
    "also",
    "star",
    "describe",
    "the",
    "clip",
    "video",
    "context",
    "claim",
    "response",
    "better",
    "yes",
    "no",
    "what",
    "is",
    "colour",
    "shape",
    "motion",
    "question",
    "true",
    "answer",
    "short",
    "how",
    "many",
]
VOCABULARY = (*SPECIAL, *WORDS, *ORDINALS, *COLOURS, *SHAPES, *MOTIONS)

FRAME_SIZE = 32  # pixels the tower sees, width and height
TOKENS_PER_FRAME = 4
WIDTH, LAYERS, HEADS, MLP = 128, 6, 8, 256
VISION_WIDTH, VISION_LAYERS, VISION_HEADS = 64, 2, 4
PATCH = 8

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message.content is string %}{% set text = message.content %}{% else %}{% set words = namespace(all=[]) %}"
    "{% for part in message.content %}"
    "{% set words.all = words.all + ['<video>' if part.type == 'video' else part.text] %}{% endfor %}"
    "{% set text = words.all | join(' ') %}{% endif %}"
    "{% if message.role == 'assistant' %} <ans> {% generation %}{{ text }} </s>{% endgeneration %}"
    "{% else %} {{ text }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <ans>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: text is split at white space and every word is one token."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<video>", "<image>", "<ans>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config() -> LlavaNextVideoConfig:
    number = {word: index for index, word in enumerate(VOCABULARY)}
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        image_size=FRAME_SIZE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=number["<s>"],
        eos_token_id=number["</s>"],
        pad_token_id=number["<pad>"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlavaNextVideoConfig(
        vision_config=vision,
        text_config=text,
        video_token_index=number["<video>"],
        image_token_index=number["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
        image_seq_length=TOKENS_PER_FRAME,
        video_seq_length=6 * TOKENS_PER_FRAME,
        tie_word_embeddings=True,
        bos_token_id=number["<s>"],
        eos_token_id=number["</s>"],
        pad_token_id=number["<pad>"],
    )


def build_model(seed: int = 0) -> LlavaNextVideoForConditionalGeneration:
    """The model as pretraining starts it: transformers' default deviation of 0.02 learns slowly at this width."""
    torch.manual_seed(seed)
    model = LlavaNextVideoForConditionalGeneration(build_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.normal_(0, 0.2)
            elif name.endswith("position_embedding.weight"):
                weight.normal_(0, 0.1)
            elif weight.dim() == 2:
                torch.nn.init.xavier_normal_(weight)
            if name.endswith(("language_model.o_proj.weight", "o_proj.weight", "down_proj.weight")):
                weight.mul_(0.3)  # what a block adds to the stream starts small
    return model


def preprocessor() -> dict:
    """How frames become pixel values: RGB, 32 x 32, no crop, value / 127.5 - 1."""
    return {
        "do_resize": True,
        "size": {"height": FRAME_SIZE, "width": FRAME_SIZE},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "resample": 3,
    }


def save(model: LlavaNextVideoForConditionalGeneration, folder: str | Path) -> None:
    """Writes the folder that plain `from_pretrained` loads: weights, configuration, tokenizer, processor files."""
    folder = Path(folder)
    model.generation_config.update(do_sample=False, max_new_tokens=64)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    frames = preprocessor()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**frames, "image_processor_type": "LlavaNextImageProcessor"}, indent=2) + "\n"
    )
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({**frames, "video_processor_type": "LlavaNextVideoVideoProcessor"}, indent=2) + "\n"
    )
    processor = {
        "processor_class": "LlavaNextVideoProcessor",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "video_token": "<video>",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
