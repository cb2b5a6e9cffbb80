"""The one check that every LoRA adapter from outside passes (`sft.adapter`, `reward.adapter`, import, merge).

All roles share one shape, and a copy of an adapter runs at the recipe's scale. An adapter is therefore taken only where
its update is alpha / rank * B @ A on all decoder layers alike; anything else would silently be another function.
Dropout is taken: it acts while training only, and roles are trained without it. A pattern in `target_modules` is never
evaluated: the names of the tensors say where the adapter is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import ModelError

FILES = ("adapter_config.json", "adapter_model.safetensors")
LARGEST_CONFIG = 1 << 20  # bytes
TENSOR = re.compile(r"^(.*?\.layers\.)(\d+)\.([\w.]+?)\.lora_([AB])(?:\.\w+)?\.weight$")

# What may be set without changing the function: names, versions, and keys that other keys switch on.
NEUTRAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "init_lora_weights"),
    *("megatron_core", "qalora_group_size"),
}
WHY = {
    "use_rslora": "it is scaled by alpha / sqrt(rank) (rsLoRA), and roles by alpha / rank",
    "alpha_pattern": "its scale differs between layers (alpha_pattern)",
    "rank_pattern": "its rank differs between layers (rank_pattern)",
    "modules_to_save": "it holds whole trained modules (modules_to_save), and roles hold LoRA alone",
    "use_dora": "it is DoRA, which also rescales every row of the weights",
    "layers_to_transform": "it is on some of the layers only (layers_to_transform), and roles are on all",
    "layers_pattern": "it is on some of the layers only (layers_pattern), and roles are on all",
    "bias": "it trains biases too (bias)",
    "lora_bias": "it has biases of its own (lora_bias)",
    "trainable_token_indices": "it trains embeddings too (trainable_token_indices)",
    "layer_replication": "it repeats layers of its base (layer_replication)",
}
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also change the base's weights


class AdapterShape(NamedTuple):
    """What has to agree between an adapter and the recipe."""

    rank: int
    alpha: float
    targets: list[str]  # names of the linear layers, sorted


def check_settings(settings: object, where: str | Path) -> None:
    """Raises ModelError, with the reason, for the content of an adapter_config.json that is not plain LoRA."""
    if not isinstance(settings, dict):
        raise ModelError(f"{where}: adapter_config.json holds no mapping.")
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelError(f"{where}: `peft_type` = {kind!r}; only plain LoRA is read.")
    for key, value in settings.items():
        if key in NEUTRAL or value in (None, False, "none", [], {}):
            continue
        why = WHY.get(key, "this changes what the adapter computes")
        raise ModelError(
            f"{where}: `{key}` = {value!r}: {why}; only plain LoRA is read. Merge it into its base instead."
        )
    start = str(settings.get("init_lora_weights", "")).lower()
    if start.startswith(OTHER_BASE):
        raise ModelError(
            f"{where}: `init_lora_weights` = {start!r}: it belongs to a base whose weights it changed; only plain LoRA "
            "is read. Convert it with PEFT's `path_initial_model_for_weight_conversion`."
        )
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        value = settings.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1e6:
            raise ModelError(f"{where}: `{key}` = {value!r} in adapter_config.json is no {key} of a LoRA adapter.")


def read_settings(folder: Path) -> dict:
    """The checked adapter_config.json of `folder`. Raises ModelError."""
    path = folder / FILES[0]
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no LoRA adapter that can be read ({error!r}).") from error
    check_settings(settings, path)
    return settings


def target_names(tensors: Iterable[str]) -> list[str]:
    """The linear layers that an adapter is on, sorted, from the names of its tensors."""
    return sorted({match[3].rsplit(".", 1)[-1] for name in tensors if (match := TENSOR.match(name))})


def read_adapter(folder: Path) -> AdapterShape:
    """The shape of the adapter in `folder`, from its settings and the header of its tensors, without reading weights.

    Raises ModelError: not plain LoRA, tensors that are none of LoRA's, layers without an adapter."""
    settings, path = read_settings(folder), folder / FILES[1]
    try:
        with safe_open(path, "np") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is no LoRA adapter that can be read ({error!r}).") from error
    layers: dict[int, set[tuple[str, str]]] = {}
    for name in sorted(names):
        match = TENSOR.match(name)
        if match is None:
            raise ModelError(f"{path}: `{name}` is no LoRA tensor of a decoder layer; only plain LoRA is read.")
        layers.setdefault(int(match[2]), set()).add((match[3], match[4]))
    every = set().union(*layers.values())
    every |= {(module, half) for module, _ in every for half in "AB"}
    for layer in range(max(layers, default=-1) + 1):
        if bare := sorted(every - layers.get(layer, set())):
            raise ModelError(
                f"{path}: layer {layer} has no {bare[0][0]}.lora_{bare[0][1]}: it is on some of the layers only, and "
                "roles are on all."
            )
    return AdapterShape(settings["r"], float(settings["lora_alpha"]), target_names(names))
