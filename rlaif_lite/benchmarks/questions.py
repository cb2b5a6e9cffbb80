"""Questions whose answers a judge scores: the Video-ChatGPT benchmark and zero-shot question answering.

Files, as Video-ChatGPT (arXiv 2306.05424) and those who follow it ship them, all JSON lists:

    generic_qa, temporal_qa   {video_name, Q, A}; answers to the generic ones are judged on three axes
    consistency_qa            {video_name, Q1, Q2, A}; two wordings of one question
    question answering        {video_name, question_id, question, answer} in one file, or without the answer in
                              test_q.json beside {question_id, answer} in test_a.json, in any order

Departure from their scripts, which join the two files by position: they are joined by `question_id`.
"""

from pathlib import Path

from ..errors import DataError
from .items import Item, Tally, entries, one_file, text, unique

GENERIC = "the list of {video_name, Q, A} of Video-ChatGPT's benchmark"
CONSISTENCY = "the list of {video_name, Q1, Q2, A} of Video-ChatGPT's consistency questions"
QA = "a list of {video_name, question_id, question, answer}, or test_q.json and test_a.json"


def load_generic(paths: list[Path]) -> list[Item]:
    """Video-ChatGPT's generic or temporal questions."""
    return _generative(one_file(paths, GENERIC), GENERIC, "Q")


def load_consistency(paths: list[Path]) -> list[Item]:
    """Video-ChatGPT's pairs of questions."""
    return _generative(one_file(paths, CONSISTENCY), CONSISTENCY, "Q1", "Q2")


def _generative(path: Path, format: str, *asked: str) -> list[Item]:
    items = []
    for index, entry in enumerate(entries(path, format, "video_name", *asked, "A")):
        place = f"{path}, entry {index}"
        questions = tuple(text(entry, key, place) for key in asked)
        items.append(Item(str(index), text(entry, "video_name", place), questions, text(entry, "A", place)))
    return items


def load_qa(paths: list[Path]) -> list[Item]:
    """Zero-shot question answering in either form; ActivityNet-QA's `type` is the group."""
    if len(paths) not in (1, 2):
        raise DataError(f"{len(paths)} files were given, expected one or two: {QA}.")
    asked, answers = paths[0], paths[-1]
    given = {}
    for index, entry in enumerate(entries(answers, QA, "question_id", "answer")):
        name = text(entry, "question_id", f"{answers}, entry {index}")
        given[name] = (text(entry, "answer", f"{answers}, entry {index}"), str(entry.get("type", "")))
    items = []
    for index, entry in enumerate(entries(asked, QA, "video_name", "question_id", "question")):
        place = f"{asked}, entry {index}"
        name = text(entry, "question_id", place)
        if name not in given:
            raise DataError(
                f"{place}: question {name} has no answer in {answers}. The two files belong to other splits."
            )
        answer, kind = given[name]
        if asked == answers:  # an id may repeat within one file, and then each entry has its own answer
            answer, kind = text(entry, "answer", place), str(entry.get("type", ""))
        items.append(Item(name, text(entry, "video_name", place), (text(entry, "question", place),), answer, kind))
    return unique(items)


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
