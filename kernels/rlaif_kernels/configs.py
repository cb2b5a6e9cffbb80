"""Launch configurations per GPU architecture: an explicit table instead of autotuning.

Autotuning would launch candidates at every new shape, give a run no two of which need be alike, and cannot be checked
without a GPU. Every entry here is compiled ahead of time by the tests, for its own architecture, and may not spill a
register.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Elements that one program handles at a time, and its warps."""

    block: int
    num_warps: int


class Configs(NamedTuple):
    """One architecture's entries."""

    rows: Config  # statistics and gradient of one row of logits
    rows_with_reference: Config  # the same with the reference's logits beside it: twice the state per element
    gae: Config  # tokens of one row per step of the scan
    dissimilarity: Config  # channels per step
    gather: Config  # channels per step


# A chunk of 384 rows is 3 programs per SM. At these sizes 3 (with a reference: 2) fit the register file beside one
# another, so a chunk is one wave, and have some 48 KB of loads in flight, what it takes to cover HBM's latency.
# Reckoned, not timed.
_LARGE = Configs(Config(4096, 8), Config(2048, 16), Config(1024, 8), Config(1024, 4), Config(1024, 4))
# sm_86 and sm_89 hold 1536 threads per SM and a third of the bandwidth: smaller programs, more of them
_SMALL = Configs(Config(1024, 4), Config(1024, 4), Config(1024, 8), Config(1024, 4), Config(1024, 4))

TABLE: dict[int, Configs] = {80: _LARGE, 86: _SMALL, 89: _SMALL, 90: _LARGE, 100: _LARGE}


def configs_for(device: torch.device) -> Configs:
    """The entry of this device's architecture or of the nearest older one; the interpreter, on a CPU, takes sm_80's."""
    if device.type != "cuda":
        return TABLE[80]
    major, minor = torch.cuda.get_device_capability(device)
    return TABLE[max((arch for arch in TABLE if arch <= 10 * major + minor), default=80)]
