"""What this machine can do: hardware, versions, and a small real trial of each part that fails on some machines.

Each trial does the thing and measures the result (a weight quantised and back, a film written, decoded and looked at),
because an import that works says little: a wrong bitsandbytes kernel, an odd decord build and a Triton without a driver
all import well.
"""

import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from . import ranks
from .formats import aligned
from .recipe.file import recipe_folders

GIB = 1024**3
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TINY_RAM_GIB = 4  # the embedded default with its libraries stays well below
NF4_ERROR = 0.12  # relative error; a right NF4 round trip of normal weights has 0.09, wrong kernels 0.18 and more


class Trial(NamedTuple):
    """The outcome of trying one thing."""

    ok: bool
    detail: str


def examine() -> dict[str, Any]:
    """All findings, as JSON can hold them. Takes a few seconds, most of them for importing torch."""
    started = time.monotonic()
    packages, gpus, memory = _packages(), _gpus(), _memory()
    trials = {name: _try(trial)._asdict() for name, trial in TRIALS.items()}
    findings = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "memory": memory,
        "gpus": gpus,
        "packages": packages,
        "trials": trials,
        "recipes": _recipes(gpus, memory["ram_gib"]),
        "healthy": all(p["ok"] for p in packages.values()) and all(t["ok"] for t in trials.values()),
    }
    return findings | {"seconds": round(time.monotonic() - started, 1)}


# ------------------------------------------------------------------------------------------------------------ hardware


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = set((re.search(r"^flags\s*:\s*(.+)$", text, re.M) or [""])[0].split())
    sockets, ids = (re.findall(rf"^{key}\s*:\s*(\d+)$", text, re.M) for key in ("physical id", "core id"))
    cores = set(zip(sockets, ids, strict=False))
    usable = ranks.cores()
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": min(len(cores) or usable, usable),
        "threads": usable,
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _memory() -> dict[str, float]:
    """GiB of RAM (the container's limit where there is one) and of free disk where runs would be written."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.M))
    total = int(fields.get("MemTotal", 0)) * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        total = min(total, int(limit))
    available = int(fields.get("MemAvailable", 0)) * 1024 or total
    return {
        "ram_gib": round(total / GIB, 1),
        "ram_available_gib": round(min(available, total) / GIB, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    driver = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _read("/proc/driver/nvidia/version"))
    gpus = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": props.name,
                "memory_gib": round(props.total_memory / GIB, 1),
                "capability": f"{props.major}.{props.minor}",
                "driver": driver[1] if driver else "unknown",
                "cuda": torch.version.cuda,
            }
        )
    return gpus


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------------------ packages


def requirements() -> list[Requirement]:
    """What this package depends on, from its installed metadata or, in a bare checkout, from pyproject.toml."""
    try:
        lines = metadata.requires("rlaif-lite") or []
    except metadata.PackageNotFoundError:
        import tomllib

        project = Path(__file__).parent.parent / "pyproject.toml"
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = [Requirement(line) for line in lines]
    return [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]


def _packages() -> dict[str, dict[str, Any]]:
    result = {}
    for need in requirements():
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            version = None
        ok = version is not None and need.specifier.contains(version, prereleases=True)
        if version is None and need.name == "decord":  # decord2 is imported by the same name
            version = next((f"decord2 {found.version}" for found in metadata.distributions(name="decord2")), None)
            ok = version is not None
        result[need.name] = {"version": version, "needs": str(need.specifier), "ok": ok}
    return result


# -------------------------------------------------------------------------------------------------------------- trials


def _try(trial: Callable[[], Trial]) -> Trial:
    try:
        return trial()
    except Exception as error:  # a broken library may raise anything, and the doctor reports it
        return Trial(False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _four_bit() -> Trial:
    """A 64x64 weight through NF4 with double quantisation and back, on the CPU and on the GPU where there is one."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        packed, state = quantize_4bit(weight.to(device), blocksize=64, quant_type="nf4", compress_statistics=True)
        back = dequantize_4bit(packed, state).cpu().float()
        errors[device] = ((back - weight).norm() / weight.norm()).item()
    ok = all(error < NF4_ERROR for error in errors.values())  # NaN is not below anything
    detail = "relative error " + ", ".join(f"{device} {error:.3f}" for device, error in errors.items())
    return Trial(ok, detail if ok else f"{detail}, expected below {NF4_ERROR}: reinstall bitsandbytes")


def _triton() -> Trial:
    """A kernel of ours against its torch path on the GPU. Without a GPU nothing is lost: torch paths serve the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Trial(True, "no GPU: the torch paths are used")
    from rlaif_kernels import gae

    x_BT = torch.linspace(-1, 1, 64, device="cuda").view(4, 16)
    args = (x_BT, x_BT, torch.ones_like(x_BT))
    ours, plain = (gae(*args, gamma=1.0, lam=0.95, impl=impl)[0] for impl in ("triton", "torch"))
    gap = (ours - plain).abs().max().item()
    return Trial(gap < 1e-4, f"a kernel compiled and ran, {gap:.1e} from the torch path")


def _decoding() -> Trial:
    """Ten grey frames, each brighter than the last, written by PyAV and read back as every video of a run is read."""
    import av
    import numpy as np

    from .video.decode import View
    from .video.workers import decode_one

    levels = [20 * (i + 1) for i in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/grey.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for level in levels:
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        frames = decode_one(path, {"grey": View(10)}, None)["grey"]
    read = frames.rgb_THWC.mean(axis=(1, 2, 3))
    worst = float(np.abs(read - levels).max())
    return Trial(worst < 6, f"{frames.source} read 10 of 10 frames, brightness within {worst:.1f} of 255")


def _codecs() -> Trial:
    """Which of the usual codecs PyAV's ffmpeg decodes, and whether it encodes H.264 as the synthetic world needs."""
    import av

    reads = [name for name in ("h264", "hevc", "vp9", "av1", "mpeg4") if _has_codec(av, name, "r")]
    writes = _has_codec(av, "libx264", "w")
    detail = f"decodes {', '.join(reads) or 'none'}; {'writes' if writes else 'cannot write'} H.264"
    return Trial("h264" in reads and writes, detail)


def _has_codec(av: Any, name: str, mode: str) -> bool:
    try:
        av.codec.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


TRIALS: dict[str, Callable[[], Trial]] = {
    "4-bit weights": _four_bit,
    "Triton": _triton,
    "video decoding": _decoding,
    "video codecs": _codecs,
}


# ------------------------------------------------------------------------------------------------------------- recipes


def _recipes(gpus: list[dict[str, Any]], ram_gib: float) -> dict[str, str]:
    """Each shipped recipe, and whether it runs here. A name that ends in `_24gb` needs a GPU of that size."""
    largest = max((gpu["memory_gib"] for gpu in gpus), default=0.0)
    verdicts = {}
    for path in (path for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))):
        size = re.search(r"_(\d+)gb$", path.stem)
        if size is None:
            verdicts[str(path)] = "runs here" if ram_gib >= TINY_RAM_GIB else f"needs {TINY_RAM_GIB} GiB of memory"
        else:  # a card sold as 24 GB reports a little less
            fits = math.ceil(largest * 1.05) >= int(size[1])
            verdicts[str(path)] = "runs here" if fits else f"needs a GPU with {size[1]} GB"
    return verdicts


# ---------------------------------------------------------------------------------------------------------------- text


def as_text(findings: dict[str, Any]) -> str:
    """The findings as a plain table."""
    cpu, memory = findings["cpu"], findings["memory"]
    flags = ", ".join(cpu["flags"]) or "none of " + ", ".join(CPU_FLAGS)
    rows = [
        ("", "Python", findings["python"] + f" ({sys.executable})"),
        ("", "system", findings["system"]),
        ("", "CPU", f"{cpu['model']}, {cpu['cores']} cores, {flags}"),
        ("", "memory", f"{memory['ram_gib']} GiB, {memory['ram_available_gib']} GiB free"),
        ("", "disk", f"{memory['disk_free_gib']} GiB free in {Path.cwd()}"),
    ]
    for gpu in findings["gpus"]:
        versions = f"capability {gpu['capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
        rows.append(("", "GPU", f"{gpu['name']}, {gpu['memory_gib']} GiB, {versions}"))
    if not findings["gpus"]:
        rows.append(("", "GPU", "none that torch can use"))
    for name, trial in findings["trials"].items():
        rows.append(("ok" if trial["ok"] else "FAIL", name, trial["detail"]))
    for name, package in findings["packages"].items():
        detail = f"{package['version'] or 'missing'} (needs {package['needs']})"
        rows.append(("ok" if package["ok"] else "FAIL", name, detail))
    for path, verdict in findings["recipes"].items():
        rows.append(("ok" if verdict == "runs here" else "-", path, verdict))
    advice = "Mend what is marked FAIL; installing rlaif-lite in a fresh environment mends versions."
    return f"{aligned(rows, 3)}\n{'All is well.' if findings['healthy'] else advice}"
