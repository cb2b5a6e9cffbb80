"""The language of the synthetic world: how facts become text, how text is held against facts, the judge's formats.

A fact sheet is plain JSON, `{"events": [[colour, shape, motion], x3], "star": colour or None}`. Every string here is
lower-case words split by single spaces (the embedded tokenizer is word-level). The grammar is the contract between the
world, the embedded base and the recipes:

    description   first a red circle left . then a blue square up . finally a green cross grows . also a yellow star .
    clip caption  a red circle left and a yellow star .
    narrative     first a red circle left and a yellow star . then ... . finally ... .   (clip captions, joined)
"""

from __future__ import annotations

import random
from typing import NamedTuple, TypedDict

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks")
KINDS = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS}
ORDINALS = ("first", "then", "finally")
EVENTS = len(ORDINALS)  # of a video
MALFORMED_COST = 3  # a malformed sentence counts as three wrong facts: what a whole wrong event costs

# What a wrong label says most often: the language prior that SFT picks up and RLAIF has to unlearn.
PRIOR = {"colour": "red", "shape": "circle", "motion": "left", "star": "yellow"}


class Facts(TypedDict):
    """What is true of one video."""

    events: list[list[str]]  # three [colour, shape, motion], in order of time
    star: str | None  # colour of the static corner star; None = there is none


class Noise(NamedTuple):
    """How a description is corrupted. The defaults are the noisy SFT labels of the demo."""

    attribute: float = 0.2  # chance that a colour, shape or motion is replaced
    prior: float = 0.7  # share of replacements that say the language prior instead of a uniform draw
    false_star: float = 0.68  # chance that a video without a star is said to have one
    omit_star: float = 0.05  # chance that a true star is left out


class Counts(NamedTuple):
    """One answer held against the truth, of the world or of any video."""

    correct: int  # facts said rightly; of the world attributes, and the star
    wrong: int  # facts said wrongly; in the world plus MALFORMED_COST for each malformed sentence
    total: int  # facts there are to say; 9 in the world, or 10 with a star
    mentions: int  # objects mentioned; in the world by well-formed event and star sentences
    hallucinated: int  # of these, objects that are nowhere in the video; in the world by colour and shape
    malformed: int | None  # sentences outside the grammar, or that repeat an ordinal; None: the truth has no grammar


def describe(facts: Facts) -> str:
    """The full description of a video."""
    sentences = [f"{ordinal} a {' '.join(event)} ." for ordinal, event in zip(ORDINALS, facts["events"], strict=False)]
    if facts["star"]:
        sentences.append(f"also a {facts['star']} star .")
    return " ".join(sentences)


def caption(facts: Facts, clip: int) -> str:
    """What clip number `clip` (0, 1, 2) shows."""
    star = f" and a {facts['star']} star" if facts["star"] else ""
    return f"a {' '.join(facts['events'][clip])}{star} ."


CARELESS = Noise()


def corrupt(facts: Facts, rng: random.Random, noise: Noise = CARELESS) -> Facts:
    """Facts as a careless annotator would have them. A replacement may by chance be the truth again."""

    def replace(kind: str, value: str) -> str:
        if rng.random() >= noise.attribute:
            return value
        return PRIOR[kind] if rng.random() < noise.prior else rng.choice(KINDS[kind])

    def invent() -> str:
        return PRIOR["star"] if rng.random() < noise.prior else rng.choice(COLOURS)

    events = [[replace(kind, value) for kind, value in zip(KINDS, event, strict=False)] for event in facts["events"]]
    star = facts["star"]
    if star is None:
        star = invent() if rng.random() < noise.false_star else None
    elif rng.random() < noise.omit_star:
        star = None
    elif rng.random() < noise.attribute:
        star = invent()
    return {"events": events, "star": star}


def narrative(facts: Facts, rng: random.Random, error: float = 0.02) -> str:
    """Clip captions joined as the context stage does it; an attribute or star mention is wrong with chance `error`."""
    noise = Noise(error, 0.3, error, error)
    return " ".join(f"{ordinal} {caption(corrupt(facts, rng, noise), clip)}" for clip, ordinal in enumerate(ORDINALS))


def sentences_of(text: str) -> list[list[str]]:
    """The words of each sentence, without the full stop; a last sentence without one counts like any other."""
    parts: list[list[str]] = [[]]
    for word in text.split():
        if word == ".":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _is_event(words: list[str]) -> bool:
    return (
        len(words) == 5
        and words[0] in ORDINALS
        and words[1] == "a"
        and all(w in pool for w, pool in zip(words[2:], KINDS.values(), strict=False))
    )


def _is_star(words: list[str]) -> bool:
    return len(words) == 4 and words[:2] == ["also", "a"] and words[2] in COLOURS and words[3] == "star"


def truth(text: str, facts: Facts) -> Counts:
    """Holds a description against the facts. A second star sentence is wrong even when its colour is right."""
    correct = wrong = mentions = hallucinated = malformed = 0
    objects = {(colour, shape) for colour, shape, _ in facts["events"]}
    said: set[str] = set()
    for words in sentences_of(text):
        if _is_event(words) and words[0] not in said:
            said.add(words[0])
            right = sum(a == b for a, b in zip(words[2:], facts["events"][ORDINALS.index(words[0])], strict=False))
            correct, wrong, mentions = correct + right, wrong + 3 - right, mentions + 1
            hallucinated += (words[2], words[3]) not in objects
        elif _is_star(words):
            right = words[2] == facts["star"] and "also" not in said
            said.add("also")
            correct, wrong, mentions = correct + right, wrong + (not right), mentions + 1
            hallucinated += words[2] != facts["star"]
        else:
            malformed += 1
            wrong += MALFORMED_COST
    return Counts(correct, wrong, 9 + (facts["star"] is not None), mentions, hallucinated, malformed)


def score(text: str, facts: Facts) -> int:
    """Right minus wrong: what judges are measured against."""
    result = truth(text, facts)
    return result.correct - result.wrong


def verdicts(text: str, facts: Facts) -> list[str]:
    """One label per word of a description: "yes" or "no" at attribute words (colour, shape, motion), else "-".

    Every attribute word of a malformed sentence is "no": it says nothing that could be held against the video. Their
    sum (yes +1, no -1) is `score(text, facts)` for every well-formed text, and where an event is repeated.
    """
    labels: list[str] = []
    sentence: list[str] = []
    said: set[str] = set()
    for word in text.split():
        if word != ".":
            sentence.append(word)
            continue
        labels += _sentence_verdicts(sentence, facts, said) + ["-"]
        sentence = []
    return labels + _sentence_verdicts(sentence, facts, said)


def _sentence_verdicts(words: list[str], facts: Facts, said: set[str]) -> list[str]:
    labels = ["-"] * len(words)
    if _is_event(words) and words[0] not in said:
        event = facts["events"][ORDINALS.index(words[0])]
        labels[2:] = ["yes" if a == b else "no" for a, b in zip(words[2:], event, strict=False)]
        said.add(words[0])
    elif _is_star(words):
        labels[2] = "yes" if words[2] == facts["star"] and "also" not in said else "no"
        said.add("also")
    else:
        labels = ["no" if any(word in pool for pool in KINDS.values()) else "-" for word in words]
    return labels


def claims_of(text: str) -> list[str]:
    """The atomic claims of a description: each attribute of an event with its ordinal ("first red"), a star's sentence
    whole. A sentence that is not of the grammar is one claim as it stands."""
    claims = []
    for words in sentences_of(text):
        claims += [f"{words[0]} {word}" for word in words[2:]] if _is_event(words) else [" ".join(words)]
    return claims


def claim_question(text: str) -> str:
    """A claim as it is asked about."""
    return f"claim : {text} ?"


def question(facts: Facts, rng: random.Random) -> tuple[str, str]:
    """A short question about one event, and its answer."""
    kind, event = rng.randrange(3), rng.randrange(3)
    return f"what is the {list(KINDS)[kind]} {ORDINALS[event]} ?", f"{facts['events'][event][kind]} ."


def star_question(facts: Facts) -> tuple[str, str]:
    """The question about the star; "no ." when there is none."""
    return "what is the colour star ?", f"{facts['star'] or 'no'} ."


class Solved(NamedTuple):
    """A question whose answer a rule can check."""

    task: str  # "choice", "count" or "order"
    question: str
    solution: str
    options: tuple[str, ...] = ()


def solved_questions(facts: Facts, rng: random.Random) -> list[Solved]:
    """Up to three questions about a video: two options for an attribute, a count, and which of two events came first.

    An option is chosen by its word. The vocabulary has no digits, so a count is answered by tally marks: "- -" is two,
    "no" is none. The last question is left out where two events are the same."""
    kinds = list(KINDS.items())
    kind, event, swapped = rng.randrange(3), rng.randrange(3), rng.randrange(2)
    right = facts["events"][event][kind]
    tempting = [e[kind] for e in facts["events"] if e[kind] != right]  # in the video, at another time
    other = rng.choice(tempting if tempting and rng.random() < 0.5 else [v for v in kinds[kind][1] if v != right])
    options = (other, right) if swapped else (right, other)
    asked = f"what is the {kinds[kind][0]} {ORDINALS[event]} ? A : {options[0]} B : {options[1]}"
    found = [Solved("choice", asked, right, options)]

    counted = rng.choice((0, 1))  # colours or shapes
    there = [e[counted] for e in facts["events"]]
    value = rng.choice(there if rng.random() < 0.75 else kinds[counted][1])
    found.append(Solved("count", f"how many {value} ?", " ".join("-" * there.count(value)) or "no"))

    if len({tuple(e) for e in facts["events"]}) == EVENTS:
        one, two = sorted(rng.sample(range(EVENTS), 2))
        before, after = (two, one) if rng.random() < 0.5 else (one, two)
        first, then = (" ".join(facts["events"][i]) for i in (before, after))
        found.append(Solved("order", f"is a {first} then a {then} ?", "yes" if before < after else "no"))
    return found


def claim(facts: Facts, rng: random.Random) -> tuple[str, bool]:
    """A claim, and whether it is true: a sentence (40 %), an attribute (40 %) or a star (20 %); half are true."""
    form = rng.random()
    if form < 0.2:
        colour = facts["star"] if facts["star"] and rng.random() < 0.65 else rng.choice(COLOURS)
        return f"claim : also a {colour} star ?", colour == facts["star"]
    position, kind = rng.randrange(3), rng.randrange(3)
    event = list(facts["events"][position])
    if rng.random() < 0.5:
        pool = list(KINDS.values())[kind]
        # a value of another event is the tempting mistake: it is in the video, at another time
        others = [e[kind] for e in facts["events"] if e[kind] != event[kind]]
        wrong = others if others and rng.random() < 0.3 else [v for v in pool if v != event[kind]]
        event[kind] = rng.choice(wrong)
    words = f"a {' '.join(event)}" if form < 0.6 else event[kind]
    return f"claim : {ORDINALS[position]} {words} ?", event == facts["events"][position]


def answer_yes_no(is_true: bool) -> str:
    """The world's answer to a question that is true or not."""
    return "yes ." if is_true else "no ."


def sampled(facts: Facts, rng: random.Random) -> str:
    """A description as an SFT model would sample it: corrupted, mostly towards the language prior."""
    noise = Noise(rng.choice((0.15, 0.2, 0.25, 0.3)), 0.7 if rng.random() < 0.7 else 0.0, 0.5, 0.3)
    return describe(corrupt(facts, rng, noise))


def garbled(text: str, rng: random.Random) -> str:
    """A description with one malformed sentence, as a sampling model stumbles: words repeated, missing or foreign."""
    sentences = sentences_of(text)
    spot = rng.randrange(len(sentences))
    words = sentences[spot]
    start = rng.randrange(len(words))
    end = rng.randint(start + 1, min(start + 3, len(words)))
    form = rng.randrange(4)
    if form == 0:  # a run of words twice
        words = words[:end] + words[start:]
    elif form == 1:  # a run of words is missing
        words = words[:start] + words[end:]
    elif form == 2:  # words of another task
        words = words[:end] + rng.choice((["no"], ["?"], ["context"], ["and", "a", rng.choice(COLOURS), "star"]))
    else:  # the sentence twice
        sentences.insert(spot, words)
    sentences[spot] = words
    return " ".join(" ".join([*words, "."]) for words in sentences if words)


def pair(facts: Facts, rng: random.Random, ties: float = 0.3) -> tuple[str, str, int]:
    """Two different descriptions of a video, and score(a) - score(b); a tied pair is kept with chance `ties`."""
    while True:
        a, b = sampled(facts, rng), sampled(facts, rng)
        margin = score(a, facts) - score(b, facts)
        if a != b and (margin != 0 or rng.random() < ties):
            return a, b, margin
