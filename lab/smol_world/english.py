"""The synthetic world in English as people write it: descriptions, clip captions, questions, statements, and the truth.

The facts are the world's own (`rlaif_lite.data.world_text`). Every text has several phrasings. Motions are left out:
three frames of a whole video, one of each event, do not show them. What is said of an event is a colour and a shape.

`truth` is what recipes/smol_world.yaml names in `evaluate.truth`, and `reward` is what recipes/smol_world_rules.yaml
learns from. Both read any sentence that names a coloured shape.
"""

import random
import re
from typing import NamedTuple

from rlaif_lite.data.records import Record
from rlaif_lite.data.world_text import COLOURS, EVENTS, SHAPES, Facts, corrupt
from rlaif_lite.recipe import Claims, Pairwise

DESCRIBE = ("Describe the video.", "What happens in this video?", "What can be seen in the video?")
CAPTION = "Describe this video in detail."
EVENT = (
    ("First, {it} appears.", "The video starts with {it}.", "At first there is {it}."),
    ("Then {it} appears.", "Next comes {it}.", "After that, {it} shows up."),
    ("Finally, {it} appears.", "The video ends with {it}.", "At the end there is {it}."),
)
STAR = ("A small {colour} star sits in a corner.", "There is a {colour} star in the corner.")
SEEN = ("There is {it}.", "The video shows {it}.", "{It} is visible.")
MARKERS = ("First:", "Then:", "Finally:")  # before the captions of a narrative, as in the recipe
ORDINALS = ("first", "second", "last")

THING = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(SHAPES)}|star)s?\b", re.IGNORECASE)
SENTENCE = re.compile(r"[^.!?\n]+")
CUES = tuple(
    re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    for words in ("first|starts?|begins?|beginning", "then|next|after|second", "finally|ends?|last")
)


class Statement(NamedTuple):
    """A sentence about a video, and whether it is true."""

    text: str
    true: bool


def thing(event: list[str]) -> str:
    """An event's object with its article: "a red circle"."""
    return f"a {event[0]} {event[1]}"


def describe(facts: Facts, rng: random.Random) -> str:
    """A whole video."""
    said = [rng.choice(EVENT[i]).format(it=thing(event)) for i, event in enumerate(facts["events"])]
    if facts["star"]:
        said.append(rng.choice(STAR).format(colour=facts["star"]))
    return " ".join(said)


def caption(facts: Facts, clip: int, rng: random.Random) -> str:
    """Clip number `clip`."""
    it = thing(facts["events"][clip])
    said = [rng.choice(SEEN).format(it=it, It=it.capitalize())]
    if facts["star"]:
        said.append(rng.choice(STAR).format(colour=facts["star"]))
    return " ".join(said)


def narrative(facts: Facts, rng: random.Random) -> str:
    """Clip captions joined as the context stage joins them."""
    return " ".join(f"{mark} {caption(facts, clip, rng)}" for clip, mark in enumerate(MARKERS))


def question(facts: Facts, rng: random.Random) -> tuple[str, str]:
    """A short question and its answer."""
    at, form = rng.randrange(EVENTS), rng.randrange(4)
    colour, shape, _ = facts["events"][at]
    if form == 0:
        return f"What color is the {ORDINALS[at]} object?", f"{colour.capitalize()}."
    if form == 1:
        return f"What shape is the {ORDINALS[at]} object?", f"A {shape}."
    if form == 2:
        return f"Which object comes {ORDINALS[at]}?", f"{thing(facts['events'][at]).capitalize()}."
    return "Is there a star in the corner?", f"Yes, a {facts['star']} one." if facts["star"] else "No."


def statement(facts: Facts, rng: random.Random) -> Statement:
    """A sentence of a description; half are true. A wrong word is often right of another event."""
    true = rng.random() < 0.5
    if rng.random() < 0.3 and (facts["star"] or not true):
        colour = facts["star"] if true else rng.choice([c for c in COLOURS if c != facts["star"]])
        return Statement(rng.choice(STAR).format(colour=colour), true)
    at = rng.randrange(EVENTS)
    event = list(facts["events"][at])
    if not true:
        kind, pool = rng.choice(((0, COLOURS), (1, SHAPES)))
        others = [e[kind] for e in facts["events"] if e[kind] != event[kind]]
        event[kind] = rng.choice(others if others and rng.random() < 0.4 else [v for v in pool if v != event[kind]])
    return Statement(rng.choice(EVENT[at]).format(it=thing(event)), true)


def context_of(text: str | None) -> str:
    """How a judge's prompt puts a narrative; nothing for None."""
    return "" if text is None else Claims().context_prefix.format(context=text)


def asked(said: str, context: str | None = None) -> str:
    """A statement as the judge is asked about it, in the recipe's default words."""
    return Claims().prompt.format(context=context_of(context), claim=said)


def compared(facts: Facts, rng: random.Random, context: str | None = None) -> tuple[str, str]:
    """Two descriptions, one of them careless, as the pairwise judge is asked about them -> (prompt, the better)."""
    while True:
        texts = [describe(corrupt(facts, rng), rng) for _ in range(2)]
        scores = [right_minus_wrong(text, facts) for text in texts]
        if scores[0] != scores[1]:
            prompt = Pairwise().prompt.format(
                context=context_of(context), question=rng.choice(DESCRIBE), a=texts[0], b=texts[1]
            )
            return prompt, "A" if scores[0] > scores[1] else "B"


def right_minus_wrong(text: str, facts: Facts) -> int:
    """Facts said rightly minus facts said wrongly."""
    found = held_against(text, facts)
    return found["correct"] - found["wrong"]


def held_against(text: str, facts: Facts) -> dict:
    """A description held against the facts, as `evaluate.truth` wants it: colour and shape of each event, and the
    star. An event is placed by the sentence's words ("then", "ends with"), else by its turn. A sentence without a
    coloured shape is malformed."""
    correct = wrong = mentions = hallucinated = malformed = 0
    there, said, spans = {tuple(event[:2]) for event in facts["events"]}, set(), []
    for sentence in SENTENCE.finditer(text):
        found = list(THING.finditer(sentence.group()))
        malformed += not found and any(sign.isalpha() for sign in sentence.group())
        cue = next((i for i, words in enumerate(CUES) if words.search(sentence.group())), None)
        for match in found:
            colour, shape = (word.lower() for word in match.groups())
            mentions += 1
            if shape == "star":
                right = [colour == facts["star"] and "star" not in said]
                said.add("star")
                hallucinated += colour != facts["star"]
            else:
                at = cue if cue is not None else next((i for i in range(EVENTS) if i not in said), EVENTS)
                fresh = at < EVENTS and at not in said
                event = facts["events"][at] if fresh else (None, None)
                right = [colour == event[0], shape == event[1]]
                said.add(at)
                hallucinated += (colour, shape) not in there
            correct, wrong = correct + sum(right), wrong + len(right) - sum(right)
            if not all(right):
                spans.append((sentence.start() + match.start(), sentence.start() + match.end()))
    return {
        "correct": correct,
        "wrong": wrong,
        "total": 2 * EVENTS + (facts["star"] is not None),
        "mentions": mentions,
        "hallucinated": hallucinated,
        "malformed": malformed,
        "wrong_words": spans,
    }


def truth(answer: str, record: Record) -> dict | None:
    """For `evaluate.truth`; None where the record has no facts."""
    return None if record.facts is None else held_against(answer, record.facts)


def reward(record: Record, answer: str, token_ids: list[int], video_seconds: float | None) -> float:
    """For `ppo.rules`: facts said rightly minus facts said wrongly, as a share of the facts there are."""
    found = held_against(answer, record.facts)
    return (found["correct"] - found["wrong"]) / found["total"]
