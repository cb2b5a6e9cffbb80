"""VidHalluc (arXiv 2412.03735): do models see actions, their order and changes of scene, or what they expect?

Files, as their authors ship them (names and shapes: github.com/Vid-Halluc/VidHalluc), told apart by their shape:

    ach_binaryqa.json   {name: [{q, a: {clip: Yes or No}}]}; a question counts where it is right about every clip
    ach_mcq.json        {name: {clip: {Question, Choices: {letter: text}, Correct Answer}}}; one or more letters
    tsh.json            {name: {video, Question, Correct Answer}}; AB, BA, A or B: the order of two actions
    sth.json            {video: {Scene change: Yes or No, Locations}}

Requests and rules are those of the authors' scripts (eval/inference, eval/evaluation). Left out: of `sth.json` the
similarity of the places named, which needs a sentence encoder. Its class part is given as accuracy, recall and
specificity; the authors' score is made of Matthews' coefficient of the same counts.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .items import Item, Tally, entries, one_of, text, unique

VIDHALLUC = "VidHalluc's ach_binaryqa.json, ach_mcq.json, tsh.json or sth.json"
YES_NO = "{} Only answer with a single word 'Yes' or 'No'."
LETTERS = (
    "{} Please select the correct answer (one or more options), only return your answer(s). (e.g., ABCD)\nChoices:\n"
)
ORDER = (
    "{}Sort these two actions in the order they occur in the video, and return the order you detect (i.e., AB or BA). "
    "If you only detect one action of these two in the video, return that action."
)
SCENE = (
    "Watch the given video and determine if a scene change occurs. If no change occurs, respond: 'Scene change: No, "
    "Locations: None'. If there is a scene change, respond in the format: 'Scene change: Yes, Locations: from "
    "[location1] to [location2].'"
)


def load(paths: list[Path]) -> list[Item]:
    """Files of VidHalluc; each kind is a group, and every item carries its whole request."""
    items: list[Item] = []
    for path in paths:
        (found,) = entries(path, VIDHALLUC)
        for name, entry in found.items():
            items += _items(name, entry, f"{path}, {name}")
    return unique(items)


def _items(name: str, entry: object, place: str) -> Iterator[Item]:
    if isinstance(entry, list):
        for number, asked in enumerate(entry):
            where = f"{place}, question {number}"
            if not isinstance(asked, dict) or not isinstance(asked.get("a"), dict) or not asked["a"]:
                raise DataError(f"{where}: expected {{q, a: {{clip: Yes or No}}}}, as in ach_binaryqa.json.")
            clips = tuple(asked["a"])
            right = "/".join(one_of(asked["a"], clip, where, "Yes", "No") for clip in clips)
            questions = (YES_NO.format(text(asked, "q", where)),) * len(clips)
            yield Item(f"binaryqa_{name}_{number}", clips[0], questions, right, "binaryqa", each_video=clips)
    elif not isinstance(entry, dict):
        raise DataError(f"{place}: found a {type(entry).__name__}. Expected {VIDHALLUC}.")
    elif "Scene change" in entry:
        right = one_of(entry, "Scene change", place, "Yes", "No")
        yield Item(f"sth_{name}", name, (SCENE,), right, "sth")
    elif "video" in entry:
        question = ORDER.format(text(entry, "Question", place))
        right = one_of(entry, "Correct Answer", place, "AB", "BA", "A", "B")
        yield Item(f"tsh_{name}", text(entry, "video", place), (question,), right, "tsh")
    else:
        for clip, asked in entry.items():
            yield _choice(f"mcq_{name}_{clip}", clip, asked, f"{place}, {clip}")


def _choice(name: str, clip: str, asked: object, place: str) -> Item:
    if not isinstance(asked, dict) or not isinstance(asked.get("Choices"), dict):
        raise DataError(f"{place}: expected {{Question, Choices, Correct Answer}}, as in ach_mcq.json.")
    choices = {letter: text(asked["Choices"], letter, place) for letter in asked["Choices"]}
    right = set(re.findall("[A-D]", text(asked, "Correct Answer", place).upper()))
    if not right or not right <= set(choices):
        raise DataError(f"{place}: `Correct Answer` is {asked['Correct Answer']!r}, expected letters of its choices.")
    question = LETTERS.format(text(asked, "Question", place))
    question += "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    return Item(name, clip, (question,), "".join(sorted(right)), "mcq", among=tuple(choices.values()))


def tally(item: Item, row: dict) -> Tally:
    """By the rule of the item's group; `sth_recall` is over videos with a change, `sth_specificity` over the others."""
    answers, right = row["answers"], item.reference
    if item.group == "binaryqa":
        # what stands before the first full stop or comma is held against Yes or No, the whole of it
        said = [re.split(r"[.,]", answer.strip())[0].strip().upper() for answer in answers]
        hits = [one == wanted.upper() for one, wanted in zip(said, right.split("/"), strict=True)]
        return {"binaryqa": (float(all(hits)), 1.0), "binaryqa_each": (float(sum(hits)), float(len(hits)))}
    if item.group == "mcq":
        # every letter that stands alone; where there is none, that of the first choice whose text is said
        said = answers[0].lower()
        named = [letter for letter, choice in zip("ABCD", item.among, strict=False) if choice.lower() in said]
        letters = set(re.findall(r"\b[A-D]\b", answers[0])) or set(named[:1])
        return {"mcq": (float(letters == set(right)), 1.0)}
    if item.group == "tsh":
        return {"tsh": (float(order_of(answers[0]) == right), 1.0)}
    # what follows the first colon up to a comma: "yes" or "no" where the answer keeps to the format
    said = answers[0].split(", Locations: ", 1)[0].split(": ", 1)[-1].split(",")[0].strip().lower()
    changed, hit = right == "Yes", (said == "yes") == (right == "Yes")
    return {
        "sth_accuracy": (float(hit), 1.0),
        "sth_recall": (float(hit and changed), float(changed)),
        "sth_specificity": (float(hit and not changed), float(not changed)),
    }


def order_of(answer: str) -> str:
    """AB, BA, A or B as an answer says it, "" where it does not: `before`, `then` and `after` decide where both
    actions are named, else the order in which they are."""
    said = answer.strip().lower()
    if said in ("ab", "ba", "a", "b"):
        return said.upper()
    if "not clear" in said or "no clear" in said:
        return ""
    named = [letter for letter in "ab" if f"action {letter}" in said]
    if len(named) < 2:
        return "".join(named).upper()
    mentions = re.findall(r"action ([ab])|\b([ab])[.)]", said)
    order = "".join(dict.fromkeys(one or other for one, other in mentions)).upper()
    later_first = "after" in said and not re.search("before|then", said)
    return order[::-1] if later_first else order
