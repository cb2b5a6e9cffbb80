"""unsloth as the loader of the base (`model.loader: unsloth`): its kernels behind the same door.

Only loading is unsloth's; quantisation, adapters, heads, checkpointing and losses stay ours. It rewrites classes of
transformers and PEFT when it is imported, so the command line imports it before anything heavy (`import_first`).

Nothing of this was run on a GPU yet: the call follows the signature of unsloth 2026.10.9.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from ..errors import ModelError
from ..recipe import Model

if TYPE_CHECKING:  # unsloth is imported before torch too
    import torch
    from torch import nn

OTHERWISE = "Or set `model.loader: transformers`."
# Their decoders add features after the first layers; nobody has looked whether unsloth's compiled ones still do.
NOT_SERVED = ("qwen3_vl",)


def import_first(section: Model) -> None:
    """Import unsloth where the recipe asks for it. Raises ModelError when it is not installed, when its pins do not
    allow the transformers that is, or when transformers was imported before it."""
    if section.loader != "unsloth":
        return
    try:
        needs = [Requirement(line) for line in metadata.requires("unsloth") or []]
    except metadata.PackageNotFoundError:
        raise ModelError(
            "`model.loader: unsloth`, but unsloth is not installed. Install rlaif-lite[unsloth] in an environment of "
            f"its own: it holds transformers back. {OTHERWISE}"
        ) from None
    have = metadata.version("transformers")
    for need in needs:
        counts = need.marker is None or need.marker.evaluate({"extra": ""})
        if need.name == "transformers" and counts and not need.specifier.contains(have):
            raise ModelError(
                f"unsloth {metadata.version('unsloth')} takes transformers {need.specifier}, and {have} is installed. "
                f"Install rlaif-lite[unsloth] in an environment of its own. {OTHERWISE}"
            )
    if "transformers" in sys.modules and "unsloth" not in sys.modules:
        raise ModelError(
            "unsloth has to be imported before transformers, which it rewrites. Put `import unsloth` at the top of "
            f"your script; the command line does it by itself. {OTHERWISE}"
        )
    import unsloth  # noqa: F401


def refuse(section: Model, config, device: torch.device) -> None:
    """Raise ModelError where unsloth cannot serve: see `import_first`; a device that is no GPU; a family it may get
    wrong."""
    if device.type != "cuda":
        raise ModelError(f"`model.loader: unsloth` needs an NVIDIA GPU, and this run is on `{device}`. {OTHERWISE}")
    if config.model_type in NOT_SERVED:
        raise ModelError(f"`model.loader: unsloth` does not serve bases of type `{config.model_type}`. {OTHERWISE}")
    import_first(section)


def load(section: Model, path: str, config, quantization, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of the checkpoint `path` on `device`, quantised as `quantization` says (None: not at all). What
    `refuse` lets through can be loaded."""
    from unsloth import FastVisionModel

    model, _ = FastVisionModel.from_pretrained(
        model_name=path,
        revision=section.revision,
        max_seq_length=config.get_text_config().max_position_embeddings,
        dtype=dtype,
        load_in_4bit=quantization is not None,
        load_in_16bit=quantization is None,
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation="sdpa",  # takes the masks of branches
        use_gradient_checkpointing=False,
        use_exact_model_name=True,  # else it takes a quantised copy of its own from the hub
    )
    return model
