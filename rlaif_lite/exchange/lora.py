"""Released LoRA checkpoints (policy initialisation, reward model with its head) -> folders of roles.

The release trained them with PEFT on LLaVA's own layout, where the decoder's layers are `model.layers`; in
transformers' LLaVA they are `model.language_model.layers`. Key by key: a tensor without a place is refused by name, and
so is an adapter that does not cover every layer of the base, or whose shapes are another base's. Tensors keep
their bits.

The reward head is one Linear(D -> 1) with a bias, read at the last position (RLAIF/models/reward_model.py).
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelError
from ..recipe.adapter import check_settings
from .files import WeightFile, listed, read_json, weight_files, whole_folder

# Where the release's own loader looks, in its order (RLAIF/models/qlora_model.py).
PLACES = ("adapter_model/lora_default", "adapter_model", "lora_default", ".")
KEY = re.compile(r"^base_model\.model\.model\.(layers\.\d+\.\w+\.(\w+))\.lora_([AB])(?:\.\w+)?\.weight$")
SOURCE_LAYERS = re.compile(r"^language_model\.model\.(layers\.\d+\.\w+\.(\w+))\.weight$")
HEAD_FILE = "reward_head"


class ImportedLora(NamedTuple):
    """What was converted."""

    rank: int
    tensors: int
    parameters: int
    head: bool


def adapter_folder(source: Path) -> Path | None:
    """The folder below `source` that holds a PEFT adapter; None when there is none."""
    return next((source / place for place in PLACES if (source / place / "adapter_config.json").is_file()), None)


def import_lora(source: Path, base: Path, out: Path) -> ImportedLora:
    """Convert the adapter in `source` into the new folder `out`, for the converted checkpoint in `base`.

    Raises ModelError: not plain LoRA, keys without a place, layers without an adapter, shapes of another base."""
    folder = adapter_folder(source)
    if folder is None:
        raise ModelError(f"{source} holds no adapter: no adapter_config.json there or in {', '.join(PLACES[:3])}.")
    settings = read_json(folder / "adapter_config.json")
    check_settings(settings, folder / "adapter_config.json")
    names = ("adapter_model.safetensors", "adapter_model.bin")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} holds no {' and no '.join(names)}.")
    file = WeightFile(path)
    targets = sorted({match[2] for key in file.shapes if (match := KEY.match(key))})
    tensors = _mapped(file, _linears(base, targets), settings["r"], base)
    head = _head(source / HEAD_FILE, read_json(base / "config.json")["text_config"]["hidden_size"])
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        bias="none",
        target_modules=rf".*language_model.*\.({'|'.join(targets)})",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    with whole_folder(out) as made:
        save_file(tensors, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(made))
        if head is not None:
            save_file(head, made / "head.safetensors")
    return ImportedLora(settings["r"], len(tensors), sum(t.numel() for t in tensors.values()), head is not None)


def _linears(base: Path, targets: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the base that the adapter says it is on."""
    found = {}
    for file in weight_files(base):
        for key, shape in file.shapes.items():
            if (match := SOURCE_LAYERS.match(key)) and match[2] in targets:
                found[match[1]] = shape
    if not found:
        raise ModelError(
            f"{base} has no layers {', '.join(targets)} by their names in transformers' LLaVA; import it first."
        )
    return found


def _mapped(file: WeightFile, linears: dict[str, tuple[int, int]], rank: int, base: Path) -> dict[str, Tensor]:
    tensors, unmapped, wrong = {}, [], []
    for key, shape in file.shapes.items():
        match = KEY.match(key)
        if match is None or match[1] not in linears:
            unmapped.append(key)
            continue
        out_width, in_width = linears[match[1]]
        want = (rank, in_width) if match[3] == "A" else (out_width, rank)
        if shape != want:
            wrong.append(f"{key}: {shape}, not {want}")
        else:
            target = f"base_model.model.model.language_model.{match[1]}.lora_{match[3]}.weight"
            tensors[target] = file[key].contiguous()
    if wrong:
        raise ModelError(
            f"{file.path} was trained on another base than {base}: {len(wrong)} tensors have shapes of another "
            f"one.{listed(wrong, 4)}\nGive the checkpoint it was trained on as --base."
        )
    if unmapped:
        raise ModelError(
            f"{file.path} is not converted: {len(unmapped)} tensors have no place on {base}:{listed(unmapped)}"
        )
    bare = [
        f"{name}.lora_{ab}"
        for name in linears
        for ab in "AB"
        if f"base_model.model.model.language_model.{name}.lora_{ab}.weight" not in tensors
    ]
    if bare:
        raise ModelError(f"{file.path} is not converted: {len(bare)} tensors are missing:{listed(bare)}")
    return tensors


def _head(path: Path, width: int) -> dict[str, Tensor] | None:
    """The head's weight (1,D) and bias (1,) in float32; None when the checkpoint has none."""
    if not path.is_file():
        return None
    file = WeightFile(path)
    if file.shapes != {"weight": (1, width), "bias": (1,)}:
        raise ModelError(
            f"{path} holds {file.shapes}; a reward head on this base is weight (1, {width}) and bias (1,)."
        )
    return {key: file[key].to(torch.float32).contiguous() for key in file.shapes}
