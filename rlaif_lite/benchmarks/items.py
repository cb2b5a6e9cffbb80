"""What a benchmark asks: items read from the authors' files, and the videos or pictures that they are about.

Every reader of this package goes through `entries`, so that a file in another shape is refused with what was found,
where, and what was expected.
"""

import csv
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data.readers import SUFFIXES, objects_of
from ..errors import DataError
from ..video.decode import IMAGES


class Objects(NamedTuple):
    """What may be named in the answer to one item."""

    present: dict[str, frozenset[str]]
    "word or words -> the objects in the picture that they name: `person` may name a man and a child"
    traps: dict[str, frozenset[str]]
    "word or words -> objects that are not in the picture, and that models are likely to invent there"
    vocabulary: frozenset[str]  # all that counts as an object; shared by the items of a benchmark
    harmless: frozenset[str]  # words of the vocabulary that never count as invented


class Item(NamedTuple):
    """One thing that a benchmark asks."""

    id: str  # unique within the benchmark
    video: str  # as the file names it, with or without folder and extension
    questions: tuple[str, ...]  # one; two wordings of it for consistency
    reference: str  # the right answer; a caption or class for rankings; empty where there is none
    group: str = ""  # results are also given for each group: a type of question, say
    context: str | None = None  # what the picture shows in words, for judges that may know it
    objects: Objects | None = None
    among: tuple[str, ...] = ()  # the texts of which `reference` is the right one, where texts are ranked for the video
    picture: str | None = None  # the picture itself, base64, where the file holds it
    each_video: tuple[str, ...] = ()  # of each question, where they are about several videos
    span: tuple[float, float] | None = None  # seconds from where to where the video is shown; None: all of it

    @property
    def videos(self) -> tuple[str, ...]:
        """The video of each question; one where there is no question."""
        return self.each_video or (self.video,) * max(1, len(self.questions))


Tally = dict[str, tuple[float, float]]
"""What one answer adds to each metric: (part, whole). A metric is the sum of the parts over the sum of the wholes."""


# ---- reading


def entries(path: Path, format: str, *keys: str) -> list[dict]:
    """The objects of a JSON list, of JSON lines or of one JSON object, each with all of `keys`.

    Raises DataError naming the file, the entry (from 0), the keys found and the format expected."""
    found = []
    for index, entry, _ in objects_of(path):
        if not isinstance(entry, dict):
            raise DataError(f"{path}, entry {index}: found a {type(entry).__name__}, expected {format}.")
        if missing := [key for key in keys if key not in entry]:
            shown = ", ".join(map(str, list(entry)[:8]))
            raise DataError(
                f"{path}, entry {index}: found the keys {shown}; no {', '.join(missing)}. Expected {format}."
            )
        found.append(entry)
    if not found:
        raise DataError(f"{path}: it holds no entries. Expected {format}.")
    return found


def placed(path: Path, format: str, *keys: str) -> list[tuple[str, dict]]:
    """(where it is, for messages; the entry) of all `entries`."""
    return [(f"{path}, entry {index}", entry) for index, entry in enumerate(entries(path, format, *keys))]


def text(entry: dict, key: str, place: str) -> str:
    """A text or a number as text. Raises DataError for anything else, and for an empty text."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise DataError(f"{place}: `{key}` is {value!r}, expected a text.")
    found = str(value).strip()
    if not found.isascii() and any("\ud800" <= letter <= "\udfff" for letter in found):
        raise DataError(f"{place}: `{key}` is {found!r} with half a surrogate pair, which is no text. Repair the file.")
    return found


def one_of(entry: dict, key: str, place: str, *allowed: str) -> str:
    """One of a few texts, in any case and with a full stop or without. Raises DataError for anything else."""
    found = text(entry, key, place)
    for value in allowed:
        if found.lower().rstrip(".") == value.lower():
            return value
    raise DataError(f"{place}: `{key}` is {found!r}, expected {', '.join(allowed[:-1])} or {allowed[-1]}.")


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, separated by commas or tabs, by their column names. Raises DataError for what is none."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            return list(csv.DictReader(file, delimiter="\t" if "\t" in header else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: it cannot be read as CSV ({error}).") from None


def rows_of(path: Path, format: str) -> list[dict[str, str]]:
    """`csv_rows` of a file that has some, each with every column. Raises DataError."""
    found = csv_rows(path)
    if not found:
        raise DataError(f"{path}: it holds no rows. Expected {format}.")
    for number, row in enumerate(found, 2):
        if None in row or None in row.values():
            raise DataError(f"{path}, line {number}: its columns are not those of the first line. Expected {format}.")
    return found


def texts(entry: dict, key: str, place: str) -> list[str]:
    """A list of texts. Raises DataError for anything else."""
    value = entry.get(key)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise DataError(f"{place}: `{key}` is {value!r}, expected a list of texts.")
    return value


def lines_of(path: Path) -> list[str]:
    """Lines of a text that are not empty, stripped. Raises DataError where it is no text."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read as text ({error}).") from None
    return [line for line in lines if line]


def one_file(paths: list[Path], format: str) -> Path:
    """Raises DataError unless there is exactly one."""
    if len(paths) != 1:
        raise DataError(f"{len(paths)} files were given ({', '.join(map(str, paths))}), expected one: {format}.")
    return paths[0]


def unique(items: Iterable[Item]) -> list[Item]:
    """The items, with a number added to an id that came before: some files repeat theirs."""
    seen: dict[str, int] = {}
    out = []
    for item in items:
        seen[item.id] = count = seen.get(item.id, 0) + 1
        out.append(item if count == 1 else item._replace(id=f"{item.id}#{count}"))
    return out


# ---- videos


def find_videos(names: Iterable[str], root: Path) -> tuple[dict[str, str], list[str]]:
    """({name: path}, names without a video) below `root`: a file of any extension, or a folder of frames.

    A name is sought as a path below `root`, then by itself anywhere below it, with and without ActivityNet's `v_`.
    Raises DataError for a root that is no folder, and where two files fit one name.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root} with videos. Paths start at {Path.cwd()}.")
    places: dict[str, list[str]] = {}
    for folder, inside, files in os.walk(root):
        for name in inside:
            places.setdefault(name, []).append(os.path.join(folder, name))
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (*SUFFIXES, *IMAGES):
                places.setdefault(stem, []).append(os.path.join(folder, name))
    found, missing = {}, []
    for name in dict.fromkeys(names):
        path = _find(name, root, places)
        if path is None:
            missing.append(name)
        else:
            found[name] = path
    return found, missing


def _find(name: str, root: Path, places: dict[str, list[str]]) -> str | None:
    if (root / name).is_file():
        return str(root / name)
    stem, suffix = os.path.splitext(os.path.basename(name))
    stem = stem if suffix.lower() in (*SUFFIXES, *IMAGES) else os.path.basename(name)
    numbered = (f"video{stem}", f"vid{stem}") if stem.isdecimal() else ()  # MSR-VTT and MSVD give numbers alone
    is_video = lambda path: os.path.isfile(path) or any(file.lower().endswith(IMAGES) for file in os.listdir(path))
    for spelling in (stem, f"v_{stem}", stem.removeprefix("v_"), *numbered):
        fitting = [path for path in places.get(spelling, []) if is_video(path)]
        if len(fitting) > 1:
            raise DataError(
                f"Two videos are called {name}: {fitting[0]} and {fitting[1]}. Give the folder that holds one of them."
            )
        if fitting:
            return fitting[0]
    return None


# ---- answers as words


# Vowel signs and accents are part of the word before them, and no letters to `re`.
MARKS = "".join(chr(code) for code in range(0x300, 0x1E95B) if unicodedata.category(chr(code))[0] == "M")
LETTER = rf"[^\W_]|[{re.escape(MARKS)}]"
# Scripts without spaces: a character is a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
WORD = re.compile(
    rf"[{UNSPACED}]|(?:(?<![^\s(\[=:])[-−])?\d+(?:[.,]\d+)+(?!\w)|(?<![^\s(\[=:])[-−]\d+(?![\w])"
    rf"|(?:(?![{UNSPACED}])(?:{LETTER}))+(?:['-](?:(?![{UNSPACED}])(?:{LETTER}))+)*"
)
THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def words_of(answer: str) -> list[str]:
    """Lower-case words of any script without punctuation; an apostrophe in any form; numbers with sign and fraction.

    A character of Chinese or Japanese is a word."""
    text = unicodedata.normalize("NFKC", answer).lower().replace("’", "'")
    found = (word.replace("−", "-") for word in WORD.findall(text))
    return [word.replace(",", "") if THOUSANDS.fullmatch(word) else word for word in found]


def meant(words: Iterable[str], objects: dict[str, frozenset[str]]) -> set[str]:
    """All that the words name of `objects`."""
    return set().union(*(objects[word] for word in words if word in objects))


def mentions(words: Sequence[str], vocabulary: frozenset[str], nouns: Sequence[bool] | None = None) -> list[str]:
    """The words and runs of words that are in `vocabulary`, longest first, plurals as singulars.

    `nouns`: whether each word is a noun, where only runs that end in one count."""
    longest = max((name.count(" ") + 1 for name in vocabulary), default=1)
    found, at = [], 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            if nouns is not None and not nouns[at + length - 1]:
                continue
            run = words[at : at + length]
            name = next(
                (n for n in (" ".join([*run[:-1], last]) for last in _singulars(run[-1])) if n in vocabulary), None
            )
            if name is not None:
                found.append(name)
                break
        at += length
    return found


def _singulars(word: str) -> list[str]:
    """The word, and what it may be the plural of."""
    ends = (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""))
    return [
        word,
        *(word.removesuffix(end) + new for end, new in ends if word.endswith(end) and len(word) > len(end) + 1),
    ]


def yes_or_no(answer: str) -> bool | None:
    """Whether an answer says yes: by the first of its words that says yes or no, in any form; None: none does."""
    for word in words_of(answer):
        if word in ("yes", "no", "not") or word.endswith("n't"):
            return word == "yes"
    return None
