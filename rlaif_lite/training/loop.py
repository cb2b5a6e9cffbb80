"""Seeds, batches, learning rates and the metrics log: everything about step N is a function of (seed, stage, N).

Nothing here depends on what ran before, so on a CPU a resumed run is bit-equal to an uninterrupted one: batch N, its
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

from .. import ranks
from ..errors import StageError
from ..files import whole_lines, write_text
from .health import Watch
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
    """`metrics.jsonl`: one JSON line per (stage, step), full precision, fsynced line by line. All ranks log the same;
    rank 0 writes.

    Wall-clock quantities are under the key `time`, apart from the rest, which a repeated run reproduces exactly.
    Log a step BEFORE saving the checkpoint that follows it; then `resume` loses nothing and doubles nothing.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None, health: Literal["warn", "stop"] = "warn"):
        """`trackers` get every line that is written. `health`: what happens where the metrics say that nothing can be
        learnt (see `health.py`)."""
        self.path = Path(path)
        self._trackers = trackers
        self._watch = Watch(health)
        self._written: dict[str, hashlib._Hash] = {}  # of the lines of each stage label that this process resumed

    def resume(self, stage: str, step: int, digest: str | None = None) -> None:
        """Drops this stage's lines of `step` and later (all of them for step 0), and a line cut short by a kill.

        `digest`: what `digest_of` gave at the checkpoint. Raises StageError where the lines before `step` are
        others."""
        exists, lines = ranks.first(lambda: (self.path.exists(), self._lines()))
        kept = [line for line in lines if not (_stage(line) == stage and json.loads(line)["step"] >= step)]
        own = hashlib.sha256("".join(line for line in kept if _stage(line) == stage).encode())
        if digest is not None and own.hexdigest() != digest:
            raise StageError(
                f"{self.path}: the lines of {stage} before step {step} are missing or changed since the checkpoint of "
                f"that step. Put the file back, or delete the folder {self.path.parent / stage.partition('.')[0]} and "
                "run again: that stage starts over."
            )
        self._written[stage] = own
        if self._trackers is not None:
            steps = [json.loads(line)["step"] for line in lines if _stage(line) == stage]
            self._trackers.resume(stage, step, max(steps, default=-1))
        if exists:
            self._replace(kept)

    def drop(self, stage: str) -> None:
        """Drops all lines of `stage` and its phases (`sft.easy` of `sft`)."""
        if self.path.exists():
            self._replace([line for line in self._lines() if _owner(line) != stage])

    def take(self, stage: str, other: Path) -> None:
        """Adds another log's lines of `stage` and its phases."""
        self._replace([*self._lines(), *(line for line in MetricsLog(other)._lines() if _owner(line) == stage)])

    def digest_of(self, stage: str) -> str:
        """sha256 of the lines of a stage label that was resumed here, for its checkpoint."""
        return self._written[stage].hexdigest()

    def digests(self) -> dict[str, str]:
        """{stage: sha256 of all its lines, those of its phases included}, as the file has them now."""
        found: dict[str, hashlib._Hash] = {}
        for line in self._lines():
            found.setdefault(_owner(line), hashlib.sha256()).update(line.encode())
        return {stage: digest.hexdigest() for stage, digest in found.items()}

    def append(self, stage: str, step: int, values: Mapping[str, float], time: Mapping[str, float] | None = None):
        """Writes one line. Raises StageError when a value is NaN or infinite: nothing after it can be trusted.

        Says, once, where the metrics of several steps show that something is wrong; raises StageError where nothing can
        be learnt and the recipe has `health: stop`."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise StageError(
                    f"{name} is {value} at step {step} of stage {stage}; the run diverged. Lower the learning rate, "
                    f"or look at the steps before in {self.path}"
                )
        plain = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        line = {"stage": stage, "step": step, **plain}
        if time is not None:
            line["time"] = {name: float(value) for name, value in time.items()}
        text = json.dumps(line) + "\n"
        if ranks.is_first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        if stage in self._written:
            self._written[stage].update(text.encode())
        if self._trackers is not None:
            timed = {f"time/{name}": value for name, value in line.pop("time", {}).items()}
            self._trackers.log(stage, step, {name: line[name] for name in values} | timed)
        self._watch.see(stage, step, line)

    def _lines(self) -> list[str]:
        """Raises StageError for a line that is no entry of a log."""
        lines = whole_lines(self.path)
        for number, line in enumerate(lines, 1):
            try:
                _stage(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise StageError(
                    f"{self.path}, line {number}, is damaged: {line[:80]!r}. Put the file back, or delete it together "
                    "with the folder of the stage that was running, and run again."
                ) from None
        return lines

    def _replace(self, lines: list[str]) -> None:
        write_text(self.path, "".join(lines))


def _stage(line: str) -> str:
    """The label of a line's stage: "sft.easy"."""
    return json.loads(line)["stage"]


def _owner(line: str) -> str:
    """The stage that a line belongs to: "sft" of "sft.easy"."""
    return _stage(line).partition(".")[0]
