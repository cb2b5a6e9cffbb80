"""A run folder under one process: held by a lock, checked against what was written, and explained when the disk fails.

A stage that is done has `<stage>/files.sha256`, the digests of everything it left, and `<stage>/done.json`, which holds
a digest of that list, of the stage's lines in `metrics.jsonl` and of itself. `rlaif-lite run` checks all of them
before it skips a stage. Cached features are not among them: each file of the cache is checked whenever it is read.
"""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RlaifError, StageError
from .files import SUMS, damaged, fsync, sha256, write_sums
from .model.memory import out_of_memory
from .progress import say

APART = ("cache", "checkpoint")  # folders of a stage that are checked on their own
MARKS = ("begun.json", "done.json", SUMS)


def seal(run: Path, name: str, outputs: list[Path]) -> str:
    """Make what a stage left durable and list its digests -> the digest of the list, for `done.json`."""
    for path in outputs:
        fsync(path)
    for folder in {path.parent for path in outputs}:
        fsync(folder)
    write_sums(run / name / SUMS, outputs, run)
    return sha256(run / name / SUMS)


def left_by(folder: Path) -> list[Path]:
    """The files in a stage's folder that its results consist of."""
    found = []
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.is_dir() and path.name not in APART:
            found += [inner for inner in path.rglob("*") if inner.is_file()]
        elif path.is_file() and path.name not in MARKS:
            found.append(path)
    return found


def check(run: Path, name: str, done: dict, metrics: dict[str, str]) -> None:
    """Raises StageError where a file of a finished stage is not what the stage wrote; `metrics`: digests of the log."""
    sums = run / name / SUMS
    sound = sums.is_file() and sha256(sums) == done["files"]
    bad = damaged(sums, run) if sound else [sums]
    if metrics.get(name) != done["metrics"]:
        bad.append(run / "metrics.jsonl")
    if bad:
        shown = "\n  ".join(map(str, bad[:10])) + (f"\n  and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise StageError(
            f"The stage `{name}` is done, but {len(bad)} of its files are missing or damaged: their content is not "
            f"what the stage wrote.\n  {shown}\nPut them back, or delete the folder {run / name} and run again: then "
            "this stage runs again, and later stages are kept where nothing changed for them."
        )


# --------------------------------------------------------------------------------------------------------- one process


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the run folder: two runs in one folder would overwrite each other's checkpoints.

    Where the file system has no locks, a file with the name of this process holds it, and a message says so."""
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(
                f"Another run is going on in {folder}. Wait for it, or set `output` to another folder."
            ) from error
        except OSError as error:
            say(
                f"{folder}: this file system has no locks ({error.strerror}); the file {folder / '.lock.pid'} is used "
                f"instead"
            )
            with _lock_file(folder / ".lock.pid"):
                yield
            return
        yield


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    own = f"{socket.gethostname()} {os.getpid()}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        held = path.read_text(encoding="utf-8")
        host, _, pid = held.partition(" ")
        if host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink()  # of a killed process
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        else:
            raise StageError(
                f"Another run is going on in {path.parent}, as {path} says (host and process: {held or 'not known'}). "
                "Wait for it. If that process is gone, delete the file."
            ) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(own)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------- what is no defect

FAULTS = {
    errno.ENOSPC: ("no space is left on the disk", "Free some space"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space"),
    errno.EROFS: ("the file system is read-only", "Make it writable, or set `output` to another folder"),
    errno.EFBIG: ("a file would be larger than the limit here", "Raise the limit (`ulimit -f`)"),
    errno.EACCES: ("permission is denied", "Set the permissions, or set `output` to another folder"),
    errno.EPERM: ("the operation is not permitted", "Set the permissions, or set `output` to another folder"),
    errno.EIO: ("the disk reports an input/output error", "Check the disk"),
    errno.EMFILE: ("too many files are open", "Raise the limit (`ulimit -n`)"),
    errno.ENOMEM: ("memory ran out", "Free some memory, or use smaller batches"),
}


def fault_of(error: BaseException) -> tuple[str, str] | None:
    """(what is wrong with the environment, what to do), or None for an error that is not the environment's."""
    if out_of_memory(error):
        return FAULTS[errno.ENOMEM]
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors' own exceptions
        number = int(found[1])
    if number not in FAULTS:
        return None
    what, do = FAULTS[number]
    path = getattr(error, "filename", None)
    return f"{what}{f' ({path})' if path else ''}", do


@contextmanager
def explained(folder: Path, where: Callable[[], str], done: Callable[[], list[str]]) -> Iterator[None]:
    """Turns an error of the environment (disk full, read-only, no memory) into one message that says what is kept."""
    try:
        yield
    except RlaifError:
        raise
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            raise
        kept = f"the stages {', '.join(done())}, and" if done() else "what was finished, with"
        raise StageError(
            f"{where()}: {fault[0]}, so the run stopped. Kept in {folder}: {kept} the last checkpoint of the stage "
            f"that was running. {fault[1]}, then run the same command again: it resumes there."
        ) from error
