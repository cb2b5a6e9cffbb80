"""Small random checkpoints with the key names and in the files of the VLM-RLAIF release (LLaVA's own layout)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, LAYERS, HEADS = 64, 96, 2, 4
CLIP_WIDTH, CLIP_FFN, CLIP_LAYERS, SIDE, PATCH = 32, 48, 3, 28, 14
WORDS = 320  # of the tokenizer
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": CLIP_WIDTH,
    "intermediate_size": CLIP_FFN,
    "num_hidden_layers": CLIP_LAYERS,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 16,
}
CONFIG = {  # as LlavaLlamaForCausalLM of transformers 4.34 writes it
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "torch_dtype": "float16",
    "vocab_size": WORDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": CLIP_WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype=torch.float16) -> dict[str, torch.Tensor]:
    """Normal weights; norms around one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        tensor = 0.2 * torch.randn(shape, generator=generator)
        tensors[key] = (tensor + 1 if "norm" in key and key.endswith("weight") else tensor).to(dtype)
    return tensors


def language(seed: int = 0) -> dict[str, torch.Tensor]:
    """Vicuna with the projector, as in LLaVA-1.5's files."""
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {
            f"model.layers.{i}.{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    shapes |= {"model.mm_projector.0.weight": (WIDTH, CLIP_WIDTH), "model.mm_projector.0.bias": (WIDTH,)}
    shapes |= {"model.mm_projector.2.weight": (WIDTH, WIDTH), "model.mm_projector.2.bias": (WIDTH,)}
    return draw(shapes, seed)


def tower(seed: int = 1) -> dict[str, torch.Tensor]:
    """CLIP's vision model under its own names."""
    d, f = CLIP_WIDTH, CLIP_FFN
    shapes = {"embeddings.class_embedding": (d,), "embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH)}
    shapes |= {"embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, d)}
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    for i in range(CLIP_LAYERS):
        at = f"encoder.layers.{i}."
        for name, (rows, columns) in {
            f"self_attn.{x}": (d, d) for x in ("k_proj", "v_proj", "q_proj", "out_proj")
        }.items():
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        shapes |= {
            f"{at}mlp.fc1.weight": (f, d),
            f"{at}mlp.fc1.bias": (f,),
            f"{at}mlp.fc2.weight": (d, f),
            f"{at}mlp.fc2.bias": (d,),
        }
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}{norm}.weight": (d,), f"{at}{norm}.bias": (d,)}
    return {f"vision_model.{key}": tensor for key, tensor in draw(shapes, seed).items()}


def write_clip(folder: Path) -> Path:
    """A CLIP checkpoint: the vision model, and what a whole CLIP has beside it."""
    folder.mkdir()
    extra = {
        "logit_scale": torch.ones(()),
        "text_projection.weight": torch.ones(2, 2),
        "text_model.final_layer_norm.weight": torch.ones(2),
    }
    save_file(tower() | extra, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]})
    )
    return folder


def write_tokenizer(folder: Path) -> None:
    """A SentencePiece model like Llama's, and the two files that the release has beside it; no tokenizer.json."""
    import sentencepiece

    text = folder / "corpus.txt"
    text.write_text(
        "\n".join(
            ["what happens in this video ?", "a man runs down the red street", "A chat USER: it ASSISTANT: sits"] * 50
        )
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=WORDS,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    settings |= {f"{name}_token": token for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))


def write_llava(folder: Path, tensors: dict[str, torch.Tensor], files: int = 2) -> Path:
    """A checkpoint as the release uploads it: torch pickles in shards, an index, configuration, tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    keys, weight_map = sorted(tensors), {}
    for number in range(files):
        name = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        part = {key: tensors[key] for key in keys[number::files]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def released_llava(seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of a released 7B: language model, projector, and the tower inside."""
    return language(seed) | {f"model.vision_tower.vision_tower.{key}": tensor for key, tensor in tower().items()}


def write_lora(
    folder: Path, inside: str, rank: int = 4, alpha: int = 6, head: bool = False, seed: int = 2, width: int = WIDTH
) -> dict:
    """A LoRA checkpoint of PEFT 0.4 as the release uploads it; its tensors."""
    shapes = {}
    for i in range(LAYERS):
        for name, shape in LINEARS.items():
            rows, columns = (width if n == WIDTH else n for n in shape)
            at = f"base_model.model.model.layers.{i}.{name}"
            shapes |= {f"{at}.lora_A.weight": (rank, columns), f"{at}.lora_B.weight": (rows, rank)}
    tensors = draw(shapes, seed, torch.bfloat16)
    adapter = folder / inside
    adapter.mkdir(parents=True)
    torch.save(tensors, adapter / "adapter_model.bin")
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": "checkpoints/sft",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": [name.split(".")[1] for name in LINEARS],
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    if head:
        torch.save(draw({"weight": (1, width), "bias": (1,)}, 5, torch.float32), folder / "reward_head")
    return tensors
