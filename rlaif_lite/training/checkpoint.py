"""A training state as a folder of safetensors and JSON, replaced so that a kill at any moment leaves a valid one.

    <folder>/latest             the name of the slot that holds the checkpoint
    <folder>/slot-a, slot-b     tensors.safetensors and state.json; one slot is current, the other is being written

`save` fills the slot that `latest` does not name, syncs it to disk, swaps `latest` in one rename, and removes the old
slot. Whatever a killed save left behind is cleared by the next one. Loading gives the same bits back: tensors,
optimizer states with their step counters, other state, and the random states of Python, NumPy, torch and CUDA devices.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from rlaif_lite.errors import StageError

SLOTS = ("slot-a", "slot-b")


class Checkpoint(NamedTuple):
    step: int
    "steps done; the next one to run"
    tensors: dict[str, Tensor]
    "as given to `save`, on the CPU"
    optimizers: dict[str, dict]
    "state dicts; put back with `restore_optimizer`"
    state: dict
    "as given to `save`"
    rng: dict
    "random states; put back with `restore_rng`"


def save(folder: Path, step: int, tensors: dict[str, Tensor], optimizers: dict[str, Optimizer], state: dict) -> None:
    """Replaces the checkpoint in `folder` (made if missing) by this one.

    `state`: schedules, controllers, positions, ... nested dicts, lists and tuples of numbers, strings and tensors.
    Raises TypeError, before anything is touched, when it or an optimizer holds anything else.
    """
    folder = Path(folder)
    flat = {f"tensor/{name}": tensor for name, tensor in tensors.items()}
    described: dict[str, Any] = {"step": step, "state": _pack(state, "state", flat), "optimizers": {}}
    for name, optimizer in optimizers.items():
        described["optimizers"][name] = _pack(optimizer.state_dict(), f"optimizer/{name}", flat)
    described["rng"] = _pack(_rng_states(), "rng", flat)
    text = json.dumps(described)

    folder.mkdir(parents=True, exist_ok=True)
    current = _current_slot(folder)
    fresh = SLOTS[1] if current == SLOTS[0] else SLOTS[0]
    shutil.rmtree(folder / fresh, ignore_errors=True)
    (folder / fresh).mkdir()
    save_file({name: t.detach().contiguous() for name, t in flat.items()}, folder / fresh / "tensors.safetensors")
    (folder / fresh / "state.json").write_text(text, encoding="utf-8")
    for path in (folder / fresh / "tensors.safetensors", folder / fresh / "state.json", folder / fresh, folder):
        _sync(path)

    pointer = folder / "latest.tmp"
    pointer.write_text(fresh, encoding="utf-8")
    _sync(pointer)
    os.replace(pointer, folder / "latest")
    _sync(folder)
    if current is not None:
        shutil.rmtree(folder / current)


def load(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when none was ever completed. Changes no random state: see `restore_rng`.

    Raises StageError when the checkpoint that `latest` names is damaged.
    """
    folder = Path(folder)
    slot = _current_slot(folder)
    if slot is None:
        return None
    try:
        described = json.loads((folder / slot / "state.json").read_text(encoding="utf-8"))
        flat = load_file(folder / slot / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise StageError(
            f"the checkpoint in {folder / slot} cannot be read ({error}); delete {folder} to start the stage over"
        ) from error
    return Checkpoint(
        step=described["step"],
        tensors={name.removeprefix("tensor/"): t for name, t in flat.items() if name.startswith("tensor/")},
        optimizers={name: _unpack(packed, flat) for name, packed in described["optimizers"].items()},
        state=_unpack(described["state"], flat),
        rng=_unpack(described["rng"], flat),
    )


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


def restore_rng(checkpoint: Checkpoint) -> None:
    """Sets the random states of Python, NumPy, torch and the CUDA devices to what they were at `save`."""
    version, words, gauss = checkpoint.rng["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = checkpoint.rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(checkpoint.rng["torch"])
    for device, state in enumerate(checkpoint.rng["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def _rng_states() -> dict:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


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


def _current_slot(folder: Path) -> str | None:
    try:
        slot = (folder / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if slot not in SLOTS:
        raise StageError(f"{folder / 'latest'} names {slot!r}, not one of {SLOTS}; delete {folder} to start over")
    return slot


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
