"""One Record: a video, what is said about it, and where it came from, held together in one object.

Every stage passes Records on whole. The official VLM-RLAIF release keeps prompts and records in two lists and filters
only one of them, so that after the first over-long prompt every prompt meets the wrong video; with one object there is
nothing to misalign.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches

from ..errors import DataError

VIDEO_MARK = "<video>"  # marks in a user turn where the video stands
HUGE = 1e300  # a number of a record is below this; NaN is not
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str  # "system", "user" or "assistant"
    content: str  # the text; `<video>` marks where the video stands


@dataclass(frozen=True)
class Record:
    """One video with its conversation; all optional fields are None (or empty) where the data does not carry them."""

    id: str
    video: str | tuple[str, ...] | None  # a file or a folder of frames, or the frames in order, or no video
    messages: tuple[Message, ...]
    chosen: str | None = None  # preference data: the better answer to `prompt`
    rejected: str | None = None  # and the worse one
    clip: int | None = None  # the record is about this clip of the video only; None is the whole video
    clips: int | None = None  # of so many that the video is cut into; None: `features.clips`
    verdicts: tuple[tuple[int, str], ...] = ()  # (end offset in `answer`, label word): process supervision
    facts: dict | None = None  # what is true of the video, as `data.truth` reads it; never trained on
    captions: tuple[str, ...] = ()  # facts that the data carry: a reward model reads them in place of the narrative
    caption_type: int | None = None  # LLaVA-RLHF: what the right answer is known to be (rl.shaping.symbolic_bonus)
    length_bonus: float | None = None  # LLaVA-RLHF: multiplies what this record's answers pay for their length
    solution: str | None = None  # the right answer to the last question, for rewards by rule
    options: tuple[str, ...] = ()  # the options of a multiple-choice question, in their order
    task: str | None = None  # kind of question, such as "multiple choice": which rules read the solution
    source: str = ""  # where it was read: "file.json#17"
    key: str = ""  # which record of the run this is: unique, set by `data.splits`; `id` is for display alone

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns up to and including the last user turn: what a model is asked to answer."""
        last = max(i for i, message in enumerate(self.messages) if message.role == "user")
        return self.messages[: last + 1]

    @property
    def answer(self) -> str | None:
        """The answer to `prompt` that the data carries, or None when the conversation ends with the user."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


def question_of(record: Record) -> str:
    """What the user asked, without the video's mark."""
    return record.prompt[-1].content.replace(VIDEO_MARK, "").strip()


def check(record: Record) -> Record:
    """Return `record` when it is one that every stage can use; raise DataError, naming its source, when it is not."""

    def fail(what: str):
        raise DataError(f"{record.source or 'record ' + record.id}: {what}")

    turns = [m for m in record.messages if m.role != "system"]
    if not turns:
        fail("it has no user turn; a record needs at least one question.")
    for i, message in enumerate(record.messages):
        if message.role not in ROLES:
            fail(f"turn {i} has the role {message.role!r}; expected one of {', '.join(ROLES)}.")
        if message.role == "system" and i > 0:
            fail(f"turn {i} is a system turn; only the first turn may be.")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            fail(f"turn {i} (after any system turn) is from the {message.role}, expected the {expected}.")
        if message.role == "assistant" and VIDEO_MARK in message.content:
            fail(f"turn {i}: an answer contains {VIDEO_MARK}; the video can be in a user turn only.")
    if record.messages[0].role == "system" and VIDEO_MARK in record.messages[0].content:
        fail(f"the system turn contains {VIDEO_MARK}; the video can be in a user turn only.")
    if VIDEO_MARK in (record.chosen or "") + (record.rejected or ""):
        fail(f"`chosen` or `rejected` contains {VIDEO_MARK}; the video can be in a user turn only.")
    marks = sum(m.content.count(VIDEO_MARK) for m in record.messages)
    if record.video is None and marks:
        fail(f"{marks} {VIDEO_MARK} in the text, but the record has no video.")
    if record.video is not None and marks != 1:
        fail(
            f"{marks} {VIDEO_MARK} in the text, expected exactly one: a record has one video. "
            "Make one record of each, or join them into one video."
        )
    if record.video is not None and (not record.video or not all(record.video)):
        fail("its video is empty.")
    for text in _texts_of(record):
        if re.search("[\ud800-\udfff]", text):
            fail(f"a text holds half of a character (a lone surrogate), which no file can: {ascii(text)[:80]}.")
        if "<audio>" in text:
            fail("`<audio>` is in the text, but no model here hears. Leave such records out.")
    if (record.chosen is None) != (record.rejected is None):
        fail("`chosen` and `rejected` come together; one is missing.")
    for end, _ in record.verdicts:
        if not 0 < end <= len(record.answer or ""):
            fail(f"a verdict ends at character {end} of an answer of {len(record.answer or '')} characters.")
    if record.clip is not None and record.clip < 0:
        fail(f"`clip` is {record.clip}; clips are numbered from 0.")
    if record.clips is not None and (record.clip is None or record.clip >= record.clips):
        fail(f"`clips` is {record.clips}, so `clip` is a number below that; it is {record.clip}.")
    return record


def _texts_of(record: Record) -> Iterator[str]:
    """Every text of a record."""
    yield record.id
    yield from record.video if isinstance(record.video, tuple) else (record.video or "",)
    yield from (message.content for message in record.messages)
    yield from (
        record.chosen or "",
        record.rejected or "",
        record.solution or "",
        record.task or "",
        *record.captions,
        *record.options,
    )
    yield from (word for _, word in record.verdicts)


def to_json(record: Record) -> dict:
    """The record as a JSON object, keys as the fields; absent fields, `source` and `key` (a run's own) are left out."""
    found = asdict(record)
    found["messages"] = [asdict(message) for message in record.messages]
    found["verdicts"] = [list(verdict) for verdict in record.verdicts]
    found["captions"], found["options"] = list(record.captions), list(record.options)
    if isinstance(record.video, tuple):
        found["video"] = list(record.video)
    del found["source"], found["key"]
    return {key: value for key, value in found.items() if value is not None and value != []}


def texts(found, what: str) -> tuple[str, ...]:
    """A list of texts, or nothing. Raises DataError, `what` naming it."""
    if found is not None and (not isinstance(found, list) or not all(isinstance(text, str) for text in found)):
        raise DataError(f"{what} is {found!r}, expected a list of texts.")
    return tuple(found or ())


def from_json(found: dict, source: str) -> Record:
    """Read what `to_json` writes. Raises DataError naming `source` and the key that is wrong or unknown."""
    names = [field.name for field in fields(Record) if field.name != "key"]
    for key in found:
        if key not in names:
            near = get_close_matches(key, names, 1)
            raise DataError(f"{source}: unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "."))

    def typed(key: str, kind, what: str):
        value = found.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise DataError(f"{source}: `{key}` is {value!r}, expected {what}.")
        return value

    video = typed("video", (str, list), "a path or a list of frame paths")
    if isinstance(video, list) and not all(isinstance(frame, str) for frame in video):
        raise DataError(f"{source}: `video` is a list, but not of paths.")
    if any("\0" in path for path in ([video] if isinstance(video, str) else video or ())):
        raise DataError(f"{source}: `video` holds a NUL character; no path has one.")
    bonus = typed("length_bonus", (int, float), "a number")
    if bonus is not None and not abs(bonus) < HUGE:
        raise DataError(f"{source}: `length_bonus` is {bonus}, expected a number.")
    messages, verdicts = typed("messages", list, "a list of turns"), typed("verdicts", list, "a list of [offset, word]")
    for i, turn in enumerate(messages or ()):
        if isinstance(turn, dict) and (strange := turn.keys() - {"role", "content"}):
            raise DataError(
                f"{source}: turn {i} has the unknown key `{sorted(strange)[0]}`; turns are {{role, content}}."
            )
    try:
        turns = tuple(Message(role=str(m["role"]), content=m["content"]) for m in messages or ())
        marks = tuple((end, word) for end, word in verdicts or ())
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: turns are {{role, content}}, verdicts [offset, word]; got {error!r}.") from None
    if not all(type(end) is int and isinstance(word, str) for end, word in marks):
        raise DataError(f"{source}: verdicts are [offset, word]; got {verdicts!r}.")
    if not all(isinstance(m.content, str) for m in turns):
        raise DataError(f"{source}: `content` of a turn is not a text.")
    return check(
        Record(
            id=str(found.get("id", source)),
            video=tuple(video) if isinstance(video, list) else video,
            messages=turns,
            chosen=typed("chosen", str, "a text"),
            rejected=typed("rejected", str, "a text"),
            clip=typed("clip", int, "a clip number"),
            clips=typed("clips", int, "a number of clips"),
            verdicts=marks,
            facts=typed("facts", dict, "an object"),
            captions=texts(found.get("captions"), f"{source}: `captions`"),
            caption_type=typed("caption_type", int, "a number"),
            length_bonus=bonus,
            solution=typed("solution", str, "a text"),
            options=texts(found.get("options"), f"{source}: `options`"),
            task=typed("task", str, "a text"),
            source=source,
        )
    )
