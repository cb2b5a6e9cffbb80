"""A judge's reply -> its verdict: tolerant of the form, strict about the content.

A Python dict, JSON, either in a fence or in a sentence, and "score: 4" or "4/5" are read alike. A reply without a
score, with several that differ, or with one outside its scale is a problem and is said to be one: nothing is clipped,
guessed or filled in. (The published scripts take a reply that they cannot read for a 1, or ask until they can.)
"""

import re

from . import Case, Verdict
from .prompts import SCALES, Scale

THOUGHT = re.compile(r"</think(?:ing)?>")
IS = r"""["'*_`]*\s*(?:\([^)]{0,20}\)\s*)?(?:[:=]|is\b|of\b)[\s"'*_`]*"""
NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?"
WHOLE = r"(?!\w|[.,]\d|\s*(?:-|–|to)\s*\d)"  # "4" of "4 / 5.", but none of "1-5", "3,5" or "4th"
SCORE = re.compile(rf"\b(?:score|rating){IS}{NUMBER}{WHOLE}", re.IGNORECASE)
BARE = re.compile(rf"""\s*["'*_`]*{NUMBER}["'*_`.]*\s*""")
PRED = re.compile(rf"\b(?:pred|prediction|correct){IS}(yes|no|true|false)\b", re.IGNORECASE)
FIRST = re.compile(r"""\W*(yes|no)\b""", re.IGNORECASE)
SHOWN = 60  # characters of a reply in a problem


def read(case: Case, reply: str) -> Verdict:
    """The verdict that a written reply holds."""
    text, scale = THOUGHT.split(reply)[-1], SCALES[case.task]
    try:
        score = _score(text, scale)
        if case.task == "qa":
            found = {word.lower() in ("yes", "true") for word in PRED.findall(text)}
            if not found and (first := FIRST.match(text)):
                found = {first[1].lower() == "yes"}
            if len(found) != 1:
                raise ValueError(f"{'both yes and no' if found else 'neither yes nor no'}: {_shown(text)}")
            return Verdict(case.id, found.pop(), score, reply, None)
    except ValueError as problem:
        return Verdict(case.id, None, None, reply, str(problem))
    return Verdict(case.id, None if scale.right is None else score >= scale.right, score, reply, None)


def read_word(case: Case, reply: str) -> Verdict:
    """The verdict of a reply that begins with yes or no; there is no score in it."""
    found = FIRST.match(reply)
    if found is None:
        return Verdict(case.id, None, None, reply, f"neither yes nor no: {_shown(reply)}")
    return Verdict(case.id, found[1].lower() == "yes", None, reply, None)


def _score(text: str, scale: Scale) -> float:
    bare = BARE.fullmatch(text)
    found = {match.groups() for match in SCORE.finditer(text)} | ({bare.groups()} if bare else set())
    if bottoms := {below for _, below in found if below is not None and int(below) != scale.high}:
        raise ValueError(f"the score is out of {min(bottoms)}, not of {scale.high}: {_shown(text)}")
    values = sorted({float(value) for value, _ in found})
    if not values:
        raise ValueError(f"no score from {scale.low} to {scale.high}: {_shown(text)}")
    if len(values) > 1:
        raise ValueError(f"several scores, {', '.join(f'{value:g}' for value in values)}: {_shown(text)}")
    if not scale.low <= values[0] <= scale.high:
        raise ValueError(f"the score {values[0]:g} is outside {scale.low} to {scale.high}: {_shown(text)}")
    return values[0]


def _shown(text: str) -> str:
    short = " ".join(text.split())
    return repr(short if len(short) <= SHOWN else f"{short[:SHOWN]}...") if short else "the reply is empty"
