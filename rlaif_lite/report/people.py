"""What people said of a run's answers (`<run>/labels/*.jsonl`, written by `rlaif-lite ui`), and what follows from it.

Two questions are asked of people. `policy`: the policy's greedy answer or SFT's, to a held-out video? `judged`: which
answer of a pair that the judge decided? Win rates and agreement count a tie as half and carry Wilson's 95 % interval
(1927). Its sample size is the number of videos, by Kish's formula where they have unequal numbers of verdicts: several
verdicts about one video are no independent draws, and three wins of three are no certainty. Two people are compared by
Cohen's kappa (1960).

A label counts where this run has the answers that it is about. A file with labels of another run is left out and named.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_lite.files import read_jsonl, whole_lines

LABELS = "labels"  # the folder of the run
SOURCES = {"policy": ("policy", "sft"), "judged": ("chosen", "rejected")}  # whose answers; wins are the first's
TIE, SKIP, BACK = "tie", "skip", "back"  # what a person may say instead; "back" takes the last verdict back
KEYS = ("run", "person", "source", "item", "video", "better")  # every label has these
Z_975 = 1.959964


class Item(NamedTuple):
    """Two answers that a person can compare."""

    id: str  # a digest of the rest, but for the margin
    source: str
    key: str  # of the record
    answers: tuple[str, str]  # in the order of SOURCES
    row: dict[str, Any]  # what the judge said: the pair's line of `pairs.jsonl`


class Labels(NamedTuple):
    """The labels of a run that count."""

    by_person: dict[str, dict[str, dict]]  # {person: {item: the last label}}, skipped ones included
    refused: list[str]  # files that are left out, and why
    stale: int  # labels about answers that the run no longer has


class Share(NamedTuple):
    """A share of verdicts, and its 95 % interval."""

    value: float
    low: float
    high: float
    verdicts: int
    videos: int


class Couple(NamedTuple):
    """Two people who judged the same items."""

    names: tuple[str, str]
    items: int
    same: float  # share of the items with the same verdict
    kappa: float | None  # None where both always say the same one thing


class People(NamedTuple):
    """What people's verdicts say."""

    verdicts: dict[str, int]  # by person, without skipped ones
    policy: Share | None  # win rate of the policy against SFT
    counts: tuple[int, int, int]  # won, tied, lost by the policy
    equal: int  # questions that policy and SFT answer word for word alike
    judge: Share | None  # the judge and people name the same better answer, where people name one
    reward: Share | None  # the same of the reward model, on pairs that it was not trained on
    each_other: Share | None  # two people name the same better answer of a judged pair, where both name one
    couples: list[Couple]
    labels: Labels


def items_of(folder: Path, rows: Iterable[dict], method: str) -> list[Item]:
    """Everything of a run that people can judge; `rows`: lines of `evaluate/*.jsonl`. Equal answers are no item."""
    greedy = {(row["key"], row["role"]): row["answer"] for row in rows if row["mode"] == "greedy"}
    found = [
        _item("policy", key, greedy[key, method], answer, {})
        for (key, role), answer in greedy.items()
        if role == "sft" and (key, method) in greedy
    ]
    pairs = read_jsonl(folder / "preference" / "pairs.jsonl")
    for path in sorted((folder / "dpo").glob("round*/pairs.jsonl")):
        pairs += [row | {"key": row["record"]} for row in read_jsonl(path)]
    found += [_item("judged", row["key"], row["chosen"], row["rejected"], row) for row in pairs]
    return list({item.id: item for item in found if item.answers[0] != item.answers[1]}.values())


def _item(source: str, key: str, better: str, worse: str, row: dict) -> Item:
    digest = hashlib.sha256(json.dumps([source, key, better, worse]).encode()).hexdigest()
    return Item(digest[:16], source, key, (better, worse), row)


def read_labels(folder: Path, items: Iterable[Item], recipe_hash: str) -> Labels:
    """All labels in the folder of a run that has these `items`. A file is refused where it is damaged, or where it
    has labels of another recipe about answers that this run does not have."""
    known, by_person, refused, stale = {item.id for item in items}, {}, [], 0
    for path in sorted((folder / LABELS).glob("*.jsonl")):
        rows, wrong = _rows(path)
        foreign = [row for row in rows if row["run"] != recipe_hash and row["item"] not in known]
        if not wrong and foreign:
            wrong = (
                f"{len(foreign)} of its {len(rows)} labels are of another run (recipe {foreign[0]['run']}, this one is "
                f"{recipe_hash}) and about answers that this run does not have. Move the file to the run it belongs to"
            )
        if wrong:
            refused.append(f"{path} is left out: {wrong}. Nothing in it was changed.")
            continue
        for row in rows:
            of = by_person.setdefault(row["person"], {})
            of.pop(row["item"], None)
            if row["better"] != BACK:
                of[row["item"]] = row
        stale += sum(row["item"] not in known for row in rows)
    counted = {person: {item: row for item, row in of.items() if item in known} for person, of in by_person.items()}
    return Labels(counted, refused, stale)


def _rows(path: Path) -> tuple[list[dict], str]:
    """The labels of a file, and what is wrong with it."""
    rows = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError:
            return [], f"line {number} is not JSON. Mend or delete that line"
        if not isinstance(row, dict) or (missing := [key for key in KEYS if not isinstance(row.get(key), str)]):
            named = f" (no `{missing[0]}`)" if isinstance(row, dict) else ""
            return [], f"line {number} is no label{named}. Mend or delete that line"
        if row["source"] not in SOURCES or row["better"] not in (*SOURCES[row["source"]], TIE, SKIP, BACK):
            return [], f"line {number} has the verdict {row['better']!r} on {row['source']!r}, which is none"
        rows.append(row)
    return rows, ""


def read_people(folder: Path, rows: Iterable[dict], method: str, recipe_hash: str) -> People:
    """People's verdicts of a run, counted."""
    rows = list(rows)
    items = {item.id: item for item in items_of(folder, rows, method)}
    labels = read_labels(folder, items.values(), recipe_hash)
    verdicts = [row for of in labels.by_person.values() for row in of.values() if row["better"] != SKIP]
    policy = [row for row in verdicts if row["source"] == "policy"]
    decided = [row for row in verdicts if row["source"] == "judged" and row["better"] != TIE]
    gaps = {
        (row["key"], row["chosen"], row["rejected"]): row["gap"]
        for row in read_jsonl(folder / "reward" / "heldout.jsonl")
    }
    scored = [
        (row, gap)
        for row in decided
        if (gap := gaps.get((items[row["item"]].key, *items[row["item"]].answers))) is not None
    ]
    counts = Counter(row["better"] for row in policy)
    alike = (  # every two people and every judged pair that both decided
        (one[item]["video"], float(one[item]["better"] == other[item]["better"]))
        for one, other in combinations(labels.by_person.values(), 2)
        for item in one.keys() & other.keys()
        if {one[item]["better"], other[item]["better"]} <= {*SOURCES["judged"]}
    )
    couples = [couple(*two) for two in combinations(sorted(labels.by_person.items()), 2)]
    greedy = {(row["key"], row["role"]): row["answer"] for row in rows if row["mode"] == "greedy"}
    return People(
        verdicts=dict(sorted(Counter(row["person"] for row in verdicts).items())),
        policy=share((row["video"], {"policy": 1.0, TIE: 0.5, "sft": 0.0}[row["better"]]) for row in policy),
        counts=(counts["policy"], counts[TIE], counts["sft"]),
        equal=sum(role == "sft" and greedy.get((key, method)) == text for (key, role), text in greedy.items()),
        judge=share((row["video"], float(row["better"] == "chosen")) for row in decided),
        reward=share((row["video"], float((row["better"] == "chosen") == (gap > 0))) for row, gap in scored),
        each_other=share(alike),
        couples=[found for found in couples if found is not None],
        labels=labels,
    )


def share(scores: Iterable[tuple[str, float]]) -> Share | None:
    """The mean of (video, score in [0, 1]) with Wilson's interval, which holds for scores between 0 and 1 as well:
    none has a larger variance than a coin of the same mean. None without scores."""
    by_video: dict[str, list[float]] = {}
    for video, score in scores:
        by_video.setdefault(video, []).append(score)
    if not by_video:
        return None
    sizes = [len(found) for found in by_video.values()]
    n = sum(sizes) ** 2 / sum(size**2 for size in sizes)  # as many independent draws (Kish 1965)
    mean = sum(map(sum, by_video.values())) / sum(sizes)
    below = 1 + Z_975**2 / n
    centre = (mean + Z_975**2 / (2 * n)) / below
    half = Z_975 * math.sqrt(mean * (1 - mean) / n + Z_975**2 / (4 * n**2)) / below
    return Share(mean, max(0.0, centre - half), min(1.0, centre + half), sum(sizes), len(sizes))


def couple(one: tuple[str, dict[str, dict]], other: tuple[str, dict[str, dict]]) -> Couple | None:
    """How two people agree on what both judged, ties included; None where that is nothing."""
    (name_a, a), (name_b, b) = one, other
    shared = sorted(item for item in a.keys() & b.keys() if SKIP not in (a[item]["better"], b[item]["better"]))
    if not shared:
        return None
    said = [(_side(a[item]), _side(b[item])) for item in shared]
    same = sum(x == y for x, y in said) / len(said)
    first, second = (Counter(side) for side in zip(*said, strict=True))
    chance = sum(first[side] * second[side] for side in first) / len(said) ** 2
    return Couple((name_a, name_b), len(said), same, None if chance == 1 else (same - chance) / (1 - chance))


def _side(row: dict) -> str:
    """Kappa's category: a tie, or one of two sides. A coin that the item's digest throws says which answer is on which
    side, or "mostly the policy" would look like agreement by chance."""
    if row["better"] == TIE:
        return TIE
    return str((row["better"] == SOURCES[row["source"]][0]) == (int(row["item"], 16) % 2 == 0))


def trust(people: People) -> str | None:
    """How far to trust the judge on this data, in a sentence; None where people decided no pair of its."""
    judge, each_other = people.judge, people.each_other
    if judge is None:
        return None
    if judge.high < 0.5:
        return "People contradict this judge more often than they agree: do not train on its verdicts as they are."
    if judge.low <= 0.5:
        return "So far these verdicts do not show that the judge is better than a coin; more verdicts narrow this."
    if each_other is None:
        return "The judge is better than a coin. A second person on the same items would say how good people are."
    if judge.high < each_other.value:
        return "The judge is better than a coin, and agrees with people less than they agree with each other."
    return "On what was judged so far, the judge agrees with people about as well as they agree with each other."
