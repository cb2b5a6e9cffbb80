"""A role of a run as weights that plain transformers loads, with a model card.

The update scale * B @ A is added in float32 to the UNQUANTISED base checkpoint, tensor by tensor, and the result is
rounded to bfloat16. What that costs is measured on the run's own test prompts before the folder appears: the merged
model against the adapter on the unquantised base (rounding), and the adapter on the base as the run trained it (its
4-bit quantisation), which the adapter is used to and the merged model is not. Both are printed and stand in the card.

Reward and value roles end in a number, not in a next token: they are exported as adapter and head.

Shapes: N positions of all prompts together, V vocabulary.
"""

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from ..errors import ModelError, StageError
from ..files import read_jsonl
from ..model.base import load_base, resolve_base
from ..model.inputs import collate, encode_prompt
from ..model.roles import BASE, Roles
from ..model.text import encode_answer
from ..recipe import Model, load_recipe
from ..recipe.adapter import check_settings
from ..stages.evaluate import ADAPTERS
from ..workspace import Workspace
from .card import card
from .files import SHARD_BYTES, ShardWriter, WeightFile, listed, local_folder, read_json, weight_files, whole_folder

SCALARS = ("reward", "value")
ROLE_FILES = ("adapter_model.safetensors", "adapter_config.json", "head.safetensors")
BESIDE = (
    *("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    "chat_template*",
)
NOT_THE_DECODER = re.compile("vision|visual|tower|encoder")  # their layers have the decoder's names at the end
LMMS_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # families with a model of their own in lmms-eval
PROMPTS = 8
ANSWER_TOKENS = 64  # of an answer that are compared
KL_LIMIT = 0.01  # nats per position; rounding to bfloat16 stays far below, a wrong merge far above


class Gap(NamedTuple):
    """How far a model's next-token distributions are from those of the adapter on the unquantised base."""

    kl: float  # KL(adapter || model), mean over positions, nats
    largest: float  # largest difference of a logit
    agreement: float  # share of positions with the same first choice


class Comparison(NamedTuple):
    """The merged model, and what to hold it against."""

    prompts: int
    positions: int
    merged: Gap
    trained: Gap | None  # the adapter on the base as the run had it; None when that was not quantised
    base: Gap  # the base alone: what the adapter does at all


def export(run_dir: Path, role: str, out: Path, check: bool = True, push: str | None = None) -> Comparison | None:
    """Write role `role` of a run into the new folder `out`; returns what the merge cost, None where nothing was merged
    or measured.

    `push` is a hub repository to upload the folder to. Raises ModelError for a role that is not there or a base that
    cannot be merged onto, StageError when the merged model answers otherwise than the adapter; `out` is
    then not made."""
    recipe = load_recipe(run_dir / "recipe.yaml", [f"output={run_dir}"])
    work = Workspace(recipe)
    role = recipe.method if role == "policy" else role
    adapter = work.adapter(ADAPTERS.get(role, role))
    if not (adapter / "adapter_config.json").is_file():
        there = ", ".join(sorted(path.name for path in adapter.parent.glob("*") if path.is_dir())) or "none"
        raise ModelError(f"{run_dir} has no adapter of role `{role}`. Its adapters: {there}.")
    compared = None
    with whole_folder(out) as folder:
        if role in SCALARS:
            copy_role(adapter, folder)
        else:
            merge(local_folder(resolve_base(recipe.model.base), recipe.model.revision), adapter, folder)
            compared = compare(work, role, adapter, folder) if check else None
        if compared is not None and not compared.merged.kl <= KL_LIMIT:
            raise StageError(
                f"The merged model does not answer as the adapter does: {comparison_text(compared)}\n"
                f"The limit is {KL_LIMIT} nats per position. Is the base still the one that the run was trained on?"
            )
        told = None if compared is None else comparison_text(compared)
        (folder / "README.md").write_text(card(work, role, role in SCALARS, told), encoding="utf-8")
    if push is not None:
        upload(out, push)
    return compared


def comparison_text(compared: Comparison) -> str:
    """The comparison in words."""

    def said(gap: Gap) -> str:
        same = f"same first choice {gap.agreement:.1%}"
        return f"KL {gap.kl:.2g} nats per position, largest logit difference {gap.largest:.2g}, {same}"

    lines = [
        f"Against the adapter on the unquantised base, on {compared.prompts} test prompts with the role's answers "
        f"({compared.positions} positions):",
        f"- the merged bfloat16 weights: {said(compared.merged)}",
    ]
    if compared.trained is not None:
        lines.append(f"- the adapter on the 4-bit base, as trained and evaluated: {said(compared.trained)}")
    return "\n".join([*lines, f"- the base alone: {said(compared.base)}"])


def lmms_command(folder: Path) -> str:
    """The command that puts a merged folder to lmms-eval, without this package."""
    family = read_json(folder / "config.json")["model_type"]
    model = family if family in LMMS_MODELS else "huggingface"
    return f"lmms-eval --model {model} --model_args pretrained={folder} --tasks TASK"


# ---- merging


def merge(base: Path, adapter: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint in `base`, with the adapter added, into the folder `out`, in bfloat16."""
    settings = read_json(adapter / "adapter_config.json")
    check_settings(settings, adapter / "adapter_config.json")
    config = read_json(base / "config.json")
    if "quantization_config" in config:
        raise ModelError(f"{base} is stored quantised; an adapter is merged onto unquantised weights. Give that base.")
    files, lora = weight_files(base), WeightFile(adapter / "adapter_model.safetensors")
    places = _places(files, lora)
    scale = settings["lora_alpha"] / settings["r"]
    writer = ShardWriter(out, shard_bytes)
    for file in files:
        for key in file.shapes:
            tensor = file[key]
            if key in places:
                a, b = (lora[f"{places[key]}.lora_{ab}.weight"].float() for ab in "AB")
                tensor = tensor.float() + scale * b @ a
            writer.add(key, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    writer.finish()
    for path in base.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in BESIDE):
            shutil.copy(path, out / path.name)
    (out / "config.json").write_text(json.dumps(_in_bfloat16(config), indent=2) + "\n", encoding="utf-8")


def _places(files: list[WeightFile], lora: WeightFile) -> dict[str, str]:
    """{key of the checkpoint: the adapter's name of that layer}. A checkpoint's names are those of its time, with
    the same end: `language_model.model.layers.0...` is `model.language_model.layers.0...`."""
    shapes = {key: shape for file in files for key, shape in file.shapes.items() if not NOT_THE_DECODER.search(key)}
    places, lost = {}, []
    for name in sorted({key.partition(".lora_")[0] for key in lora.shapes}):
        end = f".layers.{name.partition('.layers.')[2]}.weight"
        width = (lora.shapes[f"{name}.lora_B.weight"][0], lora.shapes[f"{name}.lora_A.weight"][1])
        found = [key for key, shape in shapes.items() if f".{key}".endswith(end) and shape == width]
        if len(found) == 1:
            places[found[0]] = name
        else:
            lost.append(f"{name}: {found or 'none'}")
    if lost:
        raise ModelError(f"{len(lost)} layers of {lora.path} have no one weight in the base's files:{listed(lost)}")
    return places


def _in_bfloat16(config: dict) -> dict:
    """The configuration, and those inside it, with the dtype that the weights have now."""
    config = {key: _in_bfloat16(value) if isinstance(value, dict) else value for key, value in config.items()}
    named = {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
    return config | named | ({"dtype": "bfloat16"} if "model_type" in config and not named else {})


def copy_role(adapter: Path, out: Path) -> None:
    """An adapter and its head as they are; a base that is a folder of this machine is called by its name alone."""
    for name in ROLE_FILES:
        if (adapter / name).is_file():
            shutil.copy(adapter / name, out / name)
    config = LoraConfig.from_pretrained(str(adapter))
    if Path(config.base_model_name_or_path).is_dir():
        config.base_model_name_or_path = Path(config.base_model_name_or_path).name
        config.save_pretrained(str(out))


def upload(folder: Path, repository: str) -> None:
    """Upload an exported folder to a hub repository, made when it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, repo_type="model", exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, repo_type="model", commit_message="rlaif-lite export")


# ---- measuring


def compare(work: Workspace, role: str, adapter: Path, merged: Path) -> Comparison:
    """Next-token distributions over the role's greedy answers to the first test prompts (where the run has none: of
    the first token alone)."""
    answers = {row["key"]: row["answer"] for row in read_jsonl(work.folder / "evaluate" / f"{role}.greedy.jsonl")}
    trained = work.recipe.model
    exact = trained.model_copy(update={"quantization": "none", "loader": "transformers"})
    reference_NV, base_NV = _logits(work, exact, adapter, answers), _logits(work, exact, None, answers)
    merged_NV = _logits(work, exact.model_copy(update={"base": str(merged), "revision": None}), None, answers)
    quantised = trained.quantization != "none"
    return Comparison(
        prompts=min(PROMPTS, len(work.records("test"))),
        positions=len(reference_NV),
        merged=gap(reference_NV, merged_NV),
        trained=gap(reference_NV, _logits(work, trained, adapter, answers)) if quantised else None,
        base=gap(reference_NV, base_NV),
    )


def gap(reference_NV: Tensor, other_NV: Tensor) -> Gap:
    """How far `other` is from `reference`, both logits in float32."""
    log_p_NV, log_q_NV = reference_NV.log_softmax(-1), other_NV.log_softmax(-1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    same_N = reference_NV.argmax(-1) == other_NV.argmax(-1)
    return Gap(kl_N.mean().item(), (reference_NV - other_NV).abs().max().item(), same_N.float().mean().item())


@torch.no_grad()
def _logits(work: Workspace, section: Model, adapter: Path | None, answers: dict[str, str]) -> Tensor:
    """Logits_NV, on the CPU, of a base (with an adapter) where it predicts the answers and what follows them."""
    base = load_base(section, work.device, tower=False)
    roles = Roles(base, section.lora)
    if adapter is not None:
        roles.load("exported", adapter)
    found = []
    with roles.use(BASE if adapter is None else "exported") as active:
        for record in work.records("test")[:PROMPTS]:
            prompt = encode_prompt(base, record.prompt, work.features(record))
            answer = encode_answer(base, prompt.opening, answers.get(record.key, ""), end=False)[:ANSWER_TOKENS]
            hidden_SD = active.hidden(collate(base, [prompt.extend(answer)]))[0, len(prompt.ids_S) - 1 :]
            found.append((hidden_SD @ base.head_weight_VD.T).float().cpu())
    return torch.cat(found)
