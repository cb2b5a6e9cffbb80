"""Questions with a right choice, scored by rules: options, yes and no, and pairs that must both be right.

Files, as their authors ship them:

    NExT-QA         a CSV {video, question, answer, qid, type, a0, ..., a4}; the type is the group
    TempCompass     multi-choice.json, caption_matching.json or yes_no.json:
                    {video: {dimension: [{question, answer}]}}; the dimension is the group
    MVBench         a list of {video, question, candidates, answer}, one file per task; several files are groups;
                    with {start, end} in seconds where the question is about a part of the video
    VideoHallucer   a list of {basic: {video, question, answer}, hallucination: {...}, type}; answers yes or no
    EventHallusion  a list of {id, questions: [{question, answer}]}; answers yes or no, the id names the video

VideoHallucer and EventHallusion are scored by their authors' rules. VideoHallucer's takes an answer for right that has
the right word anywhere (evaluations/evaluation_utils.py), and counts a pair where both answers are right (`overall`).
EventHallusion's looks at how an answer begins (eval.py).
"""

import re
from pathlib import Path

from ..errors import DataError
from .items import Item, Tally, entries, one_file, one_of, placed, text, texts, unique, yes_or_no
from .options import label_of, lettered, named_in
from .rule_judge import right_by_words

TEMPCOMPASS = "TempCompass's {video: {dimension: [{question, answer}]}}: multi-choice, caption_matching or yes_no"
MVBENCH = "MVBench's lists of {video, question, candidates, answer}, one file per task"
VIDEOHALLUCER = "VideoHallucer's lists of {basic: {video, question, answer}, hallucination: {...}}"
FOLDER_RATES = {"episodic_reasoning": 3}  # MVBench: its videos are folders of frames, which are read as a second each
EVENTHALLUSION = "EventHallusion's list of {id, questions: [{question, answer}]}"


def load_tempcompass(paths: list[Path]) -> list[Item]:
    """One file of TempCompass; its videos are named by their ids."""
    path = one_file(paths, TEMPCOMPASS)
    (found,) = entries(path, TEMPCOMPASS)
    items = []
    for video, dimensions in found.items():
        if not isinstance(dimensions, dict) or not all(isinstance(asked, list) for asked in dimensions.values()):
            raise DataError(f"{path}, {video}: found a {type(dimensions).__name__}. Expected {TEMPCOMPASS}.")
        for dimension, asked in dimensions.items():
            for number, entry in enumerate(asked):
                name = f"{video}_{dimension}_{number}"
                items.append(_item(name, video, entry, f"{path}, {name}", dimension, TEMPCOMPASS))
    return items


def load_mvbench(paths: list[Path]) -> list[Item]:
    """Files of MVBench; each is a group, and its name the task's."""
    items = []
    for path in paths:
        for index, (place, entry) in enumerate(placed(path, MVBENCH, "video", "question", "candidates", "answer")):
            candidates, answer = texts(entry, "candidates", place), text(entry, "answer", place)
            if answer not in candidates:
                raise DataError(f"{place}: `answer` {answer!r} is none of the candidates {candidates}.")
            options = lettered(candidates)
            question = "\n".join([text(entry, "question", place), *options])
            right = options[candidates.index(answer)]
            item = Item(f"{path.stem}_{index}", text(entry, "video", place), (question,), right, path.stem)
            items.append(item._replace(span=_span(entry, place, FOLDER_RATES.get(path.stem, 1))))
    return items


def _span(entry: dict, place: str, rate: int) -> tuple[float, float] | None:
    """From where to where the video is shown: seconds, or frames of a folder with `rate` of them a second."""
    if "start" not in entry and "end" not in entry:
        return None
    start, end = entry.get("start"), entry.get("end")
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (start, end))
    if not numbers or not 0 <= start < end:
        raise DataError(f"{place}: `start` is {start!r} and `end` {end!r}, expected seconds, the later one second.")
    return float(start * rate), float(end * rate)


def load_videohallucer(paths: list[Path]) -> list[Item]:
    """Files of VideoHallucer; each is a group. A pair is one item with two questions, each about its video."""
    items = []
    for path in paths:
        for index, (place, entry) in enumerate(placed(path, VIDEOHALLUCER, "basic", "hallucination")):
            pair = [
                _item("", None, entry[half], f"{place}, {half}", "", VIDEOHALLUCER)
                for half in ("basic", "hallucination")
            ]
            answers = [one_of(entry[half], "answer", place, "yes", "no") for half in ("basic", "hallucination")]
            asked = tuple(half.questions[0] for half in pair)
            item = Item(f"{path.stem}_{index}", pair[0].video, asked, "/".join(answers), path.stem)
            items.append(item._replace(each_video=tuple(half.video for half in pair)))
    return items


def load_eventhallusion(paths: list[Path]) -> list[Item]:
    """Files of EventHallusion (its yes and no part); each is a group."""
    items = []
    for path in paths:
        for place, entry in placed(path, EVENTHALLUSION, "id", "questions"):
            video = text(entry, "id", place)
            if not isinstance(entry["questions"], list):
                raise DataError(f"{place}: `questions` is {entry['questions']!r}. Expected {EVENTHALLUSION}.")
            for asked in entry["questions"]:
                item = _item(video, video, asked, place, path.stem.removesuffix("_questions"), EVENTHALLUSION)
                items.append(item._replace(reference=one_of(asked, "answer", place, "yes", "no")))
    return unique(items)


def _item(name: str, video: str | None, entry: object, place: str, group: str, format: str) -> Item:
    """An entry with `question` and `answer`, and with `video` where none is given."""
    if not isinstance(entry, dict):
        raise DataError(f"{place}: found a {type(entry).__name__}. Expected {format}.")
    about = text(entry, "video", place) if video is None else video
    return Item(name, about, (text(entry, "question", place),), text(entry, "answer", place), group)


def tally_choice(item: Item, row: dict) -> Tally:
    """Accuracy, and the share of answers that name no option, or neither yes nor no. Those are wrong."""
    answer = row["answers"][0]
    right, _ = right_by_words(answer, item.reference)
    named = named_in(answer) if label_of(item.reference) else yes_or_no(answer)
    return {"accuracy": (float(right), 1.0), "unread_share": (float(named is None and not right), 1.0)}


def tally_beginning(item: Item, row: dict) -> Tally:
    """Accuracy by how the answer begins, and the share of answers that begin with neither yes nor no."""
    answer = row["answers"][0].lower()
    unread = not answer.startswith(("yes", "no"))
    return {"accuracy": (float(answer.startswith(item.reference)), 1.0), "unread_share": (float(unread), 1.0)}


def tally_pair(item: Item, row: dict) -> Tally:
    """Each half of a pair, and both together. `yes_share` is by the first word that says yes or no."""
    said = [yes_or_no(answer) for answer in row["answers"]]
    right = [
        re.search(rf"\b{wanted}\b", answer, re.IGNORECASE) is not None
        for answer, wanted in zip(row["answers"], item.reference.split("/"), strict=True)
    ]
    return {
        "basic": (float(right[0]), 1.0),
        "hallucination": (float(right[1]), 1.0),
        "overall": (float(all(right)), 1.0),
        "yes_share": (float(said.count(True)), 2.0),
    }
