"""Formats that hold one question and its answer in columns: alpaca, query and response, Video-R1, plain rows."""

from ...errors import DataError
from ..records import Message, Record, texts
from .build import record
from .media import video_of
from .turns import Turns, answers_in, read_history

DESCRIBE = "Describe this video in detail."  # what a file of captions alone is asked


def _asked(found: dict, key: str) -> str:
    if not isinstance(found.get(key), str):
        raise DataError(f"`{key}` is {found.get(key)!r}, expected a text.")
    return found[key]


def _round(found, source, question: str, answer: str | None, history=(), chosen=None, rejected=None, captions=None):
    messages = [*history, Message("user", question)]
    if answer is not None:
        messages.append(Message("assistant", answer))
    video = video_of(found, marks=Turns(messages, []).marks)
    return record(found, source, messages, video, chosen, rejected, captions)


def alpaca(found: dict, source: str) -> Record:
    """Alpaca: the question is `instruction`, a line, and `input` where there is one."""
    question = _asked(found, "instruction")
    if found.get("input") not in (None, ""):
        question = f"{question}\n{_asked(found, 'input')}" if question else _asked(found, "input")
    answer, chosen, rejected = answers_in(found, "output", "chosen", "rejected")
    return _round(found, source, question, answer, read_history(found.get("history")), chosen, rejected)


def query_response(found: dict, source: str) -> Record:
    """ms-swift: `query`, `response`, `history`; with `rejected_response` a pair."""
    response, rejected = answers_in(found, "response", "rejected_response")
    history, query = read_history(found.get("history")), _asked(found, "query")
    if rejected is None:
        return _round(found, source, query, response, history)
    if response is None:
        raise DataError("`rejected_response` is given, but `response` is missing.")
    return _round(found, source, query, None, history, response, rejected)


def video_r1(found: dict, source: str) -> Record:
    """Video-R1: the options follow the problem; `process` and `solution` are the answer, where there is a process."""
    options = texts(found.get("options"), "`options`")
    question = "\n".join([_asked(found, "problem"), *(("Options:", *options) if options else ())])
    (process,) = answers_in(found, "process")
    return _round(found, source, question, None if process is None else f"{process}\n{_asked(found, 'solution')}")


def described(found: dict, source: str) -> Record:
    """ShareGPT4Video: the caption of the whole video, `idx` -1, answers the request to describe it."""
    captions = found["captions"]
    if not isinstance(captions, list) or not all(isinstance(caption, dict) for caption in captions):
        raise DataError(f"`captions` is {captions!r}, expected a list of {{idx, content}}.")
    whole = [caption.get("content") for caption in captions if str(caption.get("idx")) == "-1"]
    if len(whole) != 1 or not isinstance(whole[0], str):
        raise DataError("`captions` has no caption of the whole video (`idx` -1).")
    return _round(found, source, DESCRIBE, whole[0], captions=())


def question_answer(found: dict, source: str) -> Record:
    """Rows of `question` and `answer`, as question sets keep them, with `video` or `video_name`."""
    if strange := [key for key in ("a0", "a1", "options", "choices", "candidates") if found.get(key) is not None]:
        raise DataError(
            f"`{strange[0]}` holds options, and `answer` chooses one. Write the options into `question` and the right "
            "one into `answer`; `rlaif-lite bench` reads such question sets as they are."
        )
    return _round(found, source, _asked(found, "question"), _asked(found, "answer"))
