"""Starts a dry run in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import shim
from .cards import card_of


def dry_run(
    recipe: str,
    overrides: Sequence[str],
    gpu: str,
    stages: Sequence[str],
    layers: int | None,
    trace: bool,
    out: Path | None,
) -> int:
    """Print the table, write JSON to `out`, and return the exit code: 2 where the input was wrong, with a message.

    Raises StageError for an unknown card, and where the shim cannot be built."""
    card_of(gpu)
    library = shim.build()
    asked = {
        "shim": None if library is None else str(library),
        "recipe": recipe,
        "overrides": list(overrides),
        "gpu": gpu,
        "stages": list(stages),
        "layers": layers,
        "trace": trace,
        "out": None if out is None else str(out),
    }
    return subprocess.run([sys.executable, "-m", __package__, json.dumps(asked)], check=False).returncode
