"""Released checkpoints come in key by key: the same tensors, the same answers, or a refusal that names what is wrong.

The reference is put together from the SOURCE's tensors: transformers' Llama (whose names LLaVA's language model has),
its CLIP vision model, and the projector by hand.

Shapes: S positions, T frames, P tokens per frame, D width, V vocabulary.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from typer.testing import CliRunner

from released import (
    CLIP,
    CONFIG,
    LAYERS,
    LINEARS,
    WIDTH,
    WORDS,
    language,
    released_llava,
    tower,
    write_clip,
    write_llava,
    write_lora,
)
from rlaif_lite import cli
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError
from rlaif_lite.exchange.files import local_folder, weight_files
from rlaif_lite.exchange.llava import import_llava, shapes_of
from rlaif_lite.exchange.lora import import_lora
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora, Model

sentencepiece = pytest.importorskip("sentencepiece", reason="it makes the tokenizer that is imported")
pytest.importorskip("google.protobuf", reason="transformers reads that tokenizer by it")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    tensors = released_llava()
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    return write_llava(tmp_path_factory.mktemp("llava") / "vlm_sft", tensors | computed)


@pytest.fixture(scope="module")
def converted(source, clip, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "sft"
    import_llava(source, out, clip, shard_bytes=60_000)
    return out


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {key: file[key] for file in weight_files(folder) for key in file.shapes}


def llama_of(tensors: dict) -> LlamaForCausalLM:
    """The language model of the source's tensors."""
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    llama = LlamaForCausalLM(LlamaConfig(**{key: CONFIG[key] for key in keys})).eval()
    own = {key: tensor.float() for key, tensor in tensors.items() if key.startswith(("model.", "lm_head."))}
    assert not llama.load_state_dict(own, strict=False).missing_keys
    return llama


def with_lora(tensors: dict, scale: float) -> dict:
    """The source's tensors with an adapter's update added."""
    merged = {key: tensor.float() for key, tensor in released_llava().items()}
    for i in range(LAYERS):
        for name in LINEARS:
            a, b = (tensors[f"base_model.model.model.layers.{i}.{name}.lora_{ab}.weight"].float() for ab in "AB")
            merged[f"model.layers.{i}.{name}.weight"] += scale * b @ a
    return merged


def by_hand(clip: Path, tensors: dict, ids: list[int], pixels_TCHW: torch.Tensor, image_id: int) -> torch.Tensor:
    """Logits_SV of the source's tensors: frames through CLIP's last layer but one and the projector into the ids."""
    llama, own = llama_of(tensors), {key: tensor.float() for key, tensor in tensors.items()}
    vision = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32).eval()
    with torch.no_grad():
        features_TPD = vision(pixels_TCHW, output_hidden_states=True).hidden_states[-2][:, 1:]
        for number in ("0", "2"):
            features_TPD = F.linear(
                features_TPD, own[f"model.mm_projector.{number}.weight"], own[f"model.mm_projector.{number}.bias"]
            )
            features_TPD = F.gelu(features_TPD) if number == "0" else features_TPD
        known = torch.tensor([0 if i == image_id else i for i in ids])
        embeds_SD = own["model.embed_tokens.weight"][known]
        embeds_SD[torch.tensor(ids) == image_id] = features_TPD.flatten(0, 1)
        return llama(inputs_embeds=embeds_SD[None]).logits[0]


def converted_logits(model, ids: list[int], pixels_TCHW: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels_TCHW).logits[0]


def prompt_ids(image_id: int, frames: int) -> list[int]:
    return [1, 270, *[image_id] * (4 * frames), 288, 301, 265]


# ---- checkpoints


def test_every_tensor_arrives_bit_for_bit(converted):
    found, want = saved(converted), {}
    for key, tensor in released_llava().items():
        key = key.removeprefix("model.vision_tower.").replace("model.mm_projector.0", "multi_modal_projector.linear_1")
        key = key.replace("model.mm_projector.2", "multi_modal_projector.linear_2")
        want[f"language_model.{key}" if key.startswith(("model.", "lm_head.")) else key] = tensor
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert found[key].dtype == torch.float16 and torch.equal(
            found[key][: len(tensor)] if tensor.dim() else found[key], tensor
        ), key
        if len(found[key]) != len(tensor):
            assert key.endswith(("embed_tokens.weight", "lm_head.weight")) and found[key].shape == (384, WIDTH)
            assert torch.equal(found[key][WORDS:], tensor.float().mean(0).half().expand(64, -1))


def test_the_folder_is_what_transformers_writes(converted):
    names = sorted(path.name for path in converted.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert not [name for name in names if not name.endswith((".safetensors", ".json", ".jinja"))]
    sizes = [sum(t.nbytes for t in load_file(converted / name).values()) for name in shards]
    assert (
        max(sizes) <= 60_000
        and sum(sizes) == json.loads((converted / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    with safe_open(converted / shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    frames = json.loads((converted / "preprocessor_config.json").read_text())
    assert (
        frames["crop_size"] == {"height": 28, "width": 28}
        and frames["image_mean"] == [0.5, 0.4, 0.3]
        and frames["do_pad"]
    )


def test_the_converted_model_computes_what_the_source_does(converted, clip):
    model, info = LlavaForConditionalGeneration.from_pretrained(
        converted, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image_id = model.config.image_token_index
    assert image_id == WORDS and model.config.vision_feature_layer == -2
    pixels_TCHW = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = prompt_ids(image_id, frames=2)
    want_SV = by_hand(clip, released_llava(), ids, pixels_TCHW, image_id)
    got_SV = converted_logits(model.eval(), ids, pixels_TCHW)
    assert want_SV.std() > 0.1 and (got_SV[:, :WORDS] - want_SV).abs().max() <= 1e-4
    other_SV = by_hand(clip, released_llava(seed=9), ids, pixels_TCHW, image_id)
    assert (other_SV - want_SV).abs().max() > 0.1


def test_prompts_are_tokenised_as_the_release_does(source, converted):
    """LLaVA cuts the text at `<image>` and tokenises the pieces one by one."""
    pieces = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(converted)
    turns = [{"role": "user", "content": "<image>\nwhat happens ?"}]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{system} USER: <image>\nwhat happens ? ASSISTANT:"
    want = [1, *pieces.encode(f"{system} USER: "), WORDS, *pieces.encode("\nwhat happens ? ASSISTANT:")]
    assert tokenizer.encode(text, add_special_tokens=False) == want
    assert tokenizer.encode("A man runs.", add_special_tokens=False) == pieces.encode("A man runs.")
    assert (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer)) == ("<unk>", "</s>", WORDS + 1)
    parts = [{"type": "image"}, {"type": "text", "text": "what happens ?"}]
    told = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A man runs."},
        {"role": "user", "content": "And ?"},
    ]
    assert tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True) == (
        f"{text} A man runs.</s>USER: And ? ASSISTANT:"
    )
    assert tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *turns], tokenize=False
    ).startswith("<s>Be brief. USER")


def test_a_tower_that_is_not_inside_comes_from_its_own_folder(clip, tmp_path):
    """LLaVA-1.5 itself is without one."""
    source = write_llava(tmp_path / "llava", language())
    with pytest.raises(ModelError, match="holds no vision tower .*openai/clip-vit-large-patch14-336.* --vision-tower"):
        import_llava(source, tmp_path / "out")
    import_llava(source, tmp_path / "out", clip)
    found = saved(tmp_path / "out")
    assert all(torch.equal(found[f"vision_tower.{key}"], tensor) for key, tensor in tower().items())
    assert sum(key.startswith("vision_tower.") for key in found) == len(tower())


def test_the_names_of_a_7b_are_all_there(source):
    """686 tensors: 3 + 32 x 9 of Llama, 4 of the projector, 7 + 24 x 16 of CLIP's tower. None is allocated."""
    from rlaif_lite.exchange.llava import _config

    real = CONFIG | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    }
    shapes = shapes_of(_config(real, None, rows=32064, image_id=32000))
    assert len(shapes) == 686
    assert shapes["vision_tower.vision_model.embeddings.position_embedding.weight"] == (577, 1024)
    assert shapes["multi_modal_projector.linear_1.weight"] == (4096, 1024)
    assert shapes["language_model.model.layers.31.mlp.down_proj.weight"] == (4096, 11008)


def spoilt(tensors: dict, **changes) -> dict:
    return {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model.image_newline": torch.ones(WIDTH)}, "1 tensors have no place .*\n  model.image_newline"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}, "no place .*\n  model.layers.2.mlp.up_proj.weight"),
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "are missing.*\n  language_model.model.layers.1.mlp.up_proj.weight",
        ),
        ({"lm_head.weight": torch.ones(WORDS + 1, WIDTH)}, "lm_head.weight: \\(321, 64\\), not \\(320, 64\\)"),
        ({"model.mm_projector.2.bias": torch.ones(3)}, "model.mm_projector.2.bias: \\(3,\\), not \\(64,\\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, says, clip, tmp_path):
    source = write_llava(tmp_path / "llava", spoilt(released_llava(), **changes), files=1)
    with pytest.raises(ModelError, match=f"(?s){says}"):
        import_llava(source, tmp_path / "out", clip)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava"]


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("mm_projector_type", "linear", "`mm_projector_type` = 'linear'"),
        ("mm_use_im_start_end", True, "`mm_use_im_start_end` = True"),
        ("mm_vision_tower", None, "has no mm_vision_tower"),
        ("mm_vision_tower", "LanguageBind/Image", "LanguageBind/Image, whose settings are not known here"),
    ],
)
def test_another_layout_is_refused(key, value, says, source, tmp_path):
    folder = tmp_path / "llava"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in (CONFIG | {key: value}).items() if k != key or v is not None})
    )
    with pytest.raises(ModelError, match=says):
        import_llava(folder, tmp_path / "out")


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("run"),))


def test_code_in_a_pickle_is_not_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    torch.save({"model.norm.weight": Malice()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ModelError, match="not a file of tensors alone"):
        import_llava(folder, tmp_path / "out")
    assert not Path("run").exists()


def test_shards_that_are_missing_are_named(source, tmp_path):
    folder = tmp_path / "llava"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "pytorch_model-00002-of-00002.bin":
            (folder / path.name).symlink_to(path)
    with pytest.raises(ModelError, match="not there: pytorch_model-00002-of-00002.bin"):
        import_llava(folder, tmp_path / "out")


# ---- adapters


@pytest.mark.parametrize("inside", ["lora_default", "adapter_model", "adapter_model/lora_default"])
def test_a_released_adapter_answers_as_on_its_own_base(inside, converted, clip, tmp_path):
    from peft import PeftModel

    tensors = write_lora(tmp_path / "released", inside, rank=4, alpha=6)
    made = import_lora(tmp_path / "released", converted, tmp_path / "policy")
    assert made.rank == 4 and made.tensors == 2 * LAYERS * len(LINEARS) and not made.head
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = LlavaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)
    plain = PeftModel.from_pretrained(model, tmp_path / "policy").eval()
    pixels_TCHW = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = prompt_ids(WORDS, frames=1)
    want_SV = by_hand(clip, with_lora(tensors, 6 / 4), ids, pixels_TCHW, WORDS)
    assert (converted_logits(plain, ids, pixels_TCHW)[:, :WORDS] - want_SV).abs().max() <= 1e-4
    with plain.disable_adapter():
        assert (converted_logits(plain, ids, pixels_TCHW)[:, :WORDS] - want_SV).abs().max() > 0.1


def test_the_reward_head_comes_along(converted, tmp_path):
    write_lora(tmp_path / "rm", "adapter_model", head=True)
    assert import_lora(tmp_path / "rm", converted, tmp_path / "reward").head
    head, want = load_file(tmp_path / "reward" / "head.safetensors"), torch.load(tmp_path / "rm" / "reward_head")
    assert head.keys() == want.keys() and all(
        torch.equal(head[key], want[key]) and head[key].dtype == torch.float32 for key in want
    )


def test_an_imported_reward_role_scores_as_the_release_does(converted, tmp_path):
    """Its head on the last hidden state of the last position, of the source's tensors with the update added."""
    tensors = write_lora(tmp_path / "rm", "adapter_model", rank=4, alpha=6, head=True)
    import_lora(tmp_path / "rm", converted, tmp_path / "reward")
    base = load_base(Model(base=str(converted), quantization="none"), torch.device("cpu"), tower=False)
    roles = Roles(base, Lora())
    roles.load("reward", tmp_path / "reward")
    prompt = encode_prompt(base, [Message("user", "what happens ?")], None)
    with torch.no_grad(), roles.use("reward") as role:
        score = role.scalar(role.hidden(collate(base, [prompt])))[0, -1]
    head = torch.load(tmp_path / "rm" / "reward_head")
    with torch.no_grad():
        hidden_D = llama_of(with_lora(tensors, 6 / 4)).model(torch.tensor([prompt.ids_S])).last_hidden_state[0, -1]
        bare_D = llama_of(released_llava()).model(torch.tensor([prompt.ids_S])).last_hidden_state[0, -1]
    assert score.item() == pytest.approx((head["weight"] @ hidden_D + head["bias"]).item(), abs=1e-4)
    assert abs((head["weight"] @ (hidden_D - bare_D)).item()) > 1e-2


def lora_with(tmp_path, converted, change):
    tensors = write_lora(tmp_path / "lora", ".")
    change(tensors)
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    return import_lora(tmp_path / "lora", converted, tmp_path / "out")


AT = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda t: t.update({"base_model.model.model.mm_projector.0.weight": torch.ones(1)}),
            "no place .*\n  base_model.model.model.mm_projector.0",
        ),
        (lambda t: t.update({f"{AT}.lora_magnitude_vector": torch.ones(1)}), "no place .*lora_magnitude_vector"),
        (lambda t: t.pop(f"{AT}.lora_B.weight"), "1 tensors are missing:\n  layers.0.self_attn.q_proj.lora_B"),
        (
            lambda t: t.update({f"{AT}.lora_A.weight": torch.ones(4, 80)}),
            "trained on another base.*\\(4, 80\\), not \\(4, 64\\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(change, says, converted, tmp_path):
    with pytest.raises(ModelError, match=f"(?s){says}"):
        lora_with(tmp_path, converted, change)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_larger_base_is_told_from_one_that_fits(converted, tmp_path):
    write_lora(tmp_path / "rm13b", "adapter_model", width=80, head=True)
    with pytest.raises(ModelError, match="(?s)trained on another base than .* --base"):
        import_lora(tmp_path / "rm13b", converted, tmp_path / "out")


@pytest.mark.parametrize(
    "key, value", [("use_rslora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("peft_type", "IA3")]
)
def test_what_is_not_plain_lora_is_refused(key, value, converted, tmp_path):
    write_lora(tmp_path / "lora", ".")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=f"`{key}` = .*only plain LoRA"):
        import_lora(tmp_path / "lora", converted, tmp_path / "out")


# ---- the command


def test_a_hub_id_is_downloaded_and_a_wrong_name_is_said(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k["revision"])) or str(tmp_path)
    )
    assert local_folder("SNUMPR/vlm_rm_13b_lora", "v1") == tmp_path and asked == [(("SNUMPR/vlm_rm_13b_lora",), "v1")]
    assert local_folder(str(tmp_path)) == tmp_path and len(asked) == 1
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such", "not a name"):
        with pytest.raises(ModelError, match=f"`{name}` is neither a folder nor a repository"):
            local_folder(name)


def test_import_on_the_command_line(source, clip, tmp_path):
    def run(*args):
        return CliRunner().invoke(cli.app, ["import", *map(str, args)])

    done = run(source, "--out", tmp_path / "sft", "--vision-tower", clip)
    assert done.exit_code == 0, done.output
    assert f"{len(released_llava())} tensors" in done.output and "inv_freq" in done.output
    write_lora(tmp_path / "rm", "adapter_model", head=True)
    refused = run(tmp_path / "rm", "--out", tmp_path / "reward")
    assert refused.exit_code == 2 and "--base" in refused.output
    done = run(tmp_path / "rm", "--out", tmp_path / "reward", "--base", tmp_path / "sft")
    assert done.exit_code == 0 and "rank 4" in done.output and "head" in done.output, done.output
    again = run(source, "--out", tmp_path / "sft", "--vision-tower", clip)
    assert again.exit_code == 2 and "there already and not empty" in again.output
    assert (
        CLIP["image_size"] == json.loads((tmp_path / "sft" / "config.json").read_text())["vision_config"]["image_size"]
    )
