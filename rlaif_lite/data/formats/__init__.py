"""The formats of data files: which keys tell each from the others, and the function that reads one object of it.

A format is a row of FORMATS and a function of a few lines. Formats are tried in order and the first whose keys are all
there is taken; a file keeps the format of its first record. docs/your_data.md shows an example of each.

Three modules serve all formats: `turns` reads turns and typed content, `media` finds the one video of a record, and
`build` makes the Record. Keys that change what a record means and that nothing here can honour (a label, a start time,
sound, tools) are refused by name; keys that say something about a record (duration, source) are left out and listed.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..records import Record, from_json
from . import conversations, questions
from .build import SHARED, is_ours, refuse_unknown

Parser = Callable[[dict, str], Record]


class Format(NamedTuple):
    """One row of the table; `keys` that are missing mean another format."""

    name: str
    keys: tuple[str, ...]  # all of these are there
    any_of: tuple[str, ...]  # and at least one of these, where some are named
    read: Parser
    uses: tuple[str, ...]  # further keys that the parser reads


RECORD = Format("record", ("messages",), (), from_json, ())
FORMATS = (
    Format(
        "vlm-rlaif-preference",
        ("conversations",),
        ("output_1", "output_2", "preference"),
        conversations.rlaif_preference,
        (),
    ),
    Format("sharegpt", ("conversations",), ("videos", "chosen", "rejected"), conversations.llava, ()),
    Format("vlm-rlaif-rl", ("conversations", "images", "uid"), (), conversations.rlaif, ()),
    Format("vlm-rlaif-sft", ("conversations", "images"), (), conversations.rlaif, ()),
    Format("llava", ("conversations",), (), conversations.llava, ()),
    Format("swift-sharegpt", ("conversation",), (), conversations.swift_pairs, ()),
    Format(
        "trl-messages",
        ("messages",),
        (),
        conversations.messages,
        ("chosen", "rejected", "rejected_response", "rejected_messages"),
    ),
    Format("alpaca", ("instruction",), (), questions.alpaca, ("input", "output", "history", "chosen", "rejected")),
    Format("query-response", ("query",), (), questions.query_response, ("response", "history", "rejected_response")),
    Format("video-r1", ("problem", "solution"), (), questions.video_r1, ("process", "data_type", "problem_type")),
    Format("trl-preference", (), ("chosen", "rejected"), conversations.trl_preference, ("prompt", "answer")),
    Format("trl-prompt", ("prompt",), (), conversations.trl_prompt, ("completion",)),
    Format("sharegpt4video", ("captions", "video_path"), (), questions.described, ()),
    Format("question-answer", ("question", "answer"), (), questions.question_answer, ()),
)


def detect(found: dict) -> Format | None:
    """The format of one JSON object by its keys; None when none fits."""
    if "messages" in found and is_ours(found):
        return RECORD
    for format in FORMATS:
        if all(key in found for key in format.keys) and (not format.any_of or any(k in found for k in format.any_of)):
            return format
    return None


def read_object(format: Format, found: dict, source: str) -> tuple[Record, set[str]]:
    """One object -> its Record, and the keys that were left out. Raises DataError with the field and the reason."""
    if format is RECORD:
        return from_json(found, source), set()
    known = {*format.keys, *format.any_of, *format.uses, *SHARED}
    refuse_unknown(found, known)
    return format.read(found, source), found.keys() - known


def names() -> str:
    """All formats, for messages."""
    return ", ".join((RECORD.name, *(format.name for format in FORMATS)))
