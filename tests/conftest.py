"""Makes the fixtures of core.py known to every test. (They do not stand here: there is a second conftest.py in
kernels/.) And what makes the tests quick, and changes nothing of what they do."""

import gc
import os
import shutil
from pathlib import Path

from core import *  # noqa: F403
from judge_server import server  # noqa: F401

# A run waits for the disk hundreds of times, so that it survives a power cut. In memory that costs nothing.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Two workers take file after file. A long one at the end would leave one of them idle: these go first.
LONG = ("reads", "pipeline", "resume", "dryrun", "families", "truth", "video_files", "wheel")


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_collection_finish() -> None:
    """Everything is imported by now. What libraries hold is garbage never: each collection would walk over it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries look for leaks at the end."""
    gc.unfreeze()
