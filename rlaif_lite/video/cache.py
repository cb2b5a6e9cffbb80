"""The feature cache: each video goes through the vision tower once, and every later stage reads the result.

One safetensors file per video holds all its views (the whole video and its clips). Its name is a hash of everything
that decides its content: the bytes of the video, the sampling, the image processor, the tower's weights, the prune
chain, the dtype. So a file that exists is right, runs can share a folder, and a change never finds stale features.

Shapes: K tokens kept, C channels of a position (1, or 3: time, row, column), D width, T frames of the view, R runs, L
layers.
"""

import hashlib
import json
import logging
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import ranks
from ..files import atomic, clean, read_json, write_json

log = logging.getLogger(__name__)

HELD_BYTES = 1 << 30  # of features, in memory at a time
FORMAT = 3  # counted up whenever the files or the arithmetic behind them change


class FeatureRecord(NamedTuple):
    """The pruned features of one view of one video."""

    features_KD: torch.Tensor  # bfloat16 or float32, after the projector and the prune chain
    position_CK: torch.Tensor  # int64, place of the token on the unpruned layout, from the start of its run
    frame_K: torch.Tensor  # int64, index of the token's frame in time_T; -1 for a mean over all frames
    time_T: torch.Tensor  # float64, seconds of each frame since the first frame of the video (after merging in time)
    kept_R: torch.Tensor  # int64, tokens left of each run; a run is video tokens without text between them, sums to K
    span_R: torch.Tensor  # int64, how far positions go on over each run, whatever was pruned of it
    layout_tokens: int  # tokens that the tower gave, before any pruning
    frames: int  # frames that were sampled
    duration: float  # seconds, of the whole video
    deepstack_LKD: torch.Tensor | None = None  # of the same tokens, for families whose decoder takes them

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of their fields."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}


def feature_key(*, video: str, views: dict, processor: dict, tower: str, chain: list[dict], dtype: str) -> str:
    """The name of a cache file, 32 hex digits.

    video: its digest; views: {name: View}; processor: the whole image-processor configuration; tower: base name and
    digest of the weights; chain: the prune chain; dtype: of the stored features.
    """
    parts = {"format": FORMAT, "video": video, "views": {name: list(view) for name, view in views.items()}}
    parts |= {"processor": processor, "tower": tower, "chain": chain, "dtype": dtype}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class FeatureStore:
    """A folder of cache files, with the ones last used held in memory (`memory_bytes` at most)."""

    def __init__(self, folder: str | os.PathLike, *, memory_bytes: int = HELD_BYTES):
        self.folder = Path(folder)
        self.memory_bytes = memory_bytes
        self._held: OrderedDict[str, tuple[dict[str, FeatureRecord], int]] = OrderedDict()
        self._held_bytes = 0
        if ranks.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder, older_than=3600)  # younger ones may be a neighbour's

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a sound file is there. Checks header and size; `get` checks every byte."""
        return key in self._held or self._header(key) is not None

    def get(self, key: str) -> dict[str, FeatureRecord] | None:
        """All views of one video by name, on the CPU; None when absent. Do not write into the tensors.

        A damaged file is reported and removed, so that it is made again.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        header = self._header(key)
        if header is None:
            return None
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            return self._damaged(key, str(error))
        if _checksum(tensors, header["views"]) != header["checksum"]:
            return self._damaged(key, "its checksum does not fit its content")
        parts: dict[str, dict] = {name: dict(numbers) for name, numbers in header["views"].items()}
        for path, tensor in tensors.items():
            name, part = path.rsplit("/", 1)
            parts[name][part] = tensor
        views = {name: FeatureRecord(**fields) for name, fields in parts.items()}
        size = sum(tensor.nbytes for view in views.values() for tensor in view.tensors().values())
        if size <= self.memory_bytes:
            self._held[key] = (views, size)
            self._held_bytes += size
        while self._held_bytes > self.memory_bytes:
            self._drop(next(iter(self._held)))
        return views

    def tokens(self, key: str, view: str) -> int:
        """How many tokens a view has that is there; its features are not read."""
        with safe_open(self.path(key), "pt") as file:
            return file.get_slice(f"{view}/features_KD").get_shape()[0]

    def put(self, key: str, views: dict[str, FeatureRecord], about: dict | None = None) -> None:
        """Write one video's views; a reader sees the whole file or none. `about` goes into the header, for people."""
        tensors = {
            f"{name}/{part}": tensor.cpu().contiguous()
            for name, view in views.items()
            for part, tensor in view.tensors().items()
        }
        numbers = {
            name: {part: getattr(view, part) for part in ("layout_tokens", "frames", "duration")}
            for name, view in views.items()
        }
        header = {"key": key, "views": numbers, "checksum": _checksum(tensors, numbers), "about": about or {}}
        with atomic(self.path(key)) as partial:
            save_file(tensors, partial, metadata={"rlaif_lite": json.dumps(header)})
        self._drop(key)

    def _header(self, key: str) -> dict | None:
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["rlaif_lite"])
        except (SafetensorError, KeyError, ValueError) as error:
            return self._damaged(key, str(error))
        return header if header["key"] == key else self._damaged(key, f"it was written as {header['key']}")

    def _damaged(self, key: str, why: str) -> None:
        log.warning("%s is damaged (%s); it counts as absent and is removed.", self.path(key), why)
        if ranks.is_first():
            self.path(key).unlink(missing_ok=True)

    def _drop(self, key: str) -> None:
        if key in self._held:
            self._held_bytes -= self._held.pop(key)[1]


def write_index(path: str | os.PathLike, keys: dict[str, str]) -> None:
    """Write a run's `index.json`, {video's name: key}, whole or not at all."""
    write_json(Path(path), dict(sorted(keys.items())))


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """{video's name: key} of a run; empty when it was not written yet."""
    return read_json(Path(path)) if os.path.exists(path) else {}


def _checksum(tensors: dict[str, torch.Tensor], numbers: dict) -> int:
    total = zlib.crc32(json.dumps(numbers, sort_keys=True).encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), total))
    return total
