"""A base is loaded only if it is whole: each damage is one message, and nothing is ever trained on random weights."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import small_recipe
from family_checkpoints import write
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError, RecipeError
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora, Model
from rlaif_lite.recipe.adapter import check_settings, read_adapter
from rlaif_lite.rollout import Sampling, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint of several weight files."""
    return write("llava_next_video", tmp_path_factory.mktemp("whole"))


def edit(folder: Path, file: str, change) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def copy_from_elsewhere(adapter: Path, folder: Path) -> None:
    """An adapter as others make them: without the digests that a run leaves with its own."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("files.sha256"))


def drop_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    key = next(key for key in index["weight_map"] if "layers.1.mlp.up_proj" in key)
    file = folder / index["weight_map"].pop(key)
    tensors = load_file(file)
    tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def many_tokens(folder: Path) -> None:
    def add(content: dict) -> None:
        first = max(token["id"] for token in content["added_tokens"]) + 1
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"] += [{"id": first + k, "content": f"[NEW{k}]", **plain} for k in range(20)]

    edit(folder, "tokenizer.json", add)


def quantised(**settings):
    return lambda folder: edit(folder, "config.json", lambda c: c.update(quantization_config=settings))


def no_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


DAMAGE = {
    "missing": (drop_tensor, "1 tensors of the model are not in the checkpoint, the first .*layers.1.mlp.up_proj"),
    "cut": (lambda d: shard(d).write_bytes(shard(d).read_bytes()[:5000]), "is not loaded: .*download"),
    "gone": (lambda d: shard(d).unlink(), "is not loaded: .*download"),
    "gptq": (quantised(quant_method="gptq", bits=4), "quantised already .*gptq.*Give the original"),
    "awq": (quantised(quant_method="awq", bits=4), "quantised already .*awq"),
    "fp8": (quantised(quant_method="fp8", activation_scheme="dynamic"), "quantised already .*fp8"),
    "8bit": (quantised(quant_method="bitsandbytes", load_in_8bit=True), "quantised already .*bitsandbytes"),
    "no eos": (lambda d: edit(d, "tokenizer_config.json", lambda c: c.pop("eos_token")), "without `eos_token`"),
    "no tokenizer": (no_tokenizer, "tokenizer"),
    "tokens": (many_tokens, r"token '\[NEW19\]' has the id \d+, the model has \d+ embeddings"),
}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_base_that_is_not_whole_is_refused(name, quantization, whole, tmp_path):
    change, says = DAMAGE[name]
    shutil.copytree(whole, tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(ModelError, match=f"(?is){says}"):
        load_base(Model(base=str(tmp_path / "base"), quantization=quantization), CPU)


def test_no_library_warns_while_tokens_are_drawn(whole, caplog, monkeypatch):
    """transformers renames the argument of the key/value cache; its old name warns, and later stops the run."""
    base = load_base(Model(base=str(whole), quantization="none", dense_rollouts=False), CPU)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    row = encode_prompt(base, [Message("user", "what happens ?")], None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING), roles.use("base") as role:
        sample(role, [row], Sampling(3, temperature=0.0), seeds=[0], batch_size=1)
        role.hidden(collate(base, [row]))
    assert not [record.message for record in caplog.records if "deprecated" in record.message]


# ---- adapters


@pytest.fixture(scope="module")
def adapter(load, tmp_path_factory) -> Path:
    roles = Roles(load(), Lora(rank=4, alpha=8.0))
    roles.add("sft")
    roles.save("sft", folder := tmp_path_factory.mktemp("adapter") / "sft")
    return folder


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("use_rslora", True, "sqrt"),
        ("alpha_pattern", {"q_proj": 64}, "scale differs between layers"),
        ("rank_pattern", {"q_proj": 8}, "rank differs between layers"),
        ("modules_to_save", ["lm_head"], "whole trained modules"),
        ("use_dora", True, "DoRA"),
        ("layers_to_transform", [0], "some of the layers only"),
        ("init_lora_weights", "pissa_niter_4", "a base whose weights it changed"),
        ("bias", "lora_only", "biases"),
        ("some_new_key", 3, "changes what the adapter computes"),
        ("peft_type", "IA3", "only plain LoRA"),
        ("r", 0, "no r of a LoRA"),
        ("lora_alpha", "x", "no lora_alpha of a LoRA"),
    ],
)
def test_one_door_for_all_adapters(adapter, checkpoint, load, tmp_path, key, value, why):
    """The recipe's check and the loader refuse it for the same reason."""
    copy_from_elsewhere(adapter, tmp_path / "given")
    edit(tmp_path / "given", "adapter_config.json", lambda c: c.update({key: value}))
    from rlaif_lite.recipe import check_files

    with pytest.raises(RecipeError, match=f"`sft.adapter`.*cannot be used.*{why}"):
        check_files(small_recipe(checkpoint, tmp_path, f"sft.adapter={tmp_path / 'given'}"))
    with pytest.raises(ModelError, match=why):
        Roles(load(), Lora(rank=4, alpha=8.0)).load("sft", tmp_path / "given")


def test_what_does_not_change_the_function_is_taken(adapter, tmp_path, load):
    """Dropout, versions, a pattern as targets: the pattern is never evaluated, however slow it would be."""
    copy_from_elsewhere(adapter, tmp_path / "given")
    settings = {"lora_dropout": 0.5, "target_modules": r"(.*)*(.*)*(.*)*z_proj", "init_lora_weights": "gaussian"}
    edit(tmp_path / "given", "adapter_config.json", lambda c: c.update(settings))
    shape = read_adapter(tmp_path / "given")
    assert (shape.rank, shape.alpha, len(shape.targets)) == (4, 8.0, 7)
    roles = Roles(load(), Lora(rank=4, alpha=8.0))
    roles.load("sft", tmp_path / "given")
    assert not any("Dropout" in type(module).__name__ for module in roles.base.model.modules())


def test_an_adapter_on_some_layers_is_refused(adapter, tmp_path):
    copy_from_elsewhere(adapter, tmp_path / "given")
    tensors = load_file(tmp_path / "given" / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if ".layers.1." not in key or "q_proj" in key}
    save_file(kept, tmp_path / "given" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layer 1 has no .*lora_A: it is on some of the layers only"):
        read_adapter(tmp_path / "given")
    save_file(
        {**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, tmp_path / "given/adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match="`base_model.model.lm_head.weight` is no LoRA tensor"):
        read_adapter(tmp_path / "given")


@pytest.mark.parametrize("content", ["[]", "[" * 9000, "\x00", '{"r": 4}', " " * (2 << 20)])
def test_a_damaged_configuration_is_one_message(adapter, tmp_path, content):
    copy_from_elsewhere(adapter, tmp_path / "given")
    (tmp_path / "given" / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match="adapter_config.json"):
        read_adapter(tmp_path / "given")


def test_a_copy_runs_at_the_scale_of_its_source(adapter, load):
    roles = Roles(load(), Lora(rank=4, alpha=16.0))
    roles.load("sft", adapter)
    with pytest.raises(ModelError, match="alpha 8.0 and rank 4, .* a copy would run at another scale"):
        roles.add("reference", copy_of="sft")


def test_settings_of_old_releases_are_read():
    old = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "enable_lora": None, "merge_weights": False, "bias": "none"}
    check_settings(old, "here")
