"""Data files as plain objects, one at a time: JSON, JSON lines, CSV, parquet, and folders of Hugging Face `datasets`.

Nothing here knows what the objects mean; `formats` does. A file that is cut short, joined from two, or says one key
twice is refused with the place, because each of these silently loses records or words.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError

TABLES = (".parquet", ".arrow")
LISTS = ("messages", "conversations", "videos", "images", "history", "options")  # columns of a CSV that may hold JSON


def objects_of(path: Path) -> Iterator[tuple[int, object, float]]:
    """(index, decoded object, share of the file read by then) of a file or folder.

    A released file of 700 MB is never held as a tree of Python objects. Raises DataError with file, record and reason.
    """
    if path.is_dir():
        yield from _rows(files_of(path))
    elif path.exists() and not path.is_file():
        raise DataError(f"{path}: it is not a regular file. Give a JSON, JSON lines, CSV or parquet file.")
    elif path.suffix.lower() in TABLES:
        yield from _rows([path])
    elif path.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(path)
    else:
        yield from _json_objects(path)


def files_of(path: Path) -> list[Path]:
    """The files that a data path stands for: itself, or the tables of one split in a folder of `datasets`."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise DataError(f"{path}: it holds the splits {', '.join(splits)}. Name one, such as {path / splits[0]}.")
    found = sorted(file for suffix in TABLES for file in (*path.glob(f"*{suffix}"), *path.glob(f"data/*{suffix}")))
    if not found:
        raise DataError(f"{path}: the folder holds no parquet or arrow file. Give a data file, or a `datasets` folder.")
    if len(splits := sorted({file.name.partition("-")[0].partition(".")[0] for file in found})) > 1:
        raise DataError(f"{path}: its files are of several splits ({', '.join(splits)}). Name the files of one.")
    return found


# ---- JSON


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not UTF-8 text ({error}).") from None


def _json_objects(path: Path) -> Iterator[tuple[int, object, float]]:
    text = _text_of(path)
    decoder = json.JSONDecoder(object_pairs_hook=_no_key_twice)
    at, index = _skip(text, 0), 0
    is_list = text[at : at + 1] == "["
    at = _skip(text, at + 1) if is_list else at
    while at < len(text) and not (is_list and text[at] == "]"):
        try:
            found, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, record {index}, line {error.lineno}: it is not JSON ({error.msg}).") from None
        except RecursionError:
            raise DataError(f"{path}, record {index}: its brackets are nested too deeply to be a record.") from None
        except ValueError as error:  # a key twice; a number of thousands of digits
            raise DataError(f"{path}, record {index}: {error}.") from None
        yield index, found, at / len(text)
        index, at = index + 1, _skip(text, at)
        if is_list and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif is_list and text[at : at + 1] != "]":
            raise DataError(f"{path}: the list breaks off after record {index - 1}; the file is cut short or damaged.")
    if is_list and at >= len(text):
        raise DataError(f"{path}: the list breaks off after record {index - 1}; the file is cut short or damaged.")
    if is_list and (rest := _skip(text, at + 1)) < len(text):
        raise DataError(
            f"{path}: the file goes on after its list ended with record {index - 1}: {text[rest : rest + 40]!r}. "
            "Two files joined are no JSON: name each file by itself in the recipe."
        )


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` is there twice in one object")
    return found


# ---- tables


def _csv_rows(path: Path) -> Iterator[tuple[int, object, float]]:
    text = _text_of(path)
    reader = csv.DictReader(
        text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path}: its header names a column twice: {', '.join(names)}.")
        total = max(1, text.count("\n"))
        for index, row in enumerate(reader):
            if None in row or None in row.values():
                raise DataError(f"{path}, record {index}, line {reader.line_num}: the header has {len(names)} columns.")
            cells = {name: _cell(name, cell, f"{path}, record {index}") for name, cell in row.items() if cell != ""}
            yield index, cells, min(1.0, reader.line_num / total)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: it is not CSV ({error}).") from None


def _cell(name: str, cell: str, place: str) -> object:
    if name not in LISTS or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: the cell `{name}` begins as a list but is not JSON: {cell[:80]!r}.") from None


def _rows(paths: list[Path]) -> Iterator[tuple[int, object, float]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{paths[0]}: reading it needs pyarrow. Install it with `pip install rlaif-lite[parquet]`."
        ) from None
    index = 0
    for number, path in enumerate(paths):
        try:
            if path.suffix.lower() == ".parquet":
                batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
            else:
                batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            for batch in batches:
                for row in batch.to_pylist():
                    yield index, row, (number + 1) / len(paths)
                    index += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: it cannot be read as {path.suffix[1:]} ({str(error)[:200]}).") from None
