"""Rewards that a program checks: functions of an answer's text, the record's solution and little more.

Each reads the text in the last `<answer>`...`</answer>`, or the whole answer where there is none, and gives 0 to 1.

    choice     1 for the letter of the right option ("B", "(B)", "B. a dog") or the option's own text
    match      1 for the solution's own words; case, blanks and a full stop at the end do not count
    number     1 for the solution's number after both are rounded to two decimals
    relative   1 - |answer - solution| / |solution|, at least 0
    rouge      mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004)
    wer        1 - word error rate, at least 0; words are what blanks separate
    iou        intersection over union of a span in time, such as "3.5 to 8" seconds
    format     1 where the whole answer is `<think>...</think><answer>...</answer>`; needs no solution
    length     1 where the answer has as many tokens as the rule's window allows; needs no solution

Source of the forms: Video-R1 (arXiv 2503.21776), and VideoChat-R1 (2504.06958) for spans in time. Departure: there an
answer without `<answer>` scores 0. Here it is read whole, so that a base without the tags can learn too.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from typing import NamedTuple

from ..data.records import Record
from ..data.truth import WORD

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
LABELLED = re.compile(r"\(?([A-Z])\)?\s*(?:[.:)]\s*(.*))?", re.DOTALL)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?\s*(?:to|and|,|-|–)\s*(\d+(?:\.\d+)?)")


class Check(NamedTuple):
    """A rule about the solution."""

    value: Callable[[str, Record], float]  # of the answer's text
    wants: str  # what the solution must be
    readable: Callable[[Record], bool]


def said_in(answer: str) -> str:
    """The text in the last `<answer>`, or the whole answer where there is none."""
    tagged = TAGGED.findall(answer)
    return (tagged[-1] if tagged else answer).strip()


# ---- choice


def choice(said: str, record: Record) -> float:
    """Whether the letter, or the option's own text, is the right one's."""
    return float(option_of(said, record.options) == option_of(record.solution or "", record.options) is not None)


def option_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a text is: by its letter, or by its words. None where it is none of them."""
    letters = LETTERS[: len(options)] if options else LETTERS
    labelled = [(option, LABELLED.fullmatch(option.strip())) for option in options]
    words = [plain(found[2] if found and found[2] else option) for option, found in labelled]
    said = plain(text)
    if said in words:
        return LETTERS[words.index(said)] if words.count(said) == 1 else None
    found = LABELLED.fullmatch(text.strip())
    return found[1] if found and found[1] in letters else None


def match(said: str, record: Record) -> float:
    """Whether the words are the solution's."""
    return float(plain(said) == plain(record.solution or ""))


def plain(text: str) -> str:
    """Lower case, single blanks, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


# ---- numbers


def number_in(text: str) -> float | None:
    """The one number in a text; None where there is none, or several."""
    found = [float(each.replace(",", "")) for each in NUMBER.findall(text)]
    return found[0] if len(set(found)) == 1 and isfinite(found[0]) else None


def number(said: str, record: Record) -> float:
    """Whether the numbers are equal after rounding to two decimals."""
    given, right = number_in(said), number_in(record.solution or "")
    return float(given is not None and right is not None and round(given, 2) == round(right, 2))


def relative(said: str, record: Record) -> float:
    """1 less the relative error, at least 0; about a solution of 0, whether the answer is 0."""
    given, right = number_in(said), number_in(record.solution or "")
    if given is None or right is None:
        return 0.0
    return float(given == 0) if right == 0 else max(0.0, 1 - abs(given - right) / abs(right))


# ---- free text


def words(text: str) -> list[str]:
    """Lower-case words; Chinese and Japanese by character."""
    return [found.group().lower() for found in WORD.finditer(text)]


def rouge(said: str, record: Record) -> float:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming."""
    given, right = words(said), words(record.solution or "")
    grams = lambda tokens, n: Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    shared = [(grams(given, n) & grams(right, n)).total() for n in (1, 2)] + [_common(given, right)]
    sizes = [(len(given) - n, len(right) - n) for n in (0, 1, 0)]
    return sum(2 * hits / sum(size) if min(size) > 0 else 0.0 for hits, size in zip(shared, sizes, strict=True)) / 3


def _common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for i, each in enumerate(other):
            row.append(before[i] + 1 if word == each else max(before[i + 1], row[i]))
    return row[-1]


def wer(said: str, record: Record) -> float:
    """1 less the word error rate: edits that turn the answer into the solution, per word of it; at least 0."""
    given, right = plain(said).split(), plain(record.solution or "").split()
    row = list(range(len(right) + 1))
    for i, word in enumerate(given, 1):
        before = row
        row = [i]
        for j, each in enumerate(right, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != each)))
    return max(0.0, 1 - row[-1] / len(right)) if right else float(not given)


# ---- spans in time


def span_in(text: str) -> tuple[float, float] | None:
    """The first span in a text, as (start, end) in seconds; None where there is none."""
    found = SPAN.search(text)
    return None if found is None else (float(found[1]), float(found[2]))


def iou(said: str, record: Record) -> float:
    """Intersection over union of two spans; 0 for a span that ends before it begins."""
    given, right = span_in(said), span_in(record.solution or "")
    if given is None or right is None:
        return 0.0
    meet = min(given[1], right[1]) - max(given[0], right[0])
    hull = max(given[1], right[1]) - min(given[0], right[0])  # the union wherever the two meet
    return meet / hull if meet > 0 else 0.0


CHECKS = {
    "choice": Check(
        choice, "a letter or the text of one of `options`", lambda r: option_of(r.solution or "", r.options) is not None
    ),
    "match": Check(match, "a text", lambda r: bool(plain(r.solution or ""))),
    "number": Check(number, "one number", lambda r: number_in(r.solution or "") is not None),
    "relative": Check(relative, "one number", lambda r: number_in(r.solution or "") is not None),
    "rouge": Check(rouge, "a text with words", lambda r: bool(words(r.solution or ""))),
    "wer": Check(wer, "a text", lambda r: bool(plain(r.solution or ""))),
    "iou": Check(
        iou,
        "a span such as `3.5 to 8`, its start before its end",
        lambda r: (span := span_in(r.solution or "")) is not None and span[0] < span[1],
    ),
}
