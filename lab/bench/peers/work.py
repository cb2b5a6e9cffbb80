"""What all packages are given: a checkpoint with drawn weights, videos, and what is asked and answered about them.

The checkpoint has Qwen2.5-VL's architecture and files. Its tokenizer is trained on this project's own pages. A constant
in the residual stream reaches the head's rows of EOS, of the special tokens and of all but plain words, so no package
ever draws these: every answer has the longest length, and reads back as it was sampled.
"""

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lab.bench import ROOT
from rlaif_lite.data.world import WorldConfig, write_video
from rlaif_lite.files import write_json

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += [f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
TEMPLATE = (  # the published one's text, for turns of texts, images and videos
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|>"
    "<|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "Describe what happens in the video, event by event, and say what stands in the corner."
PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class Sizes:
    """Of the work; the defaults are what docs/results/peers_cpu.md measures."""

    prompts: int = 1  # of a GRPO step
    group: int = 4  # answers to each
    pairs: int = 2  # of a DPO step
    records: int = 4  # of an SFT step
    new_tokens: int = 32
    frames: int = 8  # of a video; packages that take images get every second one
    side: int = 140  # pixels
    videos: int = 8
    rank: int = 16
    width: int = 512
    layers: int = 8
    vocabulary: int = 16384
    steps: int = 6


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write `checkpoint`, `videos`, `frames` and `work.json` into a folder."""
    tokenizer = write_checkpoint(folder / "checkpoint", sizes)
    words = plain_words(tokenizer)
    draw = random.Random(0)
    items = []
    for number in range(sizes.videos):
        video = folder / "videos" / f"{number}.mp4"
        video.parent.mkdir(exist_ok=True)
        write_video(video, 0, "peers", number, WorldConfig(size=sizes.side))
        chosen, rejected = ("".join(draw.choices(words, k=sizes.new_tokens - 1)).strip() for _ in range(2))
        frames = write_frames(video, folder / "frames" / str(number), sizes.frames // 2)
        item = {"video": str(video), "frames": frames, "question": QUESTION}
        items.append(item | {"chosen": chosen, "rejected": rejected})
    batch = {"grpo": sizes.prompts * sizes.group, "dpo": sizes.pairs, "sft": sizes.records}
    given = {"batch": batch, "kl": 0.04, "beta": 0.1, "lr": 1e-5, "items": items}
    write_json(folder / "work.json", asdict(sizes) | given)


def write_frames(video: Path, folder: Path, count: int) -> list[str]:
    """`count` frames, spread evenly, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        frames[i * len(frames) // count].save(path)
    return [str(path) for path in paths]


def plain_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The words, with the blank before them, that are one token."""
    return [f" {word[1:]}" for word in sorted(tokenizer.get_vocab()) if re.fullmatch(r"Ġ[A-Za-z]{2,}", word)]


def write_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, cut into words as GPT-2's is."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        pages, trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@torch.no_grad()
def write_checkpoint(folder: Path, sizes: Sizes) -> PreTrainedTokenizerFast:
    """Config, drawn weights, tokenizer and processor files, as published checkpoints have them."""
    tokenizer = write_tokenizer()
    number = tokenizer.convert_tokens_to_ids
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = dict(
        model_type="qwen2_5_vl_text",
        hidden_size=sizes.width,
        intermediate_size=7 * sizes.width // 2,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 64,
        num_key_value_heads=max(1, sizes.width // 256),
        vocab_size=sizes.vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        **ends,
    )
    vision = dict(
        hidden_size=sizes.width // 2,
        intermediate_size=11 * sizes.width // 8,
        out_hidden_size=sizes.width,
        depth=6,
        num_heads=max(1, sizes.width // 128),
        fullatt_block_indexes=[2, 5],
        window_size=112,
        tokens_per_second=2,
        patch_size=PATCHES["patch_size"],
        spatial_merge_size=PATCHES["merge_size"],
        temporal_patch_size=PATCHES["temporal_patch_size"],
    )
    marks = {f"{name}_token_id": number(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    marks |= {f"{name}_token_id": number(f"<|{name}_pad|>") for name in ("image", "video")}
    text["bos_token_id"] = None
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **marks)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    decoder, head = model.model.language_model, model.lm_head.weight
    decoder.embed_tokens.weight[:, 0] = 1.0  # the constant: no layer writes to this place
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    last = model.model.visual.merger.mlp[2]
    last.weight[0], last.bias[0] = 0.0, 1.0
    allowed = torch.zeros(len(head), dtype=torch.bool)
    allowed[[number(f"Ġ{word.strip()}") for word in plain_words(tokenizer)]] = True
    head[:, 0] = torch.where(allowed, 0.0, -1e3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = {"image_mean": mean, "image_std": std, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    kinds = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    write_json(folder / "preprocessor_config.json", pixels | PATCHES | kinds)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    return tokenizer
