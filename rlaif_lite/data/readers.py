"""Reads the data files people have into Records, says which format it found, and names what is wrong by file and index.

Formats, told apart by the keys of the first record; every other record must then have the same format:

    record                our own JSON lines (records.to_json)
    vlm-rlaif-sft         `conversations` and `images`, the frames of one video in order (SFT_short, SFT_long, PPO_init)
    vlm-rlaif-preference  the same with `output_1`, `output_2` and `preference` (RM_13b_v1_dataset_39k)
    vlm-rlaif-rl          the same with `uid` (RL_data); as in the release, only the first two turns are used
    llava                 `conversations` and `image` or `video`, or neither (text alone)
    sharegpt              `conversations` and `videos` with one entry, `system`, `chosen` and `rejected` where given
    trl-messages          `messages`, the video in `video` or `videos` or inside the content
    trl-preference        `prompt`, `chosen`, `rejected`, as texts or as lists of messages
    trl-prompt            `prompt` alone or with `completion`

Turns may be spelled {from, value} or {role, content} or any mix of the two, with "human" and "gpt" (or "llm") or "user"
and "assistant": the release documents one spelling and reads the other. `<image>` marks a video where `images` holds it,
and is put before the text of its turn wherever it stood, as the release does.

Departure from the release: an index never joins two lists. Each Record carries its prompt, its video and its source.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .records import VIDEO_MARK, Message, Record, check, from_json, texts

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", ".3gp", ".m4v", ".flv", ".ts", ".mpg", ".mpeg", ".wmv")
SPELLINGS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "llm": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Read(NamedTuple):
    """What one data file held."""

    records: list[Record]
    format: str  # one of the names in the module docstring
    path: str
    share: float = 1.0  # of the file that was read


def read_records(
    path: str | os.PathLike, *, video_root: str | os.PathLike | None = None, limit: int | None = None
) -> Read:
    """Read a `.json` (a list) or `.jsonl` file. Relative video names are sought in `video_root`, then beside the file.
    `limit`: no more than the first so many records.

    Raises DataError naming the file, the index of the record (from 0) and what is wrong with it.
    """
    path = Path(path)
    look = _Videos([str(video_root)] if video_root else [], str(path.parent))
    records, format = [], ""
    for index, found, share in objects_of(path):
        if index == limit:
            break
        source, place = f"{path.name}#{index}", f"{path}, record {index}"
        if not isinstance(found, dict):
            raise DataError(f"{place}: expected an object, found {type(found).__name__}.")
        this = detect(found)
        format = format or this
        if not this:
            raise DataError(f"{place}: the keys {sorted(found)} fit no format. Known: {', '.join(_PARSERS)}.")
        if this != format:
            raise DataError(f"{place}: it looks like {this}, the records before like {format}; one file, one format.")
        try:
            record = check(_PARSERS[format](found, source))
        except DataError as error:
            raise DataError(f"{place}: {str(error).removeprefix(source + ': ')}") from None
        records.append(replace(record, video=look.resolve(record.video)))
    if not records:
        raise DataError(f"{path}: it holds no records.")
    log.info("%s: %d records, format %s", path, len(records), format)
    return Read(records, format, str(path), share)


def detect(found: dict) -> str:
    """The format of one JSON object by its keys; "" when none fits."""
    keys = found.keys()
    if "conversations" in keys:
        if {"output_1", "output_2", "preference"} & keys:
            return "vlm-rlaif-preference"
        if "videos" in keys or "chosen" in keys:
            return "sharegpt"
        if "images" in keys:
            return "vlm-rlaif-rl" if "uid" in keys else "vlm-rlaif-sft"
        return "llava"
    if "messages" in keys:
        return "record" if _is_ours(found) else "trl-messages"
    if "prompt" in keys:
        return "trl-preference" if {"chosen", "rejected"} & keys else "trl-prompt"
    return ""


def split_by_answer_length(records: list[Record], max_easy_words: int) -> tuple[list[Record], list[Record]]:
    """The curriculum of VLM-RLAIF: (easy, hard) by the words of the answer; easy has at most `max_easy_words`."""
    easy, hard = [], []
    for record in records:
        if record.answer is None:
            raise DataError(f"{record.source}: it has no answer, so it is neither easy nor hard; SFT needs answers.")
        (easy if len(record.answer.split()) <= max_easy_words else hard).append(record)
    return easy, hard


def with_videos(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Split `records` into those whose video (every frame of it) is on the disk and those where it is not."""
    names = lru_cache(maxsize=None)(_names_in)

    def there(path: str) -> bool:
        folder, name = os.path.split(os.path.normpath(path))
        return name in names(folder or ".")

    @cache
    def complete(video: str | tuple[str, ...] | None) -> bool:
        return video is None or all(there(path) for path in (video if isinstance(video, tuple) else (video,)))

    kept, missing = [], []
    for record in records:
        (kept if complete(record.video) else missing).append(record)
    return kept, missing


def check_videos(records: list[Record]) -> list[Record]:
    """The records whose video, or any frame of it, is not on the disk."""
    return with_videos(records)[1]


# ---- the file


def objects_of(path: Path) -> Iterator[tuple[int, object, float]]:
    """(index, decoded object, share of the file read by then), one at a time: a released file of 700 MB is never held
    as a tree of Python objects."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not UTF-8 text ({error}).") from None
    decoder, at, index = json.JSONDecoder(), _skip(text, 0), 0
    is_list = text[at : at + 1] == "["
    at = _skip(text, at + 1) if is_list else at
    while at < len(text) and not (is_list and text[at] == "]"):
        try:
            found, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, record {index}, line {error.lineno}: it is not JSON ({error.msg}).") from None
        yield index, found, at / len(text)
        index, at = index + 1, _skip(text, at)
        if is_list and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif is_list and text[at : at + 1] != "]":
            raise DataError(f"{path}: the list breaks off after record {index - 1}; the file is cut short or damaged.")
    if is_list and at >= len(text):
        raise DataError(f"{path}: the list breaks off after record {index - 1}; the file is cut short or damaged.")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _names_in(folder: str) -> set[str]:
    """Names in `folder`; one listing serves all frames in it. A folder counts only if something is in it."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_dir() or os.listdir(entry.path)}
    except OSError:
        return set()


class _Videos:
    """Turns the name of a video in a data file into a path. Equal names give one object: records share videos."""

    def __init__(self, roots: list[str], beside: str):
        self.roots = [*roots, beside]
        self.known: dict[str | tuple[str, ...], str | tuple[str, ...]] = {}

    def resolve(self, video: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        """Absolute names stay. A name not found becomes a path below the first root, for the list of missing videos."""
        if video is None:
            return None
        if video not in self.known:
            if isinstance(video, tuple):
                first = self._find(video[0], [video[0]])
                root = first.removesuffix(video[0])
                self.known[video] = tuple(os.path.join(root, frame) for frame in video)
            else:
                self.known[video] = self._find(video, self._spellings(video))
        return self.known[video]

    def _spellings(self, name: str) -> list[str]:
        """`name`, then (ActivityNet style) a folder of frames or a file of a known suffix, with and without `v_`."""
        stem, suffix = os.path.splitext(name)
        stem = stem if suffix.lower() in SUFFIXES else name
        folder, base = os.path.split(stem)
        stems = [stem, os.path.join(folder, base[2:] if base.startswith("v_") else "v_" + base)]
        return [name, *(stem + end for stem in stems for end in ("", *SUFFIXES))]

    def _find(self, name: str, spellings: list[str]) -> str:
        for root in self.roots:
            for spelling in spellings:
                path = os.path.join(root, spelling)
                if os.path.exists(path):
                    return path
        return os.path.join(self.roots[0], name)


# ---- the formats


def _is_ours(found: dict) -> bool:
    """Turns with plain texts and an id, beside a `video` or with our keys alone. A misspelt key is then said."""
    turns = found["messages"]
    plain = isinstance(turns, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in turns)
    return plain and "id" in found and ("video" in found or found.keys() <= {field.name for field in fields(Record)})


def _text(found, source: str, what: str) -> str:
    """The text of an answer given as a text, as one turn, or as a list of one turn."""
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, dict):
        found = _turn(found, source, what).content
    if not isinstance(found, str):
        raise DataError(f"{source}: {what} is {found!r}, expected a text or one turn.")
    return found


def _turn(found, source: str, what: str) -> Message:
    """One turn in any spelling; typed parts ({"type": "text"}, {"type": "video"}) become text with marks."""
    if not isinstance(found, dict):
        raise DataError(f"{source}: {what} is {found!r}, expected {{from, value}} or {{role, content}}.")
    role = found.get("from", found.get("role"))
    content = found.get("value", found.get("content"))
    if role not in SPELLINGS:
        raise DataError(f"{source}: {what} is from {role!r}; expected one of {', '.join(SPELLINGS)}.")
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "video", "image"):
                raise DataError(f"{source}: {what} has a part {part!r}; expected the type text, video or image.")
            parts.append(str(part.get("text")) if kind == "text" else VIDEO_MARK)
        content = "".join(parts)
    if not isinstance(content, str):
        raise DataError(f"{source}: {what} has no text (`value` or `content` is {content!r}).")
    return Message(SPELLINGS[role], content)


def _turns(found, source: str, key: str) -> list[Message]:
    if isinstance(found, str):
        return [Message("user", found)]
    if not isinstance(found, list) or not found:
        raise DataError(f"{source}: `{key}` is {found!r}, expected a list of turns.")
    return [_turn(turn, source, f"`{key}` turn {i}") for i, turn in enumerate(found)]


def _frames(found: dict, source: str) -> tuple[str, ...]:
    images = found["images"]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(frame, str) and frame for frame in images):
        raise DataError(f"{source}: `images` is not a list of frame paths.")
    return tuple(images)


def _one_video(found: dict, source: str) -> str | tuple[str, ...] | None:
    """The video of a LLaVA, ShareGPT or TRL record: `video`, `videos`, `images` (frames of one video) or `image`."""
    if found.get("images"):
        return _frames(found, source)
    if found.get("image") is not None:
        return (str(found["image"]),)
    video = found.get("video")
    if found.get("videos"):
        videos = found["videos"] if isinstance(found["videos"], list) else [found["videos"]]
        if len(videos) != 1:
            raise DataError(f"{source}: `videos` has {len(videos)} entries; a record has one video.")
        video = videos[0]
    if isinstance(video, list) and video and all(isinstance(frame, str) for frame in video):
        return tuple(video)
    if video is not None and (not isinstance(video, str) or not video):
        raise DataError(f"{source}: its video is {video!r}, expected a path or a list of frame paths.")
    return video


def _marked(text: str) -> str:
    """`<image>` becomes `<video>` on a line of its own before the rest, wherever it stood, as LLaVA and the release
    read their files."""
    if text.count("<image>") != 1:
        return text.replace("<image>", VIDEO_MARK)
    return f"{VIDEO_MARK}\n{text.replace('<image>', '').strip()}".strip()


def _record(found: dict, source: str, turns: list[Message], video, chosen=None, rejected=None) -> Record:
    """Put the parts together; a mark that is missing is set before the first question."""
    turns = [Message(m.role, _marked(m.content) if m.role == "user" else m.content) for m in turns]
    first = next((i for i, m in enumerate(turns) if m.role == "user"), None)
    if video is not None and first is not None and not any(VIDEO_MARK in m.content for m in turns):
        turns[first] = Message("user", f"{VIDEO_MARK}\n{turns[first].content}")
    name = next((str(found[key]) for key in ("id", "uid", "question_id") if found.get(key) is not None), source)
    extras = {key: found[key] for key in ("caption_type", "length_bonus") if found.get(key) is not None}
    if strange := [key for key, value in extras.items() if type(value) not in (int, float)]:
        raise DataError(f"{source}: `{strange[0]}` is {found[strange[0]]!r}, expected a number.")
    captions = texts(found.get("captions"), f"{source}: `captions`")
    return Record(name, video, tuple(turns), chosen, rejected, source=source, captions=captions, **extras)


def _sft(found: dict, source: str) -> Record:
    return _record(found, source, _turns(found["conversations"], source, "conversations"), _frames(found, source))


def _rl(found: dict, source: str) -> Record:
    return _record(found, source, _turns(found["conversations"], source, "conversations")[:2], _frames(found, source))


def _rlaif_preference(found: dict, source: str) -> Record:
    for key in ("output_1", "output_2", "preference"):
        if key not in found:
            raise DataError(f"{source}: `{key}` is missing.")
    outputs = [_text(found[key], source, f"`{key}`") for key in ("output_1", "output_2")]
    if str(found["preference"]) not in ("1", "2"):
        raise DataError(f"{source}: `preference` is {found['preference']!r}, expected 1 or 2.")
    turns = _turns(found["conversations"], source, "conversations")
    # The last answer in the file is a stand-in which the release overwrites by either output.
    turns = turns[:-1] if turns[-1].role == "assistant" else turns
    better = int(found["preference"]) - 1
    video = _frames(found, source) if "images" in found else _one_video(found, source)
    return _record(found, source, turns, video, outputs[better], outputs[1 - better])


def _conversation(found: dict, source: str, key: str) -> Record:
    turns = _turns(found[key], source, key)
    if found.get("system"):
        turns.insert(0, Message("system", str(found["system"])))
    answers = [_text(found[k], source, f"`{k}`") if k in found else None for k in ("chosen", "rejected")]
    return _record(found, source, turns, _one_video(found, source), *answers)


def _llava(found: dict, source: str) -> Record:
    return _conversation(found, source, "conversations")


def _trl_messages(found: dict, source: str) -> Record:
    return _conversation(found, source, "messages")


def _trl_prompt(found: dict, source: str) -> Record:
    if "chosen" in found or "rejected" in found:
        for key in ("chosen", "rejected"):
            if key not in found:
                raise DataError(f"{source}: `{key}` is missing.")
        return _conversation(found, source, "prompt")
    turns = _turns(found["prompt"], source, "prompt")
    if found.get("completion") is not None:
        turns.append(Message("assistant", _text(found["completion"], source, "`completion`")))
    return _record(found, source, turns, _one_video(found, source))


_PARSERS = {
    "record": from_json,
    "vlm-rlaif-sft": _sft,
    "vlm-rlaif-preference": _rlaif_preference,
    "vlm-rlaif-rl": _rl,
    "llava": _llava,
    "sharegpt": _llava,
    "trl-messages": _trl_messages,
    "trl-preference": _trl_prompt,
    "trl-prompt": _trl_prompt,
}
