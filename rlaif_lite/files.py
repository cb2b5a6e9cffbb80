"""Files of a run: one atomic and durable writer, JSON lines that a killed stage resumes from, and digests.

`atomic` is the only way to a file of a run. A kill or a full disk leaves the old file or the new one, never half of
one, and what is in place after a return survives a power cut. What is being written has a hidden name that ends in
`.tmp`; `clean` removes what a killed run left of that.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import ranks
from .errors import StageError
from .progress import say

SUMS = "files.sha256"  # digests of a folder's files, as `sha256sum -c` reads them
AHEAD = 4  # batches

# ------------------------------------------------------------------------------------------------------ atomic writes


@contextlib.contextmanager
def atomic(path: Path | str, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` for a file or a folder. It becomes `path` when the block ends well. Of several
    ranks, rank 0 alone may ask for one.

    A folder replaces the whole old folder. `durable=False` leaves the sync to the caller (see `sync`): for many small
    files that are checked together later."""
    path = Path(path)
    assert ranks.is_first(), f"rank {ranks.rank()} is about to write {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(tmp)
    try:
        yield tmp
        if durable:
            sync(tmp)
        if path.is_dir():  # a folder cannot be renamed onto one that has files
            old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            remove(old)
            os.replace(path, old)
            os.replace(tmp, path)
            remove(old)
        else:
            os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(tmp)
        raise
    if durable:
        fsync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
    fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed writers left anywhere in `folder`.

    What a living process writes stays, and so does what is younger than `older_than` seconds."""
    for left in [*folder.rglob(".*.tmp"), *folder.rglob(".tmp*")]:  # the second kind is safetensors'
        writer = left.name.split(".")[-2]
        if writer.isdigit() and int(writer) != os.getpid() and Path(f"/proc/{writer}").exists():
            continue
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= older_than:
                remove(left)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with line ends as they are. All ranks call this; rank 0 writes, and the others go on
    when it is written."""

    def write() -> None:
        with atomic(path) as tmp:
            tmp.write_bytes(text.encode())

    ranks.first(write)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises StageError for a file that is not there or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise StageError(
            f"{path} {what}. Delete the folder {path.parent} and run again: its stage starts over."
        ) from None


def write_sealed(path: Path, value: dict) -> None:
    """Write a JSON object atomically, with a digest of itself."""
    write_json(path, value | {"sha256": digest_of(value, 64)})


def read_sealed(path: Path) -> dict | None:
    """An object that `write_sealed` wrote; None where there is none. Raises StageError when it is damaged."""
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("sha256", None) != digest_of(value, 64):
        raise StageError(
            f"{path} is damaged: its content does not match its checksum. Delete the folder {path.parent} and run "
            "again: its stage starts over, and later stages are kept where nothing changed."
        )
    return value


def digest_of(value: Any, digits: int = 16) -> str:
    """The first hexadecimal digits (64 are all) of the SHA-256 of a value as JSON, its keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


# ---------------------------------------------------------------------------------------------------------- JSON lines


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write JSON lines atomically."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_jsonl(path: Path) -> list[Any]:
    """Every line of a file; one that a kill cut short is left out."""
    return [json.loads(line) for line in whole_lines(path) if line != "\n"]


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, with their ends, but for one that a kill cut short; none where there is no file."""
    # Not splitlines(): an answer may hold U+2028 and the like, which are line ends to Python and not to JSON lines.
    text = path.read_bytes().decode() if path.exists() else ""
    return [line + "\n" for line in text.split("\n")[:-1]]


@contextlib.contextmanager
def appending(path: Path, lines: list[str]) -> Iterator[Callable[[Any], str]]:
    """A function that appends a value as a line and returns the line. `lines`: the first lines of the file, which stay;
    what comes after them, such as a line cut short by a kill, goes first. On ranks other than 0 nothing is written."""
    if not ranks.is_first():
        yield lambda value: json.dumps(value) + "\n"
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(sum(len(line.encode()) for line in lines))

        def append(value: Any) -> str:
            line = json.dumps(value) + "\n"
            file.write(line.encode())
            file.flush()
            return line

        yield append
        os.fsync(file.fileno())


def by_batches(
    path: Path, batches: list, work: Callable[[Any], list], done: Callable[[int], None] = lambda n: None
) -> list:
    """Map `work` over `batches`, one JSON line per batch in `path`; batches whose line is there already are not redone.

    A line is `{"items": batch size, "results": [...], "crc32": ...}`. From the first line on that is cut short, damaged
    or of another batch size, the batches are done again. Returns the concatenated results, read back from the file, so
    that a resumed stage and an uninterrupted one hold the very same objects.

    Of several ranks each does whole batches, so a line has the same bytes whoever made it. A rank does AHEAD of them
    before it waits for the others, as batches differ in length; a kill costs as many."""
    lines, results = ranks.first(lambda: whole_lines(path)), []
    for number, (line, batch) in enumerate(zip(lines, batches, strict=False)):
        try:
            found = json.loads(line)
            sound = found.pop("crc32") == _crc(found) and found["items"] == len(batch)
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            say(f"{path}: line {number + 1} is damaged or of another batch size; it and what follows is made again")
            break
        results.append(found["results"])
    with appending(path, lines[: len(results)]) as append:
        for batch in batches[: len(results)]:
            done(len(batch))
        for some in chunks(batches[len(results) :], AHEAD * ranks.count() if ranks.count() > 1 else 1):
            for batch, found in zip(some, ranks.spread(some, lambda own: list(map(work, own))), strict=True):
                value = {"items": len(batch), "results": found}  # an item may have several results
                line = append(value | {"crc32": _crc(value)})
                results.append(json.loads(line)["results"])
                done(len(batch))
    return [item for found in results for item in found]


def _crc(value: dict) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def chunks(items: list, size: int) -> list[list]:
    """`items` in lists of `size`; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def even_chunks(items: list, fits: int) -> list[list]:
    """`items` in lists for `by_batches`, where `fits` items are worked on at once: of as many to four times as many, so
    that slots are refilled. There are 12 lists or a multiple of that where the items suffice, so 2, 3, 4 or 6 ranks
    share them evenly. How many ranks there are changes nothing."""
    fits, total = max(1, fits), len(items)
    count = max(1, min(12 * math.ceil(total / (12 * 4 * fits)), total // fits))
    ends = [total * number // count for number in range(count + 1)]
    return [items[begin:end] for begin, end in pairwise(ends) if begin < end]


# ------------------------------------------------------------------------------------------------------------- digests


def file_digest(path: Path | str) -> str:
    """The first 16 hex digits of a file's sha256: enough to tell versions apart."""
    return sha256(path)[:16]


def sha256(path: Path | str) -> str:
    """The 64 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(path: Path, files: Iterable[Path], root: Path) -> None:
    """Write the digests of `files` into `path`, named from `root`, in the format that `sha256sum -c` checks."""
    lines = [f"{sha256(file)}  {os.path.relpath(file, root)}\n" for file in sorted(files)]
    write_text(path, "".join(lines))


def damaged(path: Path, root: Path) -> list[Path]:
    """The files listed in `path` (by `write_sums`) that are gone or not what they were."""
    out = []
    for line in whole_lines(path):
        digest, _, name = line.rstrip("\n").partition("  ")
        file = root / name
        if not file.is_file() or sha256(file) != digest:
            out.append(file)
    return out
