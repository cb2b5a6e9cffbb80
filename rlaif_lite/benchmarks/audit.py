"""The claim audit: the run's own judge checks a role's answer about a video claim by claim.

    hallucinated   share of an answer's claims that the judge, watching the video, says are false
    yes_bias       share of the same claims that it says are true of ANOTHER video of the benchmark: a judge that agrees
                   with everything finds no hallucination anywhere, and shows here
    omitted        share of the reference's claims that the judge, reading the answer and seeing no video, does not find
                   in it
    omitted_floor  the same where the answer IS the reference: what this judge misses though all is said

The judge is the one that labels a run's preferences: the SFT role (the base if there is no run) with the recipe's
`preference.claims`. It reads the narrative that it wrote of the video's clips. A model is lenient with its own
mistakes, so its verdicts can compare roles of one run, and nothing else.
"""

from typing import NamedTuple

from ..data.records import VIDEO_MARK
from ..judge.claims import AnswerToJudge, judge_claims
from ..model.roles import ActiveRole
from ..recipe import Claims
from ..video.cache import FeatureRecord
from .items import Item, Tally

TOLD = 0.5  # of the next token, on yes and no together, from which an inline judge sees a claim


class Seen(NamedTuple):
    """What the judge is given of a video."""

    video: FeatureRecord
    narrative: str | None


class Audited(NamedTuple):
    """What is audited of one item."""

    item: Item
    answer: str
    here: Seen
    elsewhere: Seen  # another video


def audit(role: ActiveRole, rows: list[Audited], section: Claims, batch_size: int) -> list[dict[str, list[bool]]]:
    """For each row its claims, in order: of the video, of the other one; the reference's: in the answer, in itself."""
    blind = section.model_copy(update={"prompt": section.prompt.replace(VIDEO_MARK, "").strip()})
    jobs = {  # the judge's prompt, and of each row: the video, the text that is checked, what the judge reads
        "true": (section, lambda row: (row.here.video, row.answer, row.here.narrative)),
        "true_elsewhere": (section, lambda row: (row.elsewhere.video, row.answer, row.elsewhere.narrative)),
        "said": (blind, lambda row: (None, row.item.reference, row.answer)),
        "said_by_itself": (blind, lambda row: (None, row.item.reference, row.item.reference)),
    }
    out: list[dict[str, list[bool]]] = [{} for _ in rows]
    for name, (using, given) in jobs.items():
        items = []
        for row in rows:
            video, checked, context = given(row)
            items.append(AnswerToJudge(video, row.item.questions[0], checked, context))
        for found, verdict in zip(out, judge_claims(role, items, using, batch_size), strict=True):
            claims = zip(verdict.values, verdict.mass, strict=True)
            # an inline judge marks the words that are no claims by saying neither yes nor no
            found[name] = [value > 0 for value, mass in claims if section.mode == "ask" or mass >= TOLD]
    return out


def tally(item: Item, row: dict) -> Tally:
    """Parts and wholes of an audited answer, for each figure."""
    claims = row["claims"]
    return {
        "hallucinated": (claims["true"].count(False), len(claims["true"])),
        "yes_bias": (sum(claims["true_elsewhere"]), len(claims["true_elsewhere"])),
        "omitted": (claims["said"].count(False), len(claims["said"])),
        "omitted_floor": (claims["said_by_itself"].count(False), len(claims["said_by_itself"])),
        "claims": (len(claims["true"]), 1.0),
    }
