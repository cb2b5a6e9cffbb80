"""Hallucination, most of it without a judge: POPE, AMBER, Object HalBench and MMHal-Bench, on videos or pictures.

Files, as their authors ship them:

    POPE              JSON lines {question_id, image or video, text, label}; label yes or no. POPEv2: a list of
                      {image_name, query, label}
    AMBER             query_*.json [{id, image, query}] and annotations.json [{id, type, truth, hallu}], where `truth`
                      is yes or no, or for generative items a list of objects; relation.json {object: [words]} and
                      safe_words.txt where they are given
    Object HalBench   JSON lines {image_id, question, image (base64) or image_path}; COCO's instances_*.json, or
                      {image_id, objects}; COCO's captions_*.json and a list of synonyms, a line per object, where given
    MMHal-Bench       a list of {question_type, question, gt_answer, image_content, image_id, image_src}

Departures from the authors' scripts. They make figures comparable among ours and not with published ones.

- AMBER: nouns are tagged as the authors do, by another tagger (`nouns.py`). Near synonyms by word vectors (spaCy) are
  left out: only relation.json says which words mean the same.
- Object HalBench: objects are found by their words and plurals. The authors ask GPT-3.5 which objects an answer names.
- POPE: an answer that says neither yes nor no is neither, and its share is shown. The authors take it for a yes.
"""

import os
import re
from collections import defaultdict
from pathlib import Path

from ..errors import DataError
from .items import (
    Item,
    Objects,
    Tally,
    entries,
    lines_of,
    meant,
    mentions,
    one_file,
    one_of,
    placed,
    text,
    texts,
    unique,
    words_of,
    yes_or_no,
)
from .nouns import tagged, tagger

POPE = "POPE's JSON lines {question_id, image or video, text, label}, or POPEv2's {image_name, query, label}"
AMBER = "AMBER's query_*.json and annotations.json, and relation.json and safe_words.txt where you have them"
OBJHAL = "Object HalBench's JSON lines {image_id, question, image}, COCO's instances_*.json (captions_*.json, synonyms)"
MMHAL = "MMHal-Bench's list of {question_type, question, gt_answer, image_content, image_id, image_src}"

# ---- POPE


def load_pope(paths: list[Path]) -> list[Item]:
    """One file of polling questions."""
    path = one_file(paths, POPE)
    items = []
    pairs = "image_name" in entries(path, POPE)[0]  # POPEv2: a picture with and without its object
    keys = ("image_name", "query", "label") if pairs else ("question_id", "text", "label")
    for place, entry in placed(path, POPE, *keys):
        name, asked = text(entry, keys[0], place), text(entry, keys[1], place)
        label = one_of(entry, "label", place, "yes", "no")
        key = keys[0] if pairs else next((key for key in ("video", "image") if key in entry), None)
        if key is None:
            raise DataError(f"{place}: it names neither `image` nor `video`. Expected {POPE}.")
        video = text(entry, key, place)
        if pairs:
            name = video = video.lstrip("/")
        items.append(Item(name, video, (asked,), label))
    return unique(items)


def tally_pope(item: Item, row: dict) -> Tally:
    """Accuracy, and precision, recall and F1 of yes."""
    return _polled(item, row, "yes") | _bias(row)


def _polled(item: Item, row: dict, positive: str) -> Tally:
    """Of the answer `positive`. F1 = 2 tp / (2 tp + fp + fn), a ratio of sums like the others."""
    said, wanted = yes_or_no(row["answers"][0]), item.reference
    is_said = said is not None and said == (positive == "yes")
    hit = float(is_said and wanted == positive)
    return {
        "accuracy": (float(said is not None and said == (wanted == "yes")), 1.0),
        "precision": (hit, float(is_said)),
        "recall": (hit, float(wanted == positive)),
        "f1": (2 * hit, float(is_said) + float(wanted == positive)),
    }


def _bias(row: dict) -> Tally:
    said = yes_or_no(row["answers"][0])
    return {"yes_share": (float(said is True), 1.0), "neither_share": (float(said is None), 1.0)}


# ---- AMBER


def load_amber(paths: list[Path]) -> list[Item]:
    """Queries with their annotations, told apart by their keys; files in any order."""
    queries, notes, relation, safe = [], {}, {}, frozenset()
    for path in paths:
        if path.suffix == ".txt":
            safe = frozenset(lines_of(path))
            continue
        found = entries(path, AMBER)
        if "query" in found[0]:
            queries += [(path, entry) for entry in entries(path, AMBER, "id", "image", "query")]
        elif "truth" in found[0]:
            notes |= {text(entry, "id", str(path)): entry for entry in entries(path, AMBER, "id", "type", "truth")}
        elif len(found) == 1:
            relation = {word: texts(found[0], word, str(path)) for word in found[0]}
        else:
            raise DataError(f"{path}: found the keys {', '.join(list(found[0])[:8])}. Expected {AMBER}.")
    if not queries or not notes:
        raise DataError(f"There are no {'annotations' if queries else 'queries'} in the files. Expected {AMBER}.")
    named = [
        word
        for note in notes.values()
        for key in ("truth", "hallu")
        if isinstance(note.get(key), list)
        for word in note[key]
    ]
    vocabulary = (
        frozenset(relation) | frozenset(word for words in relation.values() for word in words) | frozenset(named)
    )
    items = []
    for index, (path, entry) in enumerate(queries):
        place, name = f"{path}, entry {index}", text(entry, "id", str(path))
        if name not in notes:
            raise DataError(f"{place}: query {name} has no annotation.")
        note = notes[name]
        asked = (text(entry, "query", place),)
        video, kind = text(entry, "image", place), text(note, "type", f"annotation {name}")
        kind = "discriminative-relation" if kind == "relation" else kind  # the file has both, the authors count one
        if kind == "generative":
            tagger()
            present, traps = (_by_word(texts(note, key, f"annotation {name}"), relation) for key in ("truth", "hallu"))
            objects = Objects(present, traps, vocabulary, safe)
            items.append(Item(name, video, asked, "", kind, objects=objects))
        else:
            items.append(Item(name, video, asked, one_of(note, "truth", f"annotation {name}", "yes", "no"), kind))
    return unique(items)


def _by_word(names: list[str], relation: dict[str, list[str]]) -> dict[str, frozenset[str]]:
    """{word: the objects it names}, of objects and AMBER's words for them; one word may stand for several."""
    found = defaultdict(set)
    for name in names:
        for word in (name, *relation.get(name, [])):
            found[word].add(name)
    return {word: frozenset(named) for word, named in found.items()}


def tally_amber(item: Item, row: dict) -> Tally:
    """Generative: chair (invented of all objects named), cover (of those in the picture), hal (answers with an invented
    one), cog (of the expected inventions). Discriminative: as POPE, of the answer no, which is what finds out an
    invention."""
    objects = item.objects
    if objects is None:
        return {f"disc_{name}": value for name, value in (_polled(item, row, "no") | _bias(row)).items()}
    words, nouns = list(zip(*tagged(row["answers"][0]), strict=True)) or ((), ())
    named = mentions(words, objects.vocabulary, nouns)
    invented = [word for word in named if word not in objects.harmless and word not in objects.present]
    return {
        "chair": (len(invented), len(named)),
        "cover": (len(meant(named, objects.present)), len(meant(objects.present, objects.present))),
        "hal": (float(bool(invented)), 1.0),
        "cog": (len(meant(invented, objects.traps)), len(meant(objects.traps, objects.traps))),
    }


# ---- Object HalBench


def load_objhal(paths: list[Path]) -> list[Item]:
    """Prompts, the objects of every picture, and synonyms; objects that COCO's captions name count as well."""
    prompts, objects, captions, synonyms = [], defaultdict(set), [], {}
    for path in paths:
        if path.suffix == ".txt":
            for line in lines_of(path):
                names = [name.strip().lower() for name in line.split(",") if name.strip()]
                synonyms |= {name: names[0] for name in names}
            continue
        found = entries(path, OBJHAL)
        if "annotations" in found[0]:
            captions += _read_coco(found[0], objects, str(path))
        elif "objects" in found[0]:
            for place, entry in placed(path, OBJHAL):
                objects[_number(text(entry, "image_id", place))].update(texts(entry, "objects", place))
        else:
            prompts += placed(path, OBJHAL, "image_id", "question")
    if not prompts or not objects:
        raise DataError(f"There are no {'objects' if prompts else 'prompts'} in the files. Expected {OBJHAL}.")
    for name in {name.lower() for names in objects.values() for name in names}:
        synonyms.setdefault(name, name)
    vocabulary = frozenset(synonyms)
    asked = {_number(text(entry, "image_id", place)) for place, entry in prompts}
    for number, caption in captions:
        if number in asked:
            objects[number].update(mentions(words_of(caption), vocabulary))
    return unique(_with_objects(place, entry, objects, synonyms, vocabulary) for place, entry in prompts)


def _with_objects(
    place: str, entry: dict, objects: dict[str, set[str]], synonyms: dict[str, str], vocabulary: frozenset[str]
) -> Item:
    """A prompt, and what is in its picture."""
    number = _number(text(entry, "image_id", place))
    if number not in objects:
        raise DataError(
            f"{place}: picture {number} is in no list of objects; perhaps the files are of different splits."
        )
    here = {synonyms[each.lower()] for each in objects[number]}
    present = {word: frozenset([name]) for word, name in synonyms.items() if name in here}
    by_path = "image_path" in entry
    return Item(
        number,
        text(entry, "image_path", place) if by_path else number,
        (text(entry, "question", place),),
        "",
        objects=Objects(present, {}, vocabulary, frozenset()),
        picture=None if by_path else entry.get("image"),
    )


def _number(name: str) -> str:
    """A picture's number without leading zeros, as COCO counts them; other names as they are."""
    return str(int(name)) if name.isdecimal() else name


def _read_coco(found: dict, objects: dict[str, set[str]], place: str) -> list[tuple[str, str]]:
    """Put what COCO's instances say of each picture into `objects`; of COCO's captions return (picture, caption)."""
    try:
        if "categories" not in found:
            return [(str(note["image_id"]), note["caption"]) for note in found["annotations"]]
        names = {category["id"]: category["name"] for category in found["categories"]}
        for image in found.get("images", []):
            objects[str(image["id"])]  # a picture may have none
        for note in found["annotations"]:
            objects[str(note["image_id"])].add(names[note["category_id"]])
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: its annotations are not COCO's ({error!r}). Expected {OBJHAL}.") from None
    return []


def tally_objhal(item: Item, row: dict) -> Tally:
    """CHAIR by response (of the answers that name an object) and by mention (each word once per answer), and recall."""
    objects = item.objects
    named = list(dict.fromkeys(mentions(words_of(row["answers"][0]), objects.vocabulary)))
    invented = [word for word in named if word not in objects.present]
    return {
        "chair_response": (float(bool(invented)), float(bool(named))),
        "chair_mention": (len(invented), len(named)),
        "recall": (len(meant(named, objects.present)), len(meant(objects.present, objects.present))),
    }


# ---- MMHal-Bench


def load_mmhal(paths: list[Path]) -> list[Item]:
    """Questions with the answer that people gave; the picture by the file name of its address, or by its id."""
    path, keys = one_file(paths, MMHAL), ("question_type", "question", "gt_answer", "image_content", "image_id")
    items = []
    for index, (place, entry) in enumerate(placed(path, MMHAL, *keys)):
        address = str(entry.get("image_src") or "")
        video = os.path.basename(re.split(r"[?#]", address)[0]) or text(entry, "image_id", place)
        content = ", ".join(texts(entry, "image_content", place)) or "nothing"
        kind, asked = text(entry, "question_type", place), text(entry, "question", place)
        items.append(Item(str(index), video, (asked,), text(entry, "gt_answer", place), kind, content))
    return items


def tally_mmhal(item: Item, row: dict) -> Tally:
    """Mean rating, and the share of answers rated below 3. (The published script counts what it cannot read as 0.)"""
    verdict = row["verdicts"]["mmhal"]
    known = verdict["problem"] is None
    return {
        "rating": (verdict["score"] or 0.0, float(known)),
        "hallucination": (float(known and verdict["score"] < 3), float(known)),
        "unparsable": (float(not known), 1.0),
    }
