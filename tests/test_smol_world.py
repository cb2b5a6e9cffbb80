"""The checkpoint that the laboratory assembles from a language model in a GGUF file: a small Llama of random weights
with a byte-level BPE, so that nothing is downloaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lab.smol_world.checkpoint import FRAME, ROWS, assemble
from rlaif_lite.data.records import Message
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.planner.shapes import shapes_of
from rlaif_lite.recipe import Lora, Model
from rlaif_lite.rollout import Sampling, sample
from rlaif_lite.stages.features import encode
from rlaif_lite.video.decode import Frames

gguf = pytest.importorskip("gguf")
WIDTH, FFN, LAYERS, HEADS, KV = 64, 128, 2, 2, 1
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama's GGUF file -> its tensors."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["what happens in the video ? a red circle appears . yes no Yes No A B"] * 3, trainer)
    vocabulary = core.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(core.to_str())["model"]["merges"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(FFN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(1e5)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(tokens)
    file.add_token_types([3 if token in MARKS else 1 for token in tokens])  # 3: a control token
    file.add_token_merges([" ".join(pair) for pair in merges])
    for add, mark in (
        (file.add_bos_token_id, MARKS[1]),
        (file.add_eos_token_id, MARKS[2]),
        (file.add_pad_token_id, MARKS[2]),
        (file.add_unk_token_id, MARKS[0]),
    ):
        add(vocabulary[mark])
    narrow = WIDTH * KV // HEADS
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (narrow, WIDTH),
            "attn_v": (narrow, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FFN, WIDTH),
            "ffn_up": (FFN, WIDTH),
            "ffn_down": (WIDTH, FFN),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return tensors


def test_the_assembled_checkpoint_is_a_base_like_any_other(tmp_path):
    tensors = write_gguf(tmp_path / "small.gguf")
    folder = assemble(tmp_path / "small.gguf", tmp_path / "base")
    section = Model(base=str(folder))
    base = load_base(section, torch.device("cpu"))
    embedded_VD = base.model.get_input_embeddings().weight
    given_VD = torch.from_numpy(tensors["token_embd.weight"])
    assert embedded_VD.shape == (ROWS, WIDTH) and torch.equal(embedded_VD[: len(given_VD)], given_VD)
    assert torch.equal(base.head_weight_VD, embedded_VD)  # tied
    assert base.tokenizer.eos_token == "<end_of_utterance>"
    assert torch.equal(embedded_VD[base.eos_id], embedded_VD[base.tokenizer.convert_tokens_to_ids("<|im_end|>")])

    rgb_THWC = np.random.default_rng(1).integers(0, 256, (2, FRAME, FRAME, 3), dtype=np.uint8)
    frames = Frames(rgb_THWC=rgb_THWC, time_T=np.arange(2.0), duration=2.0, source="decord", reason="", timed=True)
    video = encode(base, {"v": frames}, [])["v"]
    assert len(video.features_KD) == 2 * shapes_of(section, torch.device("cpu")).frame_tokens == 8
    prompt = encode_prompt(base, [Message("user", "<video>\nwhat happens in the video ?")], video)
    text = base.tokenizer.decode(prompt.ids_S)
    assert text.startswith("<|im_start|>User:") and text.endswith("<end_of_utterance>\nAssistant:")
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy", seed=0)
    with roles.use("policy") as role:
        (answer,) = sample(role, [prompt], Sampling(max_new_tokens=5), seeds=[0])
    assert 1 <= len(answer.ids) <= 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_a_base_in_4_bits_does_not_keep_its_file_in_memory(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    base = load_base(Model(base=str(folder)), torch.device("cpu"))
    assert base.has_tower and str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
