"""unsloth as a loader: what it is asked for, that it is imported first, and what is said where it cannot serve.

It needs a GPU, so all but the last test put a stand-in of the same signature in its place; its model is real.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from core import RECIPE, shake, video_of
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError
from rlaif_lite.model import unsloth_loader
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora, Model

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda")  # asked for, never touched: the stand-in loads on the CPU

STAND_IN = """
CALLS = []

class FastVisionModel:
    @staticmethod
    def from_pretrained(model_name="unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit", max_seq_length=2048, dtype=None,
                        load_in_4bit=True, load_in_8bit=False, load_in_16bit=False, full_finetuning=False, token=None,
                        device_map="sequential", rope_scaling=None, trust_remote_code=False,
                        use_gradient_checkpointing="unsloth", revision=None, use_exact_model_name=False, *args,
                        **kwargs):
        CALLS.append({key: value for key, value in locals().items() if key not in ("args", "kwargs")} | kwargs)
        from transformers import AutoModelForImageTextToText
        model = AutoModelForImageTextToText.from_pretrained(model_name, dtype=dtype, device_map={"": "cpu"}, **kwargs)
        return model.train(), None

    @staticmethod
    def get_peft_model(model, r=16, target_modules=None, lora_alpha=16, finetune_vision_layers=True, **kwargs):
        raise AssertionError("adapters are ours")
"""


def install(folder: Path, source: str, needs: str = "transformers>=5.17") -> Path:
    """An `unsloth` that can be imported from `folder`, with the metadata of an installed package."""
    (folder / "unsloth").mkdir(parents=True)
    (folder / "unsloth" / "__init__.py").write_text(source)
    about = folder / "unsloth-2026.10.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: unsloth\nVersion: 2026.10.9\nRequires-Dist: {needs}\n"
        'Requires-Dist: transformers<1; extra == "other"\n'
    )
    return folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The stand-in, imported already, as the command line does before transformers."""
    monkeypatch.syspath_prepend(install(tmp_path / "site", STAND_IN))
    import unsloth

    yield unsloth
    del sys.modules["unsloth"]


def test_it_is_asked_for_the_recipes_base_and_the_rest_is_ours(stand_in, checkpoint):
    section = Model(base=str(checkpoint), loader="unsloth", dtype="float32", gradient_checkpointing=True)
    base = load_base(section, GPU, tower=False)
    (call,) = stand_in.CALLS
    quantization = call.pop("quantization_config")
    assert quantization.bnb_4bit_use_double_quant and quantization.bnb_4bit_quant_type == "nf4"
    asked = {
        "model_name": str(checkpoint),
        "revision": None,
        "max_seq_length": 512,
        "dtype": torch.float32,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "load_in_16bit": False,
        "full_finetuning": False,
        "device_map": {"": GPU},
        "attn_implementation": "sdpa",
        "use_gradient_checkpointing": False,
        "use_exact_model_name": True,
        "trust_remote_code": False,
        "rope_scaling": None,
        "token": None,
    }
    assert call == asked
    assert not base.model.training and not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.checkpointed and not base.has_tower

    same = load_base(section.model_copy(update={"loader": "transformers"}), torch.device("cpu"), tower=False)
    for layer in (module for module in base.model.modules() if isinstance(module, Linear4bit)):
        layer.support_avx512bf16_for_cpu = False  # the loader leaves it on for a GPU
    hidden = []
    for each in (base, same):
        roles = Roles(each, Lora(rank=4, alpha=8.0))
        roles.add("policy", seed=1)
        shake(roles, "policy")
        batch = collate(each, [encode_prompt(each, [Message("user", "<video> describe the video")], video_of(each))])
        with torch.no_grad(), roles.use("policy") as role:
            hidden.append(role.hidden(batch))
    assert base.fingerprint() == same.fingerprint()
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)  # theirs keeps PEFT's forward of the adapters


def test_a_checkpoint_that_is_not_whole_never_reaches_it(stand_in, checkpoint, tmp_path):
    """The guard of the other loader: unsloth would train on a random tensor."""
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors of the model are not in the checkpoint.*layers.1.mlp.up_proj"):
        load_base(Model(base=str(folder), loader="unsloth"), GPU)
    assert stand_in.CALLS == []


@pytest.mark.parametrize("command", ["run", "eval"])
def test_the_command_line_imports_it_before_transformers(tmp_path, command):
    source = (
        "import sys\nprint([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])\nraise SystemExit(7)\n"
    )
    site = install(tmp_path / "site", source)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"model": {"loader": "unsloth"}, "output": str(tmp_path / "run")}))
    done = subprocess.run(
        [sys.executable, "-m", "rlaif_lite.cli", command, str(recipe if command == "run" else tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{site}:{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (7, "[]"), done.stderr


def test_imported_after_transformers_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, STAND_IN))
    with pytest.raises(ModelError, match="before transformers.*Put `import unsloth` at the top"):
        unsloth_loader.import_first(Model(loader="unsloth"))
    assert "unsloth" not in sys.modules


def test_a_transformers_that_it_does_not_take_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, STAND_IN, needs="transformers<=5.16.0"))
    with pytest.raises(
        ModelError, match=r"unsloth 2026.10.9 takes transformers <=5.16.0, and 5\S+ is installed.*loader: transformers"
    ):
        unsloth_loader.import_first(Model(loader="unsloth"))


def test_without_it_the_extra_is_named(monkeypatch):
    def absent(name):
        raise unsloth_loader.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(unsloth_loader.metadata, "requires", absent)
    unsloth_loader.import_first(Model())  # nobody asked
    with pytest.raises(ModelError, match=r"not installed. Install rlaif-lite\[unsloth\] in an environment of its own"):
        unsloth_loader.import_first(Model(loader="unsloth"))


def test_what_it_does_not_serve_is_refused(checkpoint):
    with pytest.raises(ModelError, match="needs an NVIDIA GPU, and this run is on `cpu`"):
        load_base(Model(base=str(checkpoint), loader="unsloth"), torch.device("cpu"))

    class Config:
        model_type = "qwen3_vl"

    with pytest.raises(ModelError, match="does not serve bases of type `qwen3_vl`"):
        unsloth_loader.refuse(Model(loader="unsloth"), Config(), GPU)


@pytest.mark.gpu
def test_on_a_gpu_it_loads_what_transformers_loads(checkpoint):
    """In a process of its own, since it has to come first. bfloat16 and other kernels: hidden states within 5 %."""
    pytest.importorskip("unsloth", reason="the extra `unsloth` is not installed; it needs a GPU")
    code = f"""
import unsloth, torch
from rlaif_lite.data.records import Message
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora, Model
hidden = []
for loader in ("transformers", "unsloth"):
    base = load_base(Model(base={str(checkpoint)!r}, loader=loader), torch.device("cuda"), tower=False)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy", seed=1)
    roles.trainable("policy")
    batch = collate(base, [encode_prompt(base, [Message("user", "describe the video")], None)])
    with roles.use("policy") as role:
        hidden.append(role.hidden(batch).float())
        hidden[-1].pow(2).mean().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in roles.parameters("policy"))
print(((hidden[0] - hidden[1]).norm() / hidden[0].norm()).item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 0.05
