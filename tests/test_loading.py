"""Loading a base in 4 bits: what it needs beyond its size, and gradients through it, with and without biases.

Shapes: B rows, S positions, D width.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import LlavaNextVideoForConditionalGeneration, Qwen2Config

from core import gradients
from lab.embedded_base import architecture
from rlaif_lite.model.base import load_base
from rlaif_lite.recipe import Model

CPU = torch.device("cpu")
SHARD_MB = 8

# Loads a small base first, so that what is imported on the way does not count, then the one in question. What counts is
# memory that the process cannot give back (the files' own pages can be), read by a second thread all the while. The
# weights are asked for in float32: what was read in bfloat16 would count as soon as it is cast, and all at once if it
# were
# held (115 MB above the 4-bit size, where it is 14 MB).
MEASURE = """
import json, re, sys, threading, time
import torch
torch.set_num_threads(1)
from rlaif_lite.model.base import load_base
from rlaif_lite.recipe import Model

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    while not done.is_set():
        seen.append(held())
        time.sleep(0.0005)

load_base(Model(base=sys.argv[1]), torch.device("cpu"))
seen, done = [held()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
base = load_base(Model(base=sys.argv[2], dtype="float32"), torch.device("cpu"))
done.set()
thread.join()
print(json.dumps({"rise": max(seen) - seen[0], "samples": len(seen), **base.bytes()}))
"""


def write_base(folder: Path, text, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of the embedded architecture with another language model, of random weights, in shards."""
    config = architecture.build_config()
    config.text_config = text
    torch.manual_seed(0)
    model = LlavaNextVideoForConditionalGeneration(config).to(dtype)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):  # zero otherwise
            weight.data.normal_(0, 0.5)
    model.save_pretrained(folder, max_shard_size=f"{SHARD_MB}MB")
    architecture.build_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(architecture.preprocessor()))
    return folder


@pytest.fixture(scope="module")
def with_bias(tmp_path_factory) -> Path:
    """Qwen2 as the language model: its q, k and v projections have biases."""
    keys = architecture.build_config().text_config.to_dict()
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "eos_token_id",
    )
    text = Qwen2Config(num_hidden_layers=2, tie_word_embeddings=True, **{key: keys[key] for key in kept})
    return write_base(tmp_path_factory.mktemp("qwen"), text)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_four_bits_need_one_shard_beyond_themselves(checkpoint, tmp_path):
    """Quantised weight by weight as the shards are read: a 7B in bfloat16 is never whole in memory."""
    text = architecture.build_config().text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim = 512, 1536, 9, 64
    folder = write_base(tmp_path / "large", text, torch.bfloat16)
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) >= 8 and sum(shards) > 60e6 and max(shards) <= SHARD_MB * 1e6
    # The allocator keeps freed blocks below a bound that grows to 32 MB, below which all weights of this test lie and
    # hardly any of a 7B: let it give back what is freed.
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(checkpoint), str(folder)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    memory = json.loads(found.stdout)
    assert memory["samples"] > 20
    size = memory["quantised"] + memory["other"]
    assert size < 0.35 * sum(shards)
    assert memory["rise"] - size <= max(shards) + 16e6, memory


def test_gradients_through_layers_with_a_bias(with_bias):
    """Every LoRA weight against a twin with the dequantised weights: packed layers with a bias fail in the backward."""
    base, twin = (load_base(Model(base=str(with_bias), quantization=q), CPU, tower=False) for q in ("nf4", "none"))
    plain = dict(twin.model.named_modules())
    biased = 0
    for name, layer in base.model.named_modules():
        if isinstance(layer, Linear4bit):
            plain[name].weight.data.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
            biased += layer.bias is not None and bool(torch.equal(layer.bias, plain[name].bias) and layer.bias.any())
    assert biased == 2 * 3
    found, wanted = gradients(base), gradients(twin)
    assert len(found) == 2 * 7 * 2  # A and B of seven linears in two layers
    for got, want in zip(found, wanted, strict=True):
        assert want.norm() > 0 and (got - want).norm() <= 1e-4 * want.norm()


def test_an_unquantised_base_keeps_the_recipes_dtype(with_bias):
    base = load_base(Model(base=str(with_bias), quantization="none", dtype="bfloat16"), CPU)
    assert {parameter.dtype for parameter in base.model.parameters()} == {
        torch.bfloat16
    } and base.dtype == torch.bfloat16
    assert base.bytes()["quantised"] == 0
