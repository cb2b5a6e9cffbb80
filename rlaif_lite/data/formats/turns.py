"""Turns of a conversation, in every spelling: {from, value}, {role, content}, and typed content.

The release documents one spelling and reads the other, so any mix of the two is read: "human" and "gpt" (or "llm"),
or "user" and "assistant". Typed parts become text with marks, and the paths inside them are handed on.
"""

from typing import NamedTuple

from ...errors import DataError
from ..records import VIDEO_MARK, Message
from .media import path_of

SPELLINGS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "llm": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PART_TEXTS = ("text", "value", "content")
# Settings of a model's own processor. Here the recipe's `features` decides how a video is sampled.
SAMPLING = {
    *("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"),
    *("resized_height", "resized_width", "detail"),
}
MEANT = ("loss", "loss_scale", "weight", "tool_calls", "function_call", "images", "image", "videos", "video", "audio")


class Turns(NamedTuple):
    """A conversation, and (kind, path) of each part of typed content that is no text."""

    messages: list[Message]
    inside: list[tuple[str, str]]

    @property
    def marks(self) -> int:
        """How many pictures or videos the text has places for."""
        return sum(m.content.count(mark) for m in self.messages for mark in ("<image>", VIDEO_MARK))


def read_turns(found, key: str) -> Turns:
    """A text (one question) or a list of turns."""
    if isinstance(found, str):
        return Turns([Message("user", found)], [])
    if not isinstance(found, list) or not found:
        raise DataError(f"`{key}` is {_short(found)}, expected a list of turns.")
    inside: list[tuple[str, str]] = []
    return Turns([read_turn(turn, f"`{key}` turn {i}", inside) for i, turn in enumerate(found)], inside)


def read_turn(found, what: str, inside: list[tuple[str, str]]) -> Message:
    """One turn in any spelling; adds the videos of its typed parts to `inside`."""
    if not isinstance(found, dict):
        raise DataError(f"{what} is {_short(found)}, expected {{from, value}} or {{role, content}}.")
    for one, other in (("from", "role"), ("value", "content")):
        if found.get(one) is not None and found.get(other) is not None and found[one] != found[other]:
            raise DataError(f"{what} has both `{one}` and `{other}`, and they differ.")
    role = found["from"] if found.get("from") is not None else found.get("role")
    content = found["value"] if found.get("value") is not None else found.get("content")
    if not isinstance(role, str) or role not in SPELLINGS:
        raise DataError(f"{what} is from {_short(role)}; expected one of {', '.join(SPELLINGS)}.")
    for key in MEANT:
        if found.get(key) not in (None, "", [], True, 1, 1.0):
            raise DataError(
                f"{what} has `{key}`: {_short(found[key])}, which is not understood in a turn. Leave it out."
            )
    if isinstance(content, list):
        content = "".join(_part(part, what, inside) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{what} has no text (`value` or `content` is {_short(content)}).")
    return Message(SPELLINGS[role], content)


def _part(part, what: str, inside: list[tuple[str, str]]) -> str:
    """One part of typed content as text: its words, or a mark."""
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = given.pop("type", None)
    if kind == "text":
        said = [given.pop(key) for key in PART_TEXTS if key in given]
        if len(said) != 1 or not isinstance(said[0], str):
            raise DataError(f"{what} has a text part without its text: {_short(part)}. Put it under `text`.")
        return said[0]
    if kind not in ("video", "image", "video_url", "image_url"):
        raise DataError(f"{what} has a part {_short(part)}; expected the type text, video or image.")
    named = [given.pop(key) for key in (kind, kind.removesuffix("_url"), "path", "url") if key in given]
    if len(named) > 1:
        raise DataError(f"{what} has a part that names two files: {_short(part)}.")
    if unknown := given.keys() - SAMPLING:
        advice = f"{CUT_OUT}" if unknown & TIMES else "Leave it out."
        raise DataError(f"{what} has a {kind} part with `{sorted(unknown)[0]}`, which is not understood. {advice}")
    name = named[0] if named else None
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    inside.append((kind.removesuffix("_url"), path_of(name, kind) if name else ""))
    return VIDEO_MARK


TIMES = {
    *("start", "end", "start_time", "end_time", "video_start", "video_end", "begin", "begin_time", "clip_start"),
    *("clip_end", "start_sec", "end_sec", "video_segment"),
}
CUT_OUT = "A record is about a whole video: cut the part out (ffmpeg -ss START -to END), and leave the times out."


def read_answer(found, what: str) -> str:
    """The text of an answer given as a text, as one turn, or as a list of one turn."""
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, dict):
        found = read_turn(found, what, []).content
    if not isinstance(found, str):
        raise DataError(f"{what} is {_short(found)}, expected a text or one turn.")
    return found


def answers_in(found: dict, *keys: str) -> list[str | None]:
    """The answers under `keys`; None where there is none."""
    return [read_answer(found[key], f"`{key}`") if found.get(key) is not None else None for key in keys]


def read_history(found) -> list[Message]:
    """Earlier rounds as a list of [question, answer]."""
    rounds = [] if found in (None, "") else found
    if not isinstance(rounds, list):
        raise DataError(f"`history` is {_short(found)}, expected a list of [question, answer].")
    messages = []
    for i, each in enumerate(rounds):
        if not isinstance(each, list) or len(each) != 2 or not all(isinstance(text, str) for text in each):
            raise DataError(f"`history` round {i} is {_short(each)}, expected [question, answer].")
        messages += [Message("user", each[0]), Message("assistant", each[1])]
    return messages


def _short(value) -> str:
    """A value for a message, in a length that can be read."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = type(value).__name__
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
