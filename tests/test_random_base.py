"""Bases with random weights: the published sizes, 4-bit layers that compute what they hold, roles on them."""

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoConfig, AutoModelForImageTextToText

from core import video_of
from rlaif_lite import profiler
from rlaif_lite.data.records import Message
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.random_base import checkpoint_of, load_random
from rlaif_lite.model.roles import Roles
from rlaif_lite.profiler import inputs
from rlaif_lite.recipe import Lora, Model, load_recipe

CPU = torch.device("cpu")
QWEN, LLAVA = "Qwen/Qwen2.5-VL-3B-Instruct", "llava-hf/llava-1.5-7b-hf"
SMOL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        (LLAVA, 7.063),
        ("llava-hf/llava-1.5-13b-hf", 13.351),
        (QWEN, 3.755),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.292),
        (SMOL, 0.256484928),
        ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 0.507482304),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2.246784880),
    ],
)  # the sizes of the published weight files
def test_parameters_are_those_published(name, billions, tmp_path):
    path = checkpoint_of(name, tmp_path, ())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize("name", (LLAVA, QWEN, SMOL))
def test_a_random_base_serves_as_a_loaded_one(name, tmp_path):
    section = Model(base=checkpoint_of(name, tmp_path, ("red",), small=True), quantization="nf4")
    base = load_random(section, CPU, tower=True)
    assert len(base.tokenizer) == len(base.head_weight_VD)
    assert base.tokenizer.decode(base.tokenizer.encode("red w7", add_special_tokens=False)) == "red w7"
    tied = base.head_weight_VD.data_ptr() == base.model.get_input_embeddings().weight.data_ptr()
    assert tied == (name == QWEN)
    # 4 bits hold what the layer computes, on every linear layer of the decoder and on no other
    quantised = {id(m) for m in base.model.modules() if type(m).__name__ == "Linear4bit"}
    assert quantised == {id(m) for m in base.decoder.modules() if isinstance(m, torch.nn.Linear)}
    layer = base.decoder.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), x @ dequantize_module_weight(layer).T, rtol=1e-4, atol=1e-4)
    # a saved copy, loaded as any checkpoint, has the same buffers and shapes
    assert not any(p.is_meta for p in [*base.model.parameters(), *base.model.buffers()])
    roles = Roles(base, Lora(rank=2, alpha=4.0))
    roles.add("policy")
    roles.trainable("policy")
    rows = (
        [encode_prompt(base, [Message("user", "<video> what")], video_of(base, 8))]
        if name == LLAVA
        else [encode_prompt(base, [Message("user", "what")], None)]
    )
    with roles.use("policy") as policy:
        hidden_BSD = policy.hidden(collate(base, rows))
        hidden_BSD.square().sum().backward()
    assert all(p.grad is not None for p in roles.parameters("policy")) and hidden_BSD.isfinite().all()


def test_the_rope_is_the_real_one(tmp_path):
    """Drawn weights, read back by the ordinary loader, give the same hidden states: buffers were not drawn."""
    section = Model(base=checkpoint_of(LLAVA, tmp_path, (), small=True), quantization="none")
    base = load_random(section, CPU)
    base.model.save_pretrained(tmp_path)
    batch = collate(base, [encode_prompt(base, [Message("user", "w1 w2 w3 w4")], None)])
    roles, read = Roles(base, Lora()), Roles(load_base(section, CPU), Lora())
    found = []
    for each in (roles, read):
        each.add("policy")
        with each.use("policy") as policy, torch.no_grad():
            found.append(policy.hidden(batch))
    assert torch.equal(*found)


def test_profile_of_a_shipped_recipe_on_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PROMPT_TOKENS", 6)
    monkeypatch.setattr(inputs, "FRAME", (56, 56))
    monkeypatch.setattr(inputs, "VIDEOS", (2, 2))
    keys = [
        "ppo.rollouts=4",
        "ppo.minibatch=4",
        "ppo.micro_batch=4",
        "ppo.max_new_tokens=6",
        "device=cpu",
        "threads=1",
        "features.frames=4",
        "features.clip_frames=2",
        "preference.batch_size=4",
    ]
    recipe = load_recipe("recipes/qwen2_5_vl_3b_24gb.yaml", keys)
    found = profiler.profile(recipe, 1, ("ppo",), random=profiler.Random(small=True))
    phases = found["stages"]["ppo"]["phases"]
    assert found["random_weights"] and phases["decode"]["count"] == 4 * 5  # the first token of each: fill slots
