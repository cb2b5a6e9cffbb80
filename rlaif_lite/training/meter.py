"""What a phase cost: seconds and peak memory; and on which machine, with which versions.

Peak memory is the CUDA allocator's peak on a GPU and this process's peak resident set on a CPU. The kernel's high-water
mark is reset at the start of a phase (Linux: 5 into /proc/self/clear_refs) and free heap is returned to the system, so
a phase does not inherit the peak of an earlier one; where that is not possible the peak is the whole process's so far.
Worker processes are not counted.
"""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "decord", "safetensors", "accelerate", "numpy")


class Meter:
    """Measures the block under `with`; its figures are there when the block has ended.

    Phases do not nest and do not overlap: each start resets the one high-water mark there is.
    """

    seconds: float
    peak_memory_bytes: int

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)

    def __enter__(self) -> "Meter":
        settle(self.device)
        self._began = now(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = now(self.device) - self._began
        self.peak_memory_bytes = peak_bytes(self.device)


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def settle(device: torch.device) -> None:
    """Give back what earlier phases left, and let the peak begin."""
    gc.collect()
    if device.type != "cuda":
        give_back()
    reset_peak(device)


def reset_peak(device: torch.device) -> None:
    """Let the peak begin at what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or a container forbids it: the peak is the process's
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """The peak since it was last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if line := _line_of("/proc/self/status", "VmHWM"):
        return int(line.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes here


def describe_machine() -> dict[str, str | int]:
    """Name of the device work runs on, and the cores, memory and system around it; plain JSON."""
    machine: dict[str, str | int] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        machine["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return machine


def versions() -> dict[str, str]:
    """Versions of Python, this package and what its numbers depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("rlaif-lite", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with its build, which not every package's metadata names


def give_back() -> None:
    """Return what the heap holds free to the system, so that a phase neither holds nor counts an earlier one's."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than Linux's
        ctypes.CDLL(None).malloc_trim(0)


def _line_of(path: str, name: str) -> str | None:
    """What follows the first `name` and its colon in a file of /proc; None where there is no such file or line."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    return None
