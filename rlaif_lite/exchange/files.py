"""Checkpoint files, tensor by tensor: never a whole model in memory.

Reads safetensors, and the torch pickles of older releases (memory-mapped and with `weights_only`: nothing in them is
run). Writes safetensors alone.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelError

DOWNLOADED = ["*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt", "reward_head"]
SHARD_BYTES = 2 << 30  # also the most that a conversion holds in memory


class WeightFile:
    """One file of tensors; they are read when they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix == ".safetensors":
            self._file = safe_open(path, framework="pt")
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}
            return
        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ModelError(f"{path} is not a file of tensors alone, so it is not read: {error}") from None
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key) if self.path.suffix == ".safetensors" else self._tensors[key]


def weight_files(folder: Path) -> list[WeightFile]:
    """The files of a checkpoint folder, sharded or not; safetensors where both kinds are there.

    Raises ModelError when there is none, or when a shard that the index names is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            paths = sorted(
                {folder / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
            if missing := [path.name for path in paths if not path.is_file()]:
                raise ModelError(f"{index} names files that are not there: {', '.join(missing)}. Download them again.")
            return [WeightFile(path) for path in paths]
        if (folder / name).is_file():
            return [WeightFile(folder / name)]
    raise ModelError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards.")


class ShardWriter:
    """Writes a checkpoint's tensors as they come, in shards of at most `limit` bytes, and the index at the end."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES):
        self.folder = folder
        self.limit = limit
        self.bytes = 0
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []  # keys of each shard written

    def add(self, key: str, tensor: Tensor) -> None:
        if self._waiting and sum(t.nbytes for t in self._waiting.values()) + tensor.nbytes > self.limit:
            self._write()
        self._waiting[key] = tensor.contiguous()
        self.bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left; the files get the names that transformers looks for."""
        self._write()
        count, weight_map = len(self._shards), {}
        for number, keys in enumerate(self._shards, start=1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"{number}.safetensors", self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=1) + "\n", encoding="utf-8"
            )

    def _write(self) -> None:
        self._shards.append(list(self._waiting))
        save_file(self._waiting, self.folder / f"{len(self._shards)}.safetensors", metadata={"format": "pt"})
        self._waiting = {}


def local_folder(name: str, revision: str | None = None) -> Path:
    """A folder as it is; a hub id downloaded (weights, configuration, tokenizer) and its folder in the hub's cache."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"`{name}` is neither a folder nor a repository that the hub gave: {error}") from None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears as `out` when the block ends well, and not at all when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is there already and not empty. Give a new folder, or remove it first.")
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if out.exists():
            out.rmdir()
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def read_json(path: Path) -> dict:
    """A JSON object; raises ModelError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None


def listed(keys: list[str], most: int = 12) -> str:
    """Keys for a message, one per line."""
    more = f"\n  and {len(keys) - most} more" if len(keys) > most else ""
    return "".join(f"\n  {key}" for key in sorted(keys)[:most]) + more
