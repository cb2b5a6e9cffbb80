"""Files of a run: JSON lines that a killed stage resumes from, atomic writes, digests."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def by_batches(
    path: Path, batches: list, work: Callable[[Any], list], done: Callable[[int], None] = lambda n: None
) -> list:
    """Map `work` over `batches`, one JSON line per batch in `path`; batches whose line is there already are not redone.

    A line cut short by a kill is dropped. Returns the concatenated results, read back from the file, so that a
    resumed stage and an uninterrupted one hold the very same objects.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _whole_lines(path)
    with open(path, "w" if not lines else "r+", encoding="utf-8") as file:
        file.seek(sum(len(line.encode()) for line in lines))
        file.truncate()
        for _, batch in zip(lines, batches):
            done(len(batch))
        for batch in batches[len(lines) :]:
            line = json.dumps(work(batch)) + "\n"
            file.write(line)
            file.flush()
            lines.append(line)
            done(len(batch))
    return [item for line in lines for item in json.loads(line)]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a kill leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(tmp, path)


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write JSON lines atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    os.replace(tmp, path)


def read_jsonl(path: Path) -> list[Any]:
    # Not splitlines(): an answer may hold U+2028 and the like, which are line ends to Python and not to JSON lines.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
