"""Roles: named LoRA adapters, and scalar heads, on one frozen base.

Policy, reference, judge, reward and value differ only in a few hundred kilobytes (7B: a few hundred megabytes) of
adapter. `roles.use("policy")` opens a scope in which the base behaves as that role; the forward AND the backward of a
role belong into one scope. Switching in between gives wrong gradients without any error (the backward of a LoRA layer
reads the adapter that is active then), so a scope refuses to be opened inside another one, and the hidden states of a
role refuse a gradient that arrives in another role's scope.

The policy starts as a copy of the SFT adapter and the reference IS that frozen adapter, so KL(policy || reference) is
exactly zero at step 0. (The release instead loads the same file twice, onto two adapters; the numbers are the same.)

Shapes: B rows, S positions, D width.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import ranks
from ..errors import ModelError, StageError
from ..files import SUMS, atomic, damaged, write_sums
from ..recipe import Lora
from ..recipe.adapter import read_settings, target_names
from .base import Base
from .inputs import Batch, decode
from .lora import quicken

DECODER = r".*(language_model|text_model\.layers).*"  # the modules that carry adapters
BASE = "base"  # the role without an adapter


class RoleSize(NamedTuple):
    """What a role costs beyond the shared base."""

    parameters: int
    bytes: int


class Roles:
    """The adapters and heads on one base."""

    def __init__(self, base: Base, lora: Lora):
        self.base = base
        self.lora = lora
        self.heads: dict[str, nn.Linear] = {}
        self._peft: PeftModel | None = None
        self._layers: list[LoraLayer] = []
        self._of: dict[str, dict[str, nn.Parameter]] = {}  # role -> its adapter's parameters, in a fixed order
        self._active: str | None = None

    @property
    def names(self) -> list[str]:
        return list(self._of)

    # ---- making, loading and saving roles

    def add(self, name: str, *, copy_of: str | None = None, seed: int = 0) -> None:
        """Make role `name`: a fresh adapter (its output is zero), or a copy of another role's adapter (and head)."""
        self._refuse_known(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._attach(name, self.lora)
        if copy_of is not None:
            own = self._peft.peft_config[copy_of]
            if own.lora_alpha / own.r != self.lora.alpha / self.lora.rank:
                raise ModelError(
                    f"Role `{copy_of}` has alpha {own.lora_alpha} and rank {own.r}, `model.lora` has {self.lora.alpha} "
                    f"and {self.lora.rank}: a copy would run at another scale. All roles have one shape: set it so."
                )
            for target, source in zip(self._of[name].values(), self._of[copy_of].values(), strict=True):
                target.data.copy_(source.data)
            if copy_of in self.heads:
                self.heads[name] = copy.deepcopy(self.heads[copy_of]).requires_grad_(False)

    def add_head(self, name: str, *, zero: bool, seed: int = 0) -> None:
        """Give role `name` a scalar head, Linear(D -> 1) in float32 with zero bias; `zero` for a value head
        (published)."""
        head = nn.Linear(self.base.width, 1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.weight.copy_(
                torch.randn(head.weight.shape, generator=generator) * (0.0 if zero else self.base.width**-0.5)
            )
        self.heads[name] = head.to(self.base.device).requires_grad_(False)

    def load(self, name: str, folder: Path) -> None:
        """Load a role saved by `save`: a PEFT adapter folder, with `head.safetensors` if it has a head.

        Raises ModelError for a folder that is not whole, is damaged, or fits another base."""
        self._refuse_known(name)
        path = folder / "adapter_model.safetensors"
        if not path.exists():
            raise ModelError(
                f"There is no adapter at {folder} (adapter_model.safetensors is missing) to load role `{name}` from."
            )
        if bad := damaged(folder / SUMS, folder):
            raise ModelError(
                f"{', '.join(map(str, bad))}: damaged, as the content does not match its checksum in {folder / SUMS}. "
                "Delete the stage's folder in the run folder and run again, or copy the adapter again."
            )
        settings = read_settings(folder)
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Copy it again, or run its stage again.") from error
        shape = Lora(
            rank=settings["r"],
            alpha=float(settings["lora_alpha"]),
            targets=tuple(target_names(saved)) or self.lora.targets,
        )
        self._attach(name, shape)
        for key, parameter in self._of[name].items():
            if key not in saved:
                raise ModelError(
                    f"{path} has no tensor `{key}`: it was trained on another architecture than this base."
                )
            if saved[key].shape != parameter.shape:
                raise ModelError(
                    f"{path}: `{key}` has shape {tuple(saved[key].shape)}, this base needs {tuple(parameter.shape)}: "
                    "the adapter was trained on another base or with another rank."
                )
            parameter.data.copy_(saved[key])
        if extra := saved.keys() - self._of[name].keys():
            raise ModelError(
                f"{path}: `{min(extra)}` has no place on this base: it was trained on another architecture."
            )
        if (folder / "head.safetensors").exists():
            self.add_head(name, zero=True)
            self.heads[name].load_state_dict(load_file(folder / "head.safetensors"))

    def save(self, name: str, folder: Path) -> None:
        """Write role `name` as a PEFT adapter folder that plain `PeftModel.from_pretrained` loads, with its head if it
        has one and the digests of the files.

        The folder appears whole or not at all. Raises StageError, and writes nothing, for a tensor that is not
        finite. All ranks call this; rank 0 writes."""
        ranks.first(lambda: self._save(name, folder))

    def _save(self, name: str, folder: Path) -> None:
        tensors = {key: p.data.contiguous().cpu() for key, p in self._of[name].items()}
        head = self.heads[name].state_dict() if name in self.heads else {}
        refuse_non_finite(tensors | {f"head.{key}": tensor for key, tensor in head.items()}, f"the adapter {folder}")
        config = copy.deepcopy(self._peft.peft_config[name])
        config.base_model_name_or_path = self.base.path
        config.inference_mode = True
        with atomic(folder) as tmp:
            tmp.mkdir()
            save_file(tensors, tmp / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(tmp))
            if head:
                save_file({k: v.contiguous().cpu() for k, v in head.items()}, tmp / "head.safetensors")
            write_sums(tmp / SUMS, list(tmp.iterdir()), tmp)

    def remove(self, name: str) -> None:
        """Free a role's adapter and head."""
        if self._active is not None:
            raise ModelError(f"Role `{name}` cannot be removed inside the scope of `{self._active}`.")
        for layer in self._layers:
            layer._active_adapter = []  # else PEFT warns that it moves on to another adapter; `use` sets it anyway
            layer.delete_adapter(name)
        del self._peft.peft_config[name]
        self._peft.base_model.active_adapter = []
        del self._of[name]
        self.heads.pop(name, None)

    # ---- using a role

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator["ActiveRole"]:
        """The scope of one role: its forward and its backward happen inside. `base` is the base without any adapter."""
        if self._active is not None:
            raise ModelError(
                f"Role `{name}` was opened inside the scope of `{self._active}`. Close that scope first: the backward "
                "of one role with another role's adapter active gives wrong gradients without any error."
            )
        if name != BASE and name not in self._of:
            raise ModelError(f"There is no role `{name}`; there are {', '.join([BASE, *self._of])}.")
        for layer in self._layers:
            layer._disable_adapters = name == BASE
            if name != BASE:
                layer._active_adapter = [name]
        self._active = name
        try:
            yield ActiveRole(self, name)
        finally:
            self._active = None

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's parameters, in a fixed order (float32), and its head's when it has one."""
        return [*self._of[name].values(), *(self.heads[name].parameters() if name in self.heads else ())]

    def trainable(self, name: str, on: bool = True) -> None:
        """Let gradients reach role `name` (and its head), or not. Fresh and loaded roles are frozen."""
        for parameter in self.parameters(name):
            parameter.requires_grad_(on)
            if not on:
                parameter.grad = None

    def size(self, name: str) -> RoleSize:
        """Parameters and bytes of a role's adapter and head."""
        parameters = self.parameters(name)
        return RoleSize(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))

    # ---- inside

    def _refuse_known(self, name: str) -> None:
        if name == BASE or name in self._of:
            raise ModelError(f"Role `{name}` exists already.")

    def _attach(self, name: str, lora: Lora) -> None:
        if self._peft is None:
            self._refuse_unknown_targets(lora)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=rf"{DECODER}\.({'|'.join(map(re.escape, lora.targets))})",
        )
        # PEFT turns every other adapter's gradients off when it adds one: remember and restore them.
        training = {other: self.parameters(other)[0].requires_grad for other in self._of}
        if self._peft is None:
            self._peft = get_peft_model(self.base.model, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        self._layers = [m for m in self.base.model.modules() if isinstance(m, LoraLayer)]
        if self.base.loader == "transformers":
            quicken(self._layers, self.base.dtype)
        suffix = f".{name}.weight"
        own = ((key, p) for key, p in self._peft.named_parameters() if key.endswith(suffix) and ".lora_" in key)
        self._of[name] = {key.removesuffix(suffix) + ".weight": parameter for key, parameter in own}
        self.trainable(name, False)
        for other, on in training.items():
            self.trainable(other, on)

    def _refuse_unknown_targets(self, lora: Lora) -> None:
        """Raises ModelError, naming what the decoder has, for a target that matches none of its linear layers."""
        modules = (name for name, module in self.base.model.named_modules() if isinstance(module, nn.Linear))
        there = sorted({name.rsplit(".", 1)[-1] for name in modules if re.fullmatch(rf"{DECODER}\.\w+", name)})
        for target in lora.targets:
            if target not in there:
                near = get_close_matches(target, there, 1)
                raise ModelError(
                    f"`model.lora.targets`: the base's decoder has no linear layer `{target}`."
                    + (f" Did you mean `{near[0]}`?" if near else "")
                    + f" It has {', '.join(there)}."
                )


class ActiveRole:
    """The base as one role, inside its scope."""

    def __init__(self, roles: Roles, name: str):
        self.roles = roles
        self.name = name

    def hidden(self, batch: Batch) -> Tensor:
        """Run the decoder over a batch -> hidden_BSD after its final norm."""
        base = self.roles.base
        # transformers checkpoints in training mode only, and fills no key/value cache in it. `train()` would walk over
        # thousands of modules, twice in every forward.
        training = base.checkpointed if torch.is_grad_enabled() else []
        for module in training:
            module.training = True
        try:
            hidden_BSD = decode(base, batch)
        finally:  # also when memory ran out: sampling must find no module in training mode
            for module in training:
                module.training = False
        if hidden_BSD.requires_grad:
            hidden_BSD.register_hook(self._check_scope)
        return hidden_BSD

    def scalar(self, hidden: Tensor) -> Tensor:
        """The role's head on hidden states (..., D) -> (...), in float32."""
        return self.roles.heads[self.name](hidden.float())[..., 0]

    def _check_scope(self, gradient: Tensor) -> None:
        if self.roles._active != self.name:
            raise ModelError(
                f"A gradient of role `{self.name}` arrived in the scope of `{self.roles._active}`. Call backward() "
                f"inside `with roles.use({self.name!r})`: elsewhere the adapters' gradients would be wrong or missing."
            )


def refuse_non_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raises StageError where a tensor holds NaN or infinity: it must not replace what is on disk."""
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise StageError(
            f"{len(bad)} of {len(tensors)} tensors of {what} are not finite, the first {bad[0]}: training diverged. "
            "Nothing was written; the last checkpoint is kept. Lower the learning rate, or look at the steps before in "
            "metrics.jsonl."
        )
