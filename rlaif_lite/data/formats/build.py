"""What every format ends with: the Record, and the refusal of keys whose meaning would be lost."""

import re
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches

from ...errors import DataError
from ..records import HUGE, VIDEO_MARK, Message, Record, texts
from .media import FIELDS
from .turns import CUT_OUT, TIMES, Turns

EXTRAS = ("caption_type", "length_bonus")
IDS = ("id", "uid", "question_id", "problem_id", "video_id")
SHARED = (*IDS, "system", "captions", "label", "kto_tag", "solution", "options", "task", "facts", *EXTRAS, *FIELDS)
SOUND = ("audio", "audios")
TOOLS = ("tools", "objects", "functions")
OURS_ALONE = ("clip", "clips", "verdicts")
# A misspelling of one of these would lose a video, an answer or its meaning in silence.
ANSWERS = ("chosen", "rejected", "rejected_response", "label", "facts")
GUARDED = ("video", "videos", "image", "images", *ANSWERS, *OURS_ALONE)


def refuse_unknown(found: dict, known: set[str]) -> None:
    """Raise DataError for a key that changes what a record means and that cannot be honoured."""
    for key, value in found.items():
        if key in known or value in (None, "", [], {}):
            continue
        if key in TIMES:
            raise DataError(f"`{key}` is {value!r}, which is not understood. {CUT_OUT}")
        if key in SOUND:
            raise DataError(f"`{key}` is given, but no model here hears. Leave such records out.")
        if key in TOOLS:
            raise DataError(f"`{key}` is given, which is not understood. Leave such records out.")
        if not key.lower().endswith("id") and (near := get_close_matches(key, GUARDED, 1, cutoff=0.8)):
            raise DataError(f"unknown key `{key}`; did you mean `{near[0]}`? Rename it, or leave it out.")
    for key in ("label", "kto_tag"):
        if found.get(key) is None or found[key] is True or str(found[key]).lower() == "true":
            continue
        raise DataError(
            f"`{key}` is {found[key]!r}: the answer is not one to learn from. Leave such records out, or make pairs of "
            "`chosen` and `rejected`."
        )


def is_ours(found: dict) -> bool:
    """What `records.to_json` writes: turns with plain texts, an id, and no key but ours (or one that is ours alone)."""
    turns = found["messages"]
    plain = isinstance(turns, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in turns)
    own = {field.name for field in fields(Record)}
    return plain and "id" in found and (found.keys() <= own or bool(found.keys() & {*OURS_ALONE}))


def solution_of(found: dict) -> str | None:
    """The right answer, without the `<answer>` tags of R1-style data."""
    solution = found.get("solution")
    if solution is None or isinstance(solution, (int, float)) and not isinstance(solution, bool):
        return None if solution is None else str(solution)
    if not isinstance(solution, str):
        raise DataError(f"`solution` is {solution!r}, expected a text.")
    bare = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", solution, re.DOTALL)
    return (bare[1] if bare else solution).strip()


def record(
    found: dict,
    source: str,
    turns: Turns | Sequence[Message],
    video: str | tuple[str, ...] | None,
    chosen: str | None = None,
    rejected: str | None = None,
    captions: tuple[str, ...] | None = None,
) -> Record:
    """Put the parts together; a mark that is missing is set before the first question."""
    messages = list(turns.messages if isinstance(turns, Turns) else turns)
    if found.get("system") is not None and found["system"] != "":
        if not isinstance(found["system"], str):
            raise DataError(f"`system` is {found['system']!r}, expected a text.")
        if messages and messages[0].role == "system" and messages[0].content != found["system"]:
            raise DataError("`system` is given, and the first turn is another system turn.")
        messages = [Message("system", found["system"]), *messages[messages[0].role == "system" :]]
    messages = [Message(m.role, _marked(m.content) if m.role == "user" else m.content) for m in messages]
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if video is not None and first is not None and not any(VIDEO_MARK in m.content for m in messages):
        messages[first] = Message("user", f"{VIDEO_MARK}\n{messages[first].content}")
    name = next((str(found[key]) for key in IDS if found.get(key) is not None), source)
    extras = {key: found[key] for key in EXTRAS if found.get(key) is not None}
    for key, value in extras.items():
        if type(value) not in (int, float) or not abs(value) < HUGE:
            raise DataError(f"`{key}` is {value!r}, expected a number.")
    captions = texts(found.get("captions"), "`captions`") if captions is None else captions
    if found.get("facts") is not None and not isinstance(found["facts"], dict):
        raise DataError(f"`facts` is {found['facts']!r}, expected an object.")
    options, solution = texts(found.get("options"), "`options`"), solution_of(found)
    task = found.get("task", found.get("problem_type"))  # ours, or Video-R1's
    return Record(
        name,
        video,
        tuple(messages),
        chosen,
        rejected,
        facts=found.get("facts"),
        source=source,
        captions=captions,
        options=options,
        solution=solution,
        task=task if isinstance(task, str) and task else None,
        **extras,
    )


def _marked(text: str) -> str:
    """`<image>` becomes `<video>` on a line of its own before the rest, wherever it stood, as LLaVA and the release
    read their files."""
    if text.count("<image>") != 1:
        return text.replace("<image>", VIDEO_MARK)
    return f"{VIDEO_MARK}\n{text.replace('<image>', '').strip()}".strip()
