"""Questions whose answers a judge scores: the Video-ChatGPT benchmark and zero-shot question answering.

Files, as their authors ship them (Video-ChatGPT: arXiv 2306.05424):

    generic_qa, temporal_qa   {video_name, Q, A}; answers to the generic ones are judged on three axes
    consistency_qa            {video_name, Q1, Q2, A}; two wordings of one question
    question answering        {video_name, question_id, question, answer} in one file, the id where there is one;
                              or test_q.json without the answer, and {question_id, answer} in test_a.json, in any order
    TGIF-QA, NExT-QA          a CSV of question and answer; where it has options (a1-a5, a0-a4), `answer` counts from 0

Departure from their scripts, which join the two files by position: they are joined by `question_id`.
"""

from pathlib import Path

from ..errors import DataError
from .items import Item, Tally, entries, one_file, placed, rows_of, text, unique
from .options import lettered

GENERIC = "the list of {video_name, Q, A} of Video-ChatGPT's benchmark"
CONSISTENCY = "the list of {video_name, Q1, Q2, A} of Video-ChatGPT's consistency questions"
QA = "a list of {video_name, question, answer}, test_q.json and test_a.json, or TGIF-QA's or NExT-QA's CSV"
VIDEO_KEYS = ("video_name", "video_id", "video", "gif_name")
ID_KEYS = ("question_id", "qid", "key", "id")
OPTION_KEYS = ("a0", "a1", "a2", "a3", "a4", "a5")


def load_generic(paths: list[Path]) -> list[Item]:
    """Video-ChatGPT's generic or temporal questions."""
    return _generative(one_file(paths, GENERIC), GENERIC, "Q")


def load_consistency(paths: list[Path]) -> list[Item]:
    """Video-ChatGPT's pairs of questions."""
    return _generative(one_file(paths, CONSISTENCY), CONSISTENCY, "Q1", "Q2")


def _generative(path: Path, format: str, *asked: str) -> list[Item]:
    items = []
    for index, (place, entry) in enumerate(placed(path, format, "video_name", *asked, "A")):
        questions = tuple(text(entry, key, place) for key in asked)
        items.append(Item(str(index), text(entry, "video_name", place), questions, text(entry, "A", place)))
    return items


def load_qa(paths: list[Path]) -> list[Item]:
    """Question answering in any of its forms; the type of a question is its group."""
    if len(paths) not in (1, 2):
        raise DataError(f"{len(paths)} files were given, expected one or two: {QA}.")
    if len(paths) == 1:
        path = paths[0]
        rows = rows_of(path, QA) if path.suffix in (".csv", ".tsv") else entries(path, QA)
        places = [f"{path}, entry {index}" for index in range(len(rows))]
        return unique(_asked(row, row, place, str(n)) for n, (row, place) in enumerate(zip(rows, places, strict=True)))
    asked, answers = paths
    given = {}
    for place, entry in placed(answers, QA, "question_id", "answer"):
        given[text(entry, "question_id", place)] = (place, entry)
    items = []
    for place, entry in placed(asked, QA, "question_id", "question"):
        name = text(entry, "question_id", place)
        if name not in given:
            raise DataError(
                f"{place}: question {name} has no answer in {answers}. The two files belong to other splits."
            )
        items.append(_asked(entry, given[name][1], place, name))
    return unique(items)


def _asked(entry: dict, answered: dict, place: str, number: str) -> Item:
    """One question. `answered` holds its answer; `number` is its id where the file gives none."""
    video = next((key for key in VIDEO_KEYS if key in entry), None)
    if video is None:
        raise DataError(f"{place}: found the keys {', '.join(map(str, list(entry)[:8]))}. Expected {QA}.")
    key = next((key for key in ID_KEYS if str(entry.get(key) or "").strip()), None)
    name = number if key is None else text(entry, key, place)
    if key == "qid":  # NExT-QA counts the questions of each video
        name = f"{text(entry, video, place)}_{name}"
    question, answer = text(entry, "question", place), text(answered, "answer", place)
    options = [text(entry, key, place) for key in OPTION_KEYS if str(entry.get(key) or "").strip()]
    if options:
        options = lettered(options)
        if not answer.isdecimal() or int(answer) >= len(options):
            raise DataError(f"{place}: `answer` is {answer!r}, expected the number of an option from 0.")
        question, answer = "\n".join([question, *options]), options[int(answer)]
    return Item(name, text(entry, video, place), (question,), answer, str(answered.get("type") or ""))


def tally(item: Item, row: dict) -> Tally:
    """Of one judged answer: `<task>_score` and, where the task asks for yes or no, accuracy.

    What the judge's words do not tell is no part of either; its share is `unparsable`. Published scripts ask again
    until it can be read."""
    out, unread = {}, 0
    for task, verdict in row["verdicts"].items():
        known = verdict["problem"] is None
        unread += not known
        if task == "qa":
            out["accuracy"] = (float(verdict["correct"] is True), float(known))
        if not known or verdict["score"] is not None:
            out[f"{task}_score"] = (verdict["score"] or 0.0, float(known))
    return out | {"unparsable": (unread, len(row["verdicts"]))}
