"""Sentences of free text: what a judge is asked about, claim by claim.

Lines, bullets and list numbers are taken apart here. Within a line `sentencex` (Wikimedia, MIT) decides: it knows
abbreviations and the sentence ends of some 300 languages. A mark that is set off by blanks, as in the synthetic world's
texts, always ends a sentence; such texts need no library.
"""

import re

import sentencex

DETACHED = re.compile(r"(?<=\s[.!?])\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
FREE_TEXT = re.compile(
    r"[^\s.!?][.!?]|[\n\u0964\u3002\uff01\uff1f*#]|^\s*[-\u2022]"
)  # any sign that is not the world's
LIST_MARK = re.compile(r"^\s*(?:[-*+>\u2022\u00b7]\s+|\#+\s+|\(?(?:\d+[.)]|[a-zA-Z]\))\s+)+")
OPEN = re.compile(r"\b(?:approx|ca|cf|fig|vs)\.\s*$", re.IGNORECASE)  # abbreviations that never end a sentence


def says_something(text: str) -> bool:
    """Whether a text has a letter or a digit of any script."""
    return any(character.isalnum() for character in text)


def split_claims(text: str) -> list[str]:
    """The sentences of a text, in order, each a part of it word for word. List marks and emphasis around a whole
    sentence are left out, and so is what has no word."""
    if not FREE_TEXT.search(text):
        parts = SENTENCE_END.split(text)
    else:
        parts = [part for line in text.splitlines() for part in _sentences(LIST_MARK.sub("", line))]
    return [part.strip() for part in parts if says_something(part)]


def _sentences(line: str) -> list[str]:
    found: list[str] = []
    for piece in DETACHED.split(line):
        start = len(found)
        for sentence in sentencex.segment("en", piece):
            if len(found) > start and OPEN.search(found[-1]):
                found[-1] += sentence
            else:
                found.append(sentence)
    return [_bare(sentence.strip()) for sentence in found]


def _bare(sentence: str) -> str:
    """`**Scene**` -> `Scene`; emphasis inside a sentence stays, half of a pair goes."""
    for mark in ("**", "__", "*", "_", "`"):
        inner = sentence.removeprefix(mark).removesuffix(mark)
        around = len(inner) == len(sentence) - 2 * len(mark) and mark not in inner
        if around or sentence.count(mark) % 2:
            sentence = inner.strip()
    return sentence
