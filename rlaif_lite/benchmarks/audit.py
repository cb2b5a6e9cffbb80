"""The claim audit: what a role says of a video, held against it claim by claim by the run's own judge.

    hallucinated   share of an answer's claims that the judge, watching the video, says are false
    yes_bias       share of the same claims that it says are true of ANOTHER video of the benchmark: a judge that agrees
                   with everything finds no hallucination anywhere, and shows here
    omitted        share of the reference's claims that the judge, reading the answer and seeing no video, does not find
                   in it

The judge is the SFT role (the base where there is no run) with the recipe's `preference.claims`, without a narrative.
Its verdicts are the model's own: right for comparing roles of one run, and for nothing else.
"""

import hashlib
import json
from typing import NamedTuple

from ..judge.claims import Item as Claimed
from ..judge.claims import Verdict, judge_claims
from ..model.inputs import VIDEO_MARK
from ..model.roles import ActiveRole
from ..recipe import Claims
from ..video.cache import FeatureRecord
from .items import Item, Tally

TOLD = 0.5  # of the next token, on yes and no together, from which an inline judge sees a claim


class Audited(NamedTuple):
    """What is audited of one item."""

    item: Item
    answer: str
    video: FeatureRecord
    other: FeatureRecord
    "another video"


def audit(role: ActiveRole, rows: list[Audited], section: Claims, batch_size: int) -> list[dict[str, list[bool]]]:
    """For each row its claims, in order: true of the video, true of the other one; and the reference's: in the answer."""
    blind = section.model_copy(update={"prompt": section.prompt.replace(VIDEO_MARK, "").strip()})
    asked = [row.item.questions[0] for row in rows]
    jobs = {
        "true": ([Claimed(row.video, q, row.answer, None) for row, q in zip(rows, asked)], section),
        "true_elsewhere": ([Claimed(row.other, q, row.answer, None) for row, q in zip(rows, asked)], section),
        "said": ([Claimed(None, q, row.item.reference, row.answer) for row, q in zip(rows, asked)], blind),
    }
    found = {name: [_decided(verdict, section) for verdict in judge_claims(role, items, using, batch_size)]
             for name, (items, using) in jobs.items()}  # fmt: skip
    return [{name: found[name][number] for name in jobs} for number in range(len(rows))]


def _decided(verdict: Verdict, section: Claims) -> list[bool]:
    """Yes or no for each claim; an inline judge marks the words that are none by saying neither."""
    kept = [value for value, told in zip(verdict.values, verdict.told) if section.mode == "ask" or told >= TOLD]
    return [value > 0 for value in kept]


def tally(item: Item, row: dict) -> Tally:
    claims = row["claims"]
    return {
        "hallucinated": (claims["true"].count(False), len(claims["true"])),
        "yes_bias": (sum(claims["true_elsewhere"]), len(claims["true_elsewhere"])),
        "omitted": (claims["said"].count(False), len(claims["said"])),
        "claims": (len(claims["true"]), 1.0),
    }


def judge_id(base: str, role: str, section: Claims) -> str:
    """base: name and digest of the base; role: name and digest of the role."""
    prompts = hashlib.sha256(json.dumps(section.model_dump(), sort_keys=True).encode()).hexdigest()[:12]
    return f"claims/{base}/{role}/{prompts}"
