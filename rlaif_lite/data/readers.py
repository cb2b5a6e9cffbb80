"""Reads the data files people have into Records, says which format it found, and names what is wrong by file and index.

`objects` reads the file, `formats` understands each object, `videos` finds the video on the disk. The records of a file
have one format, told by the keys of the first.

Departure from the release: an index never joins two lists. Each Record carries its prompt, its video and its source.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from . import formats
from .formats.llama_factory import description_of
from .objects import objects_of
from .records import Record, check
from .videos import SUFFIXES, VideoNames, with_videos

log = logging.getLogger(__name__)

__all__ = ["SUFFIXES", "Read", "count_words", "objects_of", "read_records", "split_by_answer_length", "with_videos"]


class Read(NamedTuple):
    """What one data file held."""

    records: list[Record]
    format: str  # one of the names in `formats`
    path: str
    share: float = 1.0  # of the file that was read
    ignored: tuple[str, ...] = ()  # keys that say nothing to a model, and were left out


def read_records(
    path: str | os.PathLike, *, video_root: str | os.PathLike | None = None, limit: int | None = None
) -> Read:
    """Read a data file, or a folder of `datasets`. Relative video names are sought in `video_root`, then beside the
    file. `limit`: at most this many records.

    Raises DataError naming the file, the index of the record (from 0) and what is wrong with it.
    """
    path = Path(path)
    look = VideoNames([*([os.path.expanduser(video_root)] if video_root else []), str(path.parent)])
    described = description_of(path)
    records, format, share, ignored = [], None, 1.0, set()
    for index, found, share in objects_of(path):  # noqa: B007 - the share of the last record read
        if index == limit:
            break
        source, place = f"{path.name}#{index}", f"{path}, record {index}"
        try:
            this, found = _recognise(found, described)
            format = format or this
            if this != format:
                raise DataError(
                    f"it looks like {this.name}, the records before like {format.name}; one file, one format."
                )
            record, left = formats.read_object(format, found, source)
            records.append(replace(check(record), video=look.resolve(record.video)))
            ignored |= left
        except DataError as error:
            said = str(error).removeprefix(f"{source}: ")  # without the middle of a value of thousands of characters
            said = said if len(said) <= 900 else f"{said[:400]} [...] {said[-400:]}"
            raise DataError(f"{place}: {said}") from None
    if not records:
        raise DataError(f"{path}: it holds no records.")
    name = f"{format.name} by {described.place}" if described else format.name
    log.info("%s: %d records, format %s", path, len(records), name)
    return Read(records, name, str(path), share, tuple(sorted(ignored)))


def _recognise(found: object, described) -> tuple[formats.Format, dict]:
    """The format of one object, and the object without keys that hold nothing."""
    if not isinstance(found, dict):
        raise DataError(f"expected an object, found {type(found).__name__}.")
    found = {key: value for key, value in found.items() if value is not None}
    found = described.rename(found) if described else found
    format = formats.detect(found)
    if format is None:
        raise DataError(f"the keys {sorted(found)} fit no format. Known: {formats.names()}. See docs/your_data.md.")
    return format, found


# Scripts that put no blanks between words: Han, kana, Thai, Lao, Burmese, Khmer, Tibetan.
UNSPACED = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\u0e01-\u0e30\u0e32-\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2-\u0eb3\u0ec0-\u0ec6\u1000-\u102a\u1780-\u17b3"
    "\u0f40-\u0f6c\U00020000-\U0003ffff]"
)


def count_words(text: str) -> int:
    """Words of a text in any script: pieces between blanks, and each letter of a script that writes without blanks."""
    unspaced = len(UNSPACED.findall(text))
    if not unspaced:
        return len(text.split())
    rest = UNSPACED.sub(" ", text)
    return unspaced + sum(any(letter.isalnum() for letter in piece) for piece in rest.split())


def answers_of(record: Record, train_on: str) -> list[str]:
    """The answers that SFT trains on: every one of the conversation (`all`), or the last (`last`)."""
    if train_on == "last" or record.verdicts:
        return [record.messages[-1].content]
    return [message.content for message in record.messages if message.role == "assistant"]


def split_by_answer_length(
    records: Iterable[Record], max_easy_words: int, train_on: str = "all"
) -> tuple[list[Record], list[Record]]:
    """The curriculum of VLM-RLAIF: (easy, hard). A record is easy when none of the answers that it is trained on has
    more than `max_easy_words` words."""
    easy, hard = [], []
    for record in records:
        if record.answer is None:
            raise DataError(f"{record.source}: it has no answer, so it is neither easy nor hard; SFT needs answers.")
        longest = max(map(count_words, answers_of(record, train_on)))
        (easy if longest <= max_easy_words else hard).append(record)
    return easy, hard
