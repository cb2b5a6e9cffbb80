"""Adds up what each phase of a stage costs: seconds, peak memory, tokens, and of the last step a trace.

The first step of a stage that has more is a warm-up (compilation, the allocator's first blocks) and is dropped. On a
GPU every phase begins and ends with a synchronisation, so what the host would overlap is not overlapped here. On a CPU
the peak is that of the process, free heap that it has not given back included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..training.meter import Meter, now, peak_bytes, reset_peak, settle

# The phases that run the decoder once, with two floating-point operations per token and parameter of its linear layers.
# The base is frozen: its backward has one matmul and not two. What checkpointing computes twice counts once: it is no
# progress.
DECODING = {
    *("prefill", "decode", "score policy", "score reference", "score reward", "score value", "forward", "backward"),
    *("update policy forward", "update policy backward", "update value forward", "update value backward"),
}


@dataclass
class Cost:
    """Of one phase, over all its calls."""

    calls: int = 0
    seconds: float = 0.0
    count: int = 0  # tokens, or frames before the tower
    peak_memory_bytes: int = 0


@dataclass
class Moment:
    """One call of a phase, for the picture."""

    name: str
    begin: float  # seconds since the stage began
    end: float
    held: int  # bytes after it
    peak: int  # bytes within it


@dataclass
class Recorder:
    """A listener (see `phases`) for one stage."""

    device: torch.device
    traced_step: int | None = None  # number of the step that is traced, from 1
    costs: dict[str, Cost] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    steps: int = 0
    warmed: bool = False
    peak_memory_bytes: int = 0  # of the stage, between phases too
    trace: torch.profiler.profile | None = None

    def __enter__(self) -> "Recorder":
        settle(self.device)
        self._inside = False
        self._begin = self._since = now(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        end = now(self.device)
        self._look()
        if self.trace is not None:
            self.trace.stop()
        self.seconds, self.measured_seconds = end - self._begin, end - self._since

    def step(self) -> None:
        if self.steps == 1 and not self.warmed:
            self.costs.clear()
            self.steps, self.warmed, self._since = 0, True, now(self.device)
        self.steps += 1
        if self.steps + self.warmed == self.traced_step:
            self.trace = torch.profiler.profile()  # of the CPU, and of the GPU where there is one
            self.trace.start()

    @contextmanager
    def phase(self, name: str, count: int) -> Iterator[None]:
        if self._inside:
            raise RuntimeError(f"Phase `{name}` began inside another one; phases do not nest.")
        self._inside = True
        self._look()
        reset_peak(self.device)
        begin = now(self.device)
        try:
            with torch.profiler.record_function(name):
                yield
            end = now(self.device)
        finally:
            self._inside = False
        peak = self._look()
        reset_peak(self.device)
        cost = self.costs.setdefault(name, Cost())
        cost.calls += 1
        cost.seconds += end - begin
        cost.count += count
        cost.peak_memory_bytes = max(cost.peak_memory_bytes, peak)
        held = peak_bytes(self.device)  # just reset: what is held now
        self.moments.append(Moment(name, begin - self._begin, end - self._begin, held, peak))

    def _look(self) -> int:
        """The peak since the last reset, which also counts for the stage."""
        peak = peak_bytes(self.device)
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)
        return peak


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that one large matmul reaches here: the best of a few."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6 if device.type == "cuda" else 3):
        with Meter(device) as meter:
            a @ b
        best = min(best, meter.seconds)
    return 2 * side**3 / best
