"""A role goes out as weights that plain transformers loads and that answer as the adapter did, with a card.

Shapes: N positions, V vocabulary.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from rlaif_lite import cli
from rlaif_lite.errors import ModelError, StageError
from rlaif_lite.exchange import export as exporter
from rlaif_lite.exchange.files import weight_files
from rlaif_lite.model.base import base_digest
from rlaif_lite.recipe import load_recipe, recipe_hash


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """(folder, comparison) of the small run's PPO role."""
    out = tmp_path_factory.mktemp("exported") / "ppo"
    return out, exporter.export(Path(finished.output), "ppo", out)


def weights(folder) -> dict[str, torch.Tensor]:
    return {key: file[key] for file in weight_files(Path(folder)) for key in file.shapes}


# ---- merged weights


def test_weights_are_the_base_and_the_update_rounded_once(exported, finished):
    out, _ = exported
    adapter = Path(finished.output) / "adapters" / "policy"
    lora, got, base = load_file(adapter / "adapter_model.safetensors"), weights(out), weights(finished.model.base)
    assert got.keys() == base.keys() and all(tensor.dtype == torch.bfloat16 for tensor in got.values())
    changed = 0
    for key, tensor in base.items():
        layer = key.split("language_model.", 1)[-1].removeprefix("model.").removesuffix(".weight")
        name = f"base_model.model.model.language_model.{layer}"
        if "language_model" in key and f"{name}.lora_A.weight" in lora:
            tensor = (
                tensor.double()
                + 8 / 4 * lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double()
            )
            changed += 1
            assert (got[key].double() - tensor).abs().max() <= tensor.abs().max() * 2**-8, key
        else:
            assert torch.equal(got[key], tensor.bfloat16()), key
    assert changed == 6 * 7


def test_plain_transformers_answers_as_the_adapter_on_the_untouched_base(exported, finished):
    out, _ = exported
    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    base = AutoModelForImageTextToText.from_pretrained(finished.model.base)
    adapted = PeftModel.from_pretrained(base, Path(finished.output) / "adapters" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("<s> what is the colour first ? <ans>", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        merged_SV, adapted_SV = model.float()(input_ids=ids).logits[0], adapted(input_ids=ids).logits[0]
        with adapted.disable_adapter():
            bare_SV = adapted(input_ids=ids).logits[0]
    rounding, effect = exporter.gap(adapted_SV, merged_SV), exporter.gap(adapted_SV, bare_SV)
    assert rounding.kl < 1e-3 < effect.kl and rounding.largest < 0.2 * effect.largest


def test_what_the_merge_cost_is_measured_on_the_test_prompts(exported):
    _, compared = exported
    assert compared.prompts == 8 and compared.positions >= 8
    assert compared.merged.kl < 1e-3 < compared.base.kl
    assert compared.merged.kl < compared.trained.kl < compared.base.kl  # 4 bits cost more than 16, less than no adapter
    said = exporter.comparison_text(compared)
    assert "the adapter on the 4-bit base" in said and f"KL {compared.merged.kl:.2g} nats" in said


def test_the_gap_of_two_distributions_by_hand():
    """Logits of (3/4, 1/4) and of (1/4, 3/4) at the first position, the same at the second."""
    p_NV = torch.tensor([[math.log(3.0), 0.0], [1.0, 0.0]])
    q_NV = torch.tensor([[0.0, math.log(3.0)], [1.0, 0.0]])
    got = exporter.gap(p_NV, q_NV)
    assert got.kl == pytest.approx((0.75 * math.log(3) - 0.25 * math.log(3)) / 2) and got.agreement == 0.5
    assert got.largest == pytest.approx(math.log(3))
    one_sided = exporter.gap(torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2))
    assert one_sided.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))  # adapter first


def test_a_model_that_answers_otherwise_is_not_exported(rerun, monkeypatch, tmp_path):
    """The adapter on disk is another one than was merged."""
    run = Path(rerun().output)
    merge, path = exporter.merge, run / "adapters" / "policy" / "adapter_model.safetensors"

    def merge_then_change(*args):
        merge(*args)
        save_file({key: tensor * 3 for key, tensor in load_file(path).items()}, path)
        (path.parent / "files.sha256").unlink()  # else its damage is said

    monkeypatch.setattr(exporter, "merge", merge_then_change)
    with pytest.raises(StageError, match="does not answer as the adapter does.*(?s:.*)The limit is 0.01 nats"):
        exporter.export(run, "ppo", tmp_path / "out", push="me/it")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("start", ["model.", "model.language_model.", "language_model.model.", "language_model.", ""])
def test_layers_are_found_under_every_naming(start, tmp_path):
    """2 + 3/2 * [1, 2]^T [3, 4], by hand; the tower's layer of the same name and shape stays."""
    ours = f"{start}layers.0.self_attn.q_proj.weight"
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    for folder in (base, adapter, out):
        folder.mkdir()
    save_file(
        {key: torch.full((2, 2), 2.0) for key in (ours, tower)} | {"ids": torch.arange(2)}, base / "model.safetensors"
    )
    (base / "config.json").write_text(
        json.dumps({"model_type": "x", "text_config": {"model_type": "y", "dtype": "float32"}})
    )
    (base / "README.md").write_text("the base's")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "bias": "none", "r": 2, "lora_alpha": 3})
    )
    exporter.merge(base, adapter, out)
    got = weights(out)
    assert got[ours].tolist() == [[6.5, 8.0], [11.0, 14.0]] and got[tower].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert got["ids"].dtype == torch.int64
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_base_that_cannot_be_merged_onto_is_refused(rerun, finished, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(finished.model.base, base)
    run = Path(rerun().output)
    recipe = (run / "recipe.yaml").read_text().replace(str(finished.model.base), str(base))
    (run / "recipe.yaml").write_text(recipe)
    tensors = load_file(base / "model.safetensors")
    gone = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight") and "language_model" in key)
    save_file({k: v for k, v in tensors.items() if k != gone}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="(?s)1 layers .* no one weight .*layers.0.mlp.up_proj: none"):
        exporter.export(run, "ppo", tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ModelError, match="is stored quantised"):
        exporter.export(run, "ppo", tmp_path / "out")
    with pytest.raises(
        ModelError, match="no adapter of role `judge`. Its adapters: policy, reference, reward, sft, value"
    ):
        exporter.export(run, "judge", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the card


def test_the_card_tells_base_recipe_data_figures_and_cost(exported, finished):
    text = (exported[0] / "README.md").read_text()
    run = Path(finished.output)
    summary = json.loads((run / "summary.json").read_text())
    digest = hashlib.sha256((run / "data" / "rl.jsonl").read_bytes()).hexdigest()[:16]
    ran = load_recipe(run / "recipe.yaml")  # with numbers for `auto`
    assert f"hash `{recipe_hash(ran)}`" in text and f"digest `{base_digest(finished.model)}`" in text
    assert f"| data: rl | rl.jsonl, sha256 `{digest}` |" in text and "4-bit NF4 with double quantisation" in text
    figures = summary["evaluation"]
    row = [f"{figures[role]['greedy_f1']:.3f}" for role in ("base", "sft", "ppo")]
    assert f"| greedy f1 | {' | '.join(row)} |" in text
    memory = summary["stages"]["ppo"]["peak_memory_bytes"] / 2**30
    assert f"| ppo | {summary['stages']['ppo']['seconds']:.0f} | {memory:.2f} |" in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(line["time"]["tokens_per_second"] for line in lines if line["stage"] == "ppo")
    assert f"PPO: {(speeds[1] + speeds[2]) / 2:.1f} answer tokens per second, median over 4 steps" in text
    assert exporter.comparison_text(exported[1]) in text
    assert str(run) not in text and str(Path(finished.model.base).parent) not in text  # nothing of this machine
    assert text.startswith("---\nlibrary_name: transformers\n") and "base_model:" not in text


# ---- roles with a head, the hub, the command line


def test_the_command_for_lmms_eval(finished, exported, tmp_path):
    out, _ = exported
    assert exporter.lmms_command(out) == f"lmms-eval --model huggingface --model_args pretrained={out} --tasks TASK"
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    assert exporter.lmms_command(tmp_path).startswith("lmms-eval --model qwen3_vl --model_args pretrained=")
    done = CliRunner().invoke(cli.app, ["export", finished.output, "--no-check", "--out", str(tmp_path / "merged")])
    assert f"--model_args pretrained={tmp_path / 'merged'} --tasks" in done.output
    assert f"--model rlaif_lite --model_args run={finished.output},role=policy --tasks" in done.output


def test_a_reward_role_goes_out_as_adapter_and_head(finished, tmp_path):
    run = Path(finished.output)
    done = CliRunner().invoke(cli.app, ["export", str(run), "--role", "reward", "--out", str(tmp_path / "rm")])
    assert done.exit_code == 0 and "cannot be merged into a causal LM" in done.output, done.output
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (tmp_path / "rm" / name).read_bytes() == (run / "adapters" / "reward" / name).read_bytes()
    text = (tmp_path / "rm" / "README.md").read_text()
    assert "library_name: peft" in text and "cannot be merged" in text and "Accuracy on held-out pairs" in text
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(finished.model.base).name and config["r"] == 4


def test_a_push_uploads_the_finished_folder(finished, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, **named):
            calls.append(("create", repo_id, named["exist_ok"]))

        def upload_folder(self, **named):
            calls.append(("upload", named["repo_id"], sorted(path.name for path in named["folder_path"].iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "rm"
    args = ["export", finished.output, "--role", "value", "--out", str(out), "--push", "me/value"]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0 and "https://huggingface.co/me/value" in done.output, done.output
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors"]
    assert calls == [("create", "me/value", True), ("upload", "me/value", files)]
    done = CliRunner().invoke(cli.app, args)  # the folder is there already
    assert done.exit_code == 2 and "there already and not empty" in done.output and len(calls) == 2


def test_export_on_the_command_line_prints_what_the_merge_cost(finished, tmp_path):
    args = ["export", finished.output, "--role", "sft", "--out", str(tmp_path / "sft")]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0 and "the merged bfloat16 weights: KL" in done.output, done.output
    done = CliRunner().invoke(cli.app, [*args[:-1], str(tmp_path / "unchecked"), "--no-check"])
    assert done.exit_code == 0 and "KL" not in done.output
    assert "Not measured (exported with --no-check)" in (tmp_path / "unchecked" / "README.md").read_text()
