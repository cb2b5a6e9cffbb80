"""What the embedded base is taught, and how much of each: sheets of clip captions, questions, claims, checks and pairs.

The full description (`describe the video`) is left out on purpose: SFT has to teach it, from noisy labels, so that
there is something to align. The verdict labels come from the generator of the world: the base is taught to verify, it
does not emerge.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from lab.embedded_base.sheet import Sheet
from rlaif_lite.data.world_text import (
    Facts,
    Noise,
    answer_yes_no,
    caption,
    claim,
    corrupt,
    describe,
    garbled,
    narrative,
    pair,
    question,
    sampled,
    score,
    star_question,
    verdicts,
)

SHEET = 192  # columns of a training sheet
WHOLE = (2, 6, 10, 14, 18, 22)  # middle of each of 6 equal parts of 24 frames
CLIP = (0, 2, 3, 4, 6, 7)  # the same rule for the 8 frames of a clip


class Mix(NamedTuple):
    """Shares of the kinds of sheets."""

    clip: float
    plain: float  # video, no context
    context: float  # video and context
    text: float  # context only, no video: looking things up
    pair: float


BEFORE_PAIRS = Mix(0.22, 0.26, 0.32, 0.20, 0.0)
WITH_PAIRS = Mix(0.12, 0.16, 0.20, 0.04, 0.48)


def whole_view(rng: random.Random | None) -> tuple[int, ...]:
    """Six frames of the whole video; with `rng`, jittered as augmentation."""
    if rng is None or rng.random() < 0.3:
        return WHOLE
    return tuple(8 * (k // 2) + (rng.randint(1, 3) if k % 2 == 0 else rng.randint(5, 7)) for k in range(6))


def clip_view(clip: int, rng: random.Random | None) -> tuple[int, ...]:
    """Six of the eight frames of a clip."""
    inside = CLIP if rng is None or rng.random() < 0.3 else sorted(rng.sample(range(8), 6))
    return tuple(8 * clip + k for k in inside)


def clip_sheet(video: int, facts: Facts, rng: random.Random) -> Sheet:
    """Four views of clips, captioned."""
    sheet = Sheet(SHEET)
    for clip in (*rng.sample(range(3), 3), rng.randrange(3)):
        root = sheet.root(video, clip_view(clip, rng))
        sheet.ask("clip caption", "describe the clip", caption(facts, clip), root)
    return sheet


def answer_to_check(facts: Facts, rng: random.Random) -> str:
    """An answer as an SFT model would give it, or anything between right and hopeless."""
    if rng.random() < 0.5:
        return sampled(facts, rng)
    noise = Noise(rng.choice((0.0, 0.1, 0.3, 0.5)), rng.choice((0.0, 0.7)), 0.4, 0.3)
    return describe(corrupt(facts, rng, noise))


def add_task(sheet: Sheet, parent: int, where: str, facts: Facts, rng: random.Random) -> None:
    """One random task below `parent`; `where` ("video", "context", "text") names the skill."""
    form = rng.random()
    if form < 0.25:
        sheet.ask(f"question {where}", *question(facts, rng), parent, weight=2.0)
    elif form < 0.35:
        sheet.ask(f"star {where}", *star_question(facts), parent, weight=2.0)
    elif form < 0.65 or sheet.room < 28:
        text, is_true = claim(facts, rng)
        sheet.ask(f"claim {where}", text, answer_yes_no(is_true), parent, prompt_weight=0.2, weight=3.0)
    else:
        answer = answer_to_check(facts, rng)
        if sheet.room >= 36 and rng.random() < 0.15:
            answer = garbled(answer, rng)
        sheet.check(f"check {where}", answer, verdicts(answer, facts), parent)


def whole_sheet(kind: str, video: int, facts: Facts, rng: random.Random, weak: bool) -> Sheet:
    """Tasks about the whole video. `weak` leaves out whatever must be read from the whole video."""
    sheet = Sheet(SHEET)
    root = parent = sheet.root(None if kind == "text" else video, whole_view(rng))
    if kind != "plain":
        # words of the context are predicted from the video too, where that is to be learnt
        weight = 0.3 if kind == "context" and not weak else 0.0
        parent = sheet.text("context : " + narrative(facts, rng, rng.choice((0.0, 0.02, 0.05))), root, weight)
    while sheet.room >= 13:
        if kind == "context" and not weak and rng.random() < 0.25:
            add_task(sheet, root, "video", facts, rng)
        else:
            add_task(sheet, parent, {"plain": "video"}.get(kind, kind), facts, rng)
    return sheet


def pair_sheet(video: int, facts: Facts, rng: random.Random, weak: bool, least_margin: int) -> Sheet:
    """A pair in both orders, with context in 65 %; the room left is filled with other tasks."""
    sheet = Sheet(SHEET)
    root = parent = sheet.root(video, whole_view(rng))
    where = "video"
    if weak or rng.random() < 0.65:
        where = "context"
        parent = sheet.text(
            "context : " + narrative(facts, rng, rng.choice((0.0, 0.02, 0.05))), root, 0.0 if weak else 0.3
        )
    while True:
        if rng.random() < 0.7:
            a, b, margin = pair(facts, rng)
        else:
            a, b = answer_to_check(facts, rng), answer_to_check(facts, rng)
            margin = score(a, facts) - score(b, facts)
        if abs(margin) >= least_margin and a != b:
            break
    add_pair(sheet, parent, a, b, margin, facts)
    while sheet.room >= 13:
        add_task(sheet, parent, where, facts, rng)
    return sheet


def add_pair(sheet: Sheet, parent: int, a: str, b: str, margin: int, facts: Facts, weight: float = 0.2) -> None:
    """Both orders of a pair in the parallel layout: A and B start at the same position and do not see each other."""
    for order, (first, second, gap) in enumerate(((a, b, margin), (b, a, -margin))):
        branches = (
            sheet.branch("A", first, verdicts(first, facts), parent, weight),
            sheet.branch("B", second, verdicts(second, facts), parent, weight),
        )
        sheet.better(branches, gap, order)


def draw(mix: Mix, video: int, facts: Facts, rng: random.Random, weak: bool, least_margin: int) -> Sheet:
    """One training sheet about one video."""
    kind = rng.choices(Mix._fields, mix)[0]
    if kind == "clip":
        return clip_sheet(video, facts, rng)
    if kind == "pair":
        return pair_sheet(video, facts, rng, weak, least_margin)
    return whole_sheet("context" if weak and kind == "plain" else kind, video, facts, rng, weak)


def skill_sheets(video: int, facts: Facts, rng: random.Random) -> list[Sheet]:
    """What the skills are measured on, for one held-out video: exact views, one context, one pair."""
    clip = rng.randrange(3)
    first = Sheet(256)
    root = first.root(video, clip_view(clip, None))
    first.ask("clip caption", "describe the clip", caption(facts, clip), root)
    text = Sheet(256)
    root = text.root(None)
    parent = text.text("context : " + narrative(facts, rng, 0.0), root)
    text.ask("question text", *question(facts, rng), parent)
    a, b, margin = pair(facts, rng)
    sheets = [first, text]
    for where in ("video", "context"):
        sheet = Sheet(256)
        root = parent = sheet.root(video, WHOLE)
        if where == "context":
            parent = sheet.text("context : " + narrative(facts, rng), root)
        sheet.ask(f"question {where}", *question(facts, rng), parent)
        sheet.ask(f"star {where}", *star_question(facts), parent)
        statement, is_true = claim(facts, rng)
        sheet.ask(f"claim {where}", statement, answer_yes_no(is_true), parent)
        for answer in (a, b):
            sheet.check(f"check {where}", answer, verdicts(answer, facts), parent)
        rest = Sheet(256)
        root = parent = rest.root(video, WHOLE)
        if where == "context":
            parent = rest.text("context : " + narrative(facts, rng), root)
        add_pair(rest, parent, a, b, margin, facts)
        sheets += [sheet, rest]
    return sheets
