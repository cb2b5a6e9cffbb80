"""Seeds, batches, learning rates and the metrics log: everything about step N is a function of (seed, stage, N).

A resumed run is bit-equal to an uninterrupted one because nothing here depends on what ran before: batch N, its
learning rate and its seed can be asked for directly, and the log drops the lines that the resumed stage writes again.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from rlaif_lite.errors import StageError

from .trackers import Trackers

Schedule = Literal["cosine", "linear", "constant"]
Items = TypeVar("Items", bound=Sequence)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from any ints and strings, the same in every process: derive_seed(seed, "ppo", 7)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def batches(n_items: int, batch_size: int, steps: int, seed: int, stage: str) -> list[list[int]]:
    """`steps` batches of `batch_size` item numbers; entry N is step N's batch.

    Items come epoch after epoch, each epoch in its own shuffled order; a batch may straddle epochs, so none is short.
    """
    if n_items < 1 or batch_size < 1:
        raise StageError(f"stage {stage}: cannot cut {n_items} items into batches of {batch_size}")
    epochs = math.ceil(steps * batch_size / n_items)
    orders = [np.random.default_rng(derive_seed(seed, stage, "epoch", e)).permutation(n_items) for e in range(epochs)]
    flat = np.concatenate(orders).tolist() if orders else []
    return [flat[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def split_micro(batch: Items, size: int | None) -> list[Items]:
    """The batch in consecutive pieces of at most `size`; whole when `size` is None."""
    if size is None:
        return [batch]
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def lr_at(step: int, total: int, base_lr: float, schedule: Schedule, warmup_ratio: float, end: float = 0.0) -> float:
    """Learning rate of update `step` (from 0) of `total`.

    The first `ceil(warmup_ratio * total)` updates climb linearly to `base_lr` (update 0 already moves, unlike
    transformers' schedules); the rest stay (`constant`) or fall along a `linear` or `cosine` path to `end * base_lr`.
    """
    warmup = math.ceil(warmup_ratio * total - 1e-9)
    if step < warmup:
        return base_lr * (step + 1) / warmup
    if schedule == "constant":
        return base_lr
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return base_lr * (1.0 - (1.0 - end) * progress)
    if schedule == "cosine":
        return base_lr * (end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"schedule is {schedule!r}; known are 'cosine', 'linear' and 'constant'")


class MetricsLog:
    """`metrics.jsonl`: one JSON line per (stage, step), full precision, fsynced line by line.

    Wall-clock quantities stand under the key `time`, apart from the rest, which a repeated run reproduces exactly.
    Log a step BEFORE saving the checkpoint that follows it; then `resume` loses nothing and doubles nothing.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None):
        """`trackers` get every line that is written."""
        self.path = Path(path)
        self._trackers = trackers

    def resume(self, stage: str, step: int) -> None:
        """Drops this stage's lines of `step` and later (all of them for step 0), and a line cut short by a kill."""
        if self._trackers is not None:
            steps = [line["step"] for line in map(json.loads, self._whole_lines()) if line["stage"] == stage]
            self._trackers.resume(stage, step, max(steps, default=-1))
        if self.path.exists():
            self._replace([line for line in self._whole_lines() if not self._is_redone(line, stage, step)])

    def drop(self, stage: str) -> None:
        """Drops all lines of `stage` and its phases (`sft.easy` of `sft`)."""
        if self.path.exists():
            self._replace([line for line in self._whole_lines() if not self._is_of(line, stage)])

    def take(self, stage: str, other: Path) -> None:
        """Adds another log's lines of `stage` and its phases."""
        found = [line for line in MetricsLog(other)._whole_lines() if self._is_of(line, stage)]
        self._replace([*self._whole_lines(), *found])

    def append(self, stage: str, step: int, values: Mapping[str, float], time: Mapping[str, float] | None = None):
        """Writes one line. Raises StageError when a value is NaN or infinite: nothing after it can be trusted."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise StageError(
                    f"{name} is {value} at step {step} of stage {stage}; the run diverged. Lower the learning rate, "
                    f"or look at the steps before in {self.path}"
                )
        line = {"stage": stage, "step": step, **{name: _plain(value) for name, value in values.items()}}
        if time is not None:
            line["time"] = {name: float(value) for name, value in time.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._trackers is not None:
            timed = {f"time/{name}": value for name, value in line.pop("time", {}).items()}
            self._trackers.log(stage, step, {name: line[name] for name in values} | timed)

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return lines if not lines or lines[-1].endswith("\n") else lines[:-1]

    def _replace(self, lines: list[str]) -> None:
        replacement = self.path.with_name(self.path.name + ".tmp")
        with open(replacement, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(replacement, self.path)

    @staticmethod
    def _is_of(line: str, stage: str) -> bool:
        return json.loads(line)["stage"].partition(".")[0] == stage

    @staticmethod
    def _is_redone(line: str, stage: str, step: int) -> bool:
        entry = json.loads(line)
        return entry["stage"] == stage and entry["step"] >= step


def _plain(value: float) -> int | float:
    "A Python number of a Python, NumPy or torch scalar."
    return value if isinstance(value, int) else float(value)
