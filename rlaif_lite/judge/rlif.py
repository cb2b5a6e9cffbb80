"""A judge that reads an answer claim by claim, and knows at which token each claim ends.

What it says is what `judge.claims` reads off the judge's yes/no probabilities; here it is tied to the answer's own
tokens, as they were sampled. `inline` reads these very tokens, so a claim ends where the judge's word is a verdict.
`ask` reads their text, sentence by sentence; a sentence ends at the first token with which the text up to there is
written whole. Neither depends on how a tokenizer would have cut the text, and a token that ends one sentence and
begins the next belongs to the first.

Claims tile the answer: each starts where the last one ended, the first at 0. Text after the last claim is no claim.

Also here: what of the narrative an answer leaves out.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from math import tanh
from typing import NamedTuple

from ..data.sentences import split_claims
from ..model.base import Base
from ..model.memory import in_pieces
from ..model.roles import ActiveRole
from ..recipe import Checklist, Claims
from ..video.cache import FeatureRecord
from .claims import VERDICT, AnswerToJudge, ClaimScores, ask, judge_claims

CLIP_HEAD = re.compile(r"\[[\d.]+s-[\d.]+s\]\s*")  # as `judge.narrative` heads a caption


class Claim(NamedTuple):
    """One claim of an answer."""

    start: int  # its first token
    end: int  # the token after its last
    odds: float  # log P(no) - log P(yes): positive = the judge takes it for false
    mass: float = 1.0  # P(yes) + P(no)


def sampled_answer(
    base: Base, video: FeatureRecord | None, question: str, ids: Sequence[int], context: str | None
) -> AnswerToJudge:
    """An answer as it was sampled, for `read_claims`; `ids` with or without the EOS that ends it."""
    said = [i for i in ids if i != base.eos_id]
    return AnswerToJudge(video, question, text_of(base, said), context, said)


def text_of(base: Base, ids: Sequence[int]) -> str:
    """What tokens say, with all its spaces: a text of which that of a first part is the beginning."""
    return base.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def read_claims(
    role: ActiveRole, items: Sequence[AnswerToJudge], section: Claims, batch_size: int
) -> list[list[Claim]]:
    """The claims of answers made by `sampled_answer`, in the order of `items`; the role is the judge's."""
    base = role.roles.base
    out = []
    for item, verdict in zip(items, judge_claims(role, items, section, batch_size), strict=True):
        if section.mode == "inline":
            found = [(t + 1, verdict.odds[t], mass) for t, mass in enumerate(verdict.mass) if mass > VERDICT]
        else:
            found = list(zip(token_ends(base, item.ids, verdict.claims), verdict.odds, verdict.mass, strict=True))
        starts = [0, *(end for end, _, _ in found)]
        out.append([Claim(start, *rest) for start, rest in zip(starts, found, strict=False)])  # one start too many
    return out


def token_ends(base: Base, ids: Sequence[int], claims: Sequence[str]) -> list[int]:
    """For each of the claims, which stand in the text of `ids` in this order: how many tokens it takes to write the
    text up to the claim's end."""
    text, at, ends = text_of(base, ids), 0, []
    for claim in claims:
        at = text.index(claim, at) + len(claim)
        # A character cut in two is another character, and a first part that holds the text whole keeps holding it.
        ends.append(bisect_left(range(len(ids)), True, key=lambda t: text_of(base, ids[: t + 1])[:at] == text[:at]) + 1)
    return ends


# ---- omissions


def statements(narrative: str, joints: Sequence[str]) -> list[str]:
    """What a narrative says: its sentences, cut at `joints` (" and "), each once, without the clips' times. A caption
    ends where the next one is headed, also where it was cut short; what has no word says nothing."""
    parts = [sentence for caption in CLIP_HEAD.split(narrative) for sentence in split_claims(caption)]
    for joint in joints:
        parts = [piece for part in parts for piece in part.split(joint)]
    return list(dict.fromkeys(stripped for part in parts if _words(stripped := part.strip(" .!?,"))))


def missing_words(statement: str, answer: str) -> float:
    """Share of a statement's words that are absent from the sentence of the answer that has most of them."""
    words = _words(statement)
    return min((len(words - _words(sentence)) / len(words) for sentence in split_claims(answer)), default=1.0)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def omissions(
    role: ActiveRole,
    answers: Sequence[str],
    narratives: Sequence[str | None],
    claims: Claims,
    checklist: Checklist,
    batch_size: int,
) -> list[float]:
    """How many of its narrative's statements each answer leaves out, a statement said in part counting in part.

    `ask`: 1 - P(yes) / (P(yes) + P(no)) as the judge answers `checklist.prompt`, where `{context}` is the answer; it
    does not see the video. `words`: see `missing_words`. An answer without a narrative omits nothing.
    """
    lists = [[] if narrative is None else statements(narrative, checklist.joints) for narrative in narratives]
    if checklist.by == "words":
        return [sum(missing_words(s, answer) for s in found) for found, answer in zip(lists, answers, strict=True)]
    asked = claims.model_copy(update={"prompt": checklist.prompt, "context_prefix": "{context}"})
    items = [AnswerToJudge(None, "", "", answer) for answer in answers]

    def read(part: list[int]) -> list[ClaimScores]:
        return ask(role, [items[i] for i in part], [lists[i] for i in part], asked)

    verdicts = in_pieces(list(range(len(items))), batch_size, read)
    return [sum((1 + tanh(odds / 2)) / 2 for odds in verdict.odds) for verdict in verdicts]
