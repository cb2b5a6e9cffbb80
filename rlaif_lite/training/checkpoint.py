"""A training state as one safetensors file, replaced so that a kill at any moment leaves a valid one.

The file's header holds everything that is no tensor, and the sha256 of all. Loading gives the same bits back: tensors,
optimizer states with their step counters, and other state. Random states are not kept: every step seeds its own.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from .. import ranks
from ..errors import StageError
from ..files import atomic

FILE = "checkpoint.safetensors"
HEADER = "rlaif_lite"  # safetensors writes several keys in any order; with one key the same state is the same bytes


class Checkpoint(NamedTuple):
    """What `load` gives back of a checkpoint."""

    step: int  # steps done; the next one to run
    tensors: dict[str, Tensor]  # as given to `save`, on the CPU
    optimizers: dict[str, dict]  # state dicts; put back with `restore_optimizer`
    state: dict  # as given to `save`


def save(folder: Path, step: int, tensors: dict[str, Tensor], optimizers: dict[str, Optimizer], state: dict) -> None:
    """Replaces the checkpoint in `folder` (made if missing) by this one.

    `state`: schedules, controllers, positions, ... nested dicts, lists and tuples of numbers, strings and tensors.
    Raises TypeError, before anything is touched, when it or an optimizer holds anything else. All ranks call this; rank
    0 writes its own.
    """
    ranks.first(lambda: _save(folder, step, tensors, optimizers, state))


def _save(folder: Path, step: int, tensors: dict[str, Tensor], optimizers: dict[str, Optimizer], state: dict) -> None:
    flat = {f"tensor/{name}": tensor for name, tensor in tensors.items()}
    described: dict[str, Any] = {"step": step, "state": _pack(state, "state", flat), "optimizers": {}}
    for name, optimizer in optimizers.items():
        described["optimizers"][name] = _pack(optimizer.state_dict(), f"optimizer/{name}", flat)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in flat.items()}
    text = json.dumps(described)
    header = json.dumps({"sha256": digest(on_cpu, text), "state": text})
    with atomic(Path(folder) / FILE) as tmp:
        save_file(on_cpu, tmp, metadata={HEADER: header})


def load(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when none was ever completed. Raises StageError when it is damaged."""
    path = Path(folder) / FILE
    if not ranks.first(path.exists):
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[HEADER])
            flat = {name: file.get_tensor(name) for name in file.keys()}
        text = header["state"]
        if digest(flat, text) != header["sha256"]:
            raise ValueError("its content does not match its checksum")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise StageError(
            f"The checkpoint {path} is damaged ({error}). Delete {folder} to start this phase over; stages that are "
            "done are kept."
        ) from error
    described = json.loads(text)
    return Checkpoint(
        step=described["step"],
        tensors={name.removeprefix("tensor/"): t for name, t in flat.items() if name.startswith("tensor/")},
        optimizers={name: _unpack(packed, flat) for name, packed in described["optimizers"].items()},
        state=_unpack(described["state"], flat),
    )


def digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """sha256 over the text and every tensor's name, type, shape and bytes."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def restore_optimizer(optimizer: Optimizer, checkpoint: Checkpoint, name: str) -> None:
    """Puts the saved state `name` into `optimizer`, built over the same parameters in the same order.

    Raises StageError when the checkpoint holds no such optimizer, or one over other parameters.
    """
    if name not in checkpoint.optimizers:
        raise StageError(
            f"the checkpoint holds optimizers {sorted(checkpoint.optimizers)}, not {name!r}; delete it to start over"
        )
    try:
        optimizer.load_state_dict(checkpoint.optimizers[name])
    except ValueError as error:
        raise StageError(
            f"optimizer {name!r} of the checkpoint is over other parameters ({error}); delete it to start over"
        ) from error


def _pack(value: Any, name: str, flat: dict[str, Tensor]) -> Any:
    """JSON of nested dicts, lists and tuples; each tensor moves to `flat` under its path.

    What JSON lacks is spelled out, so that `_unpack` gives the same types back: {"dict": [[key, value]...]},
    {"tuple": [...]}, {"tensor": path}.
    """
    if isinstance(value, Tensor):
        flat[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}/{key}", flat)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, f"{name}/{i}", flat) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, f"{name}/{i}", flat) for i, item in enumerate(value)]
    return value


def _unpack(packed: Any, flat: dict[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, flat) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return flat[packed["tensor"]]
    if "tuple" in packed:
        return tuple(_unpack(item, flat) for item in packed["tuple"])
    return {key: _unpack(item, flat) for key, item in packed["dict"]}
