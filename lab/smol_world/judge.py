"""Does a judge know anything? `python -m lab.smol_world.judge RUN` asks about statements whose truth is known.

RUN is a run of recipes/smol_world.yaml that has done `context`. Statements are asked as the run's own judge asks, by
the base (before SFT) and by the SFT role (after). Two kinds:

    fresh    drawn from the facts of the preference videos, half of them true
    trained  those of the records that SFT replays (`data.sft_easy`), whose verdicts the SFT role may have read

and up to three narratives: the run's `own`, `none`, and a `true` one. A judge that is right with a true narrative and
wrong without one can read a text, and cannot see.

`right` is the share of statements whose sign P(yes) - P(no) is right. `auc` is how often a true statement gets more
than a false one, so a judge that leans to "yes" does not lose by that. Intervals are of 95 % and resample videos. `yes`
is the share that it grants, and `mass` is P(yes) + P(no). Of the run's own narratives there are `recall`, the share of
the facts that they say, and `hallucination`, the share of their objects that are nowhere in the video.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlaif_lite.data.records import VIDEO_MARK, Record, question_of
from rlaif_lite.files import chunks, write_json
from rlaif_lite.judge.claims import AnswerToJudge, ask
from rlaif_lite.model.roles import BASE, ActiveRole
from rlaif_lite.recipe import Claims, load_recipe
from rlaif_lite.workspace import Workspace

from .english import Statement, asked, context_of, held_against, narrative, statement

PER_VIDEO, BATCH = 8, 8
BEFORE, AFTER = asked("\0").split("\0")
TOLD, _ = context_of("\0").split("\0")


class Asked(NamedTuple):
    """Statements about one video, and what the judge is given of it."""

    item: AnswerToJudge
    statements: list[Statement]


def fresh(work: Workspace, records: list[Record], told: str) -> list[Asked]:
    """New statements about each record's video. `told`: which narrative the judge reads, own, none or true."""
    found = []
    for record in records:
        text = {
            "own": work.narratives()[work.name_of(record)],
            "none": None,
            "true": narrative(record.facts, random.Random(record.key)),
        }[told]
        said = [statement(record.facts, random.Random(f"{record.key}/{n}")) for n in range(PER_VIDEO)]
        found.append(Asked(AnswerToJudge(work.features(record), question_of(record), "", text), said))
    return found


def trained(work: Workspace, records: list[Record], told: str) -> Iterator[Asked]:
    """The statements of training conversations: of those that open with a true narrative where `told` is "true", of
    those without one where it is "none"."""
    for record in records:
        said = []
        for turn, answer in zip(record.messages[::2], record.messages[1::2], strict=True):
            if BEFORE in turn.content:
                claim = turn.content.partition(BEFORE)[2].removesuffix(AFTER)
                said.append(Statement(claim, answer.content == "Yes."))
        head = record.messages[0].content.removeprefix(f"{VIDEO_MARK}\n").partition(BEFORE)[0]
        text = head.removeprefix(TOLD).strip() or None
        if said and (text is None) == (told == "none"):
            yield Asked(AnswerToJudge(work.features(record), "", "", text), said)


def figures(role: ActiveRole, questions: list[Asked], section: Claims) -> dict:
    """What the judge `role` says of the statements, as the table has it."""
    scores = []
    for part in chunks(questions, BATCH):
        texts = [[said.text for said in each.statements] for each in part]
        scores += ask(role, [each.item for each in part], texts, section)
    values_V = [np.array(score.values) for score in scores]
    truth_V = [np.array([said.true for said in each.statements]) for each in questions]
    right_V = np.array([((value > 0) == true).sum() for value, true in zip(values_V, truth_V, strict=True)])
    count_V = np.array([len(true) for true in truth_V])
    drawn = np.random.default_rng(0).integers(0, len(count_V), (500, len(count_V)))

    def auc(chosen) -> float:
        value_N, true_N = (np.concatenate([column[v] for v in chosen]) for column in (values_V, truth_V))
        above = value_N[true_N][:, None] - value_N[~true_N]
        return float(((above > 0) + 0.5 * (above == 0)).mean()) if above.size else np.nan

    every = range(len(count_V))
    return {
        "asked": int(count_V.sum()),
        "right": float(right_V.sum() / count_V.sum()),
        "right_interval": np.percentile(right_V[drawn].sum(1) / count_V[drawn].sum(1), [2.5, 97.5]).tolist(),
        "auc": auc(every),
        "auc_interval": np.nanpercentile([auc(chosen) for chosen in drawn], [2.5, 97.5]).tolist(),
        "yes": float((np.concatenate(values_V) > 0).mean()),
        "mass": float(np.mean(np.concatenate([score.mass for score in scores]))),
    }


def measure(run: Path, videos: int, roles: tuple[str, ...] = (BASE, "sft")) -> list[dict]:
    """A row for each role, kind of statement and narrative."""
    work = Workspace(load_recipe(run / "recipe.yaml", [f"output={run}"]))
    records, replayed = work.records("preference")[:videos], work.records("sft_easy")
    held = [held_against(work.narratives()[work.name_of(record)], record.facts) for record in records]
    total = {key: sum(each[key] for each in held) for key in ("correct", "total", "hallucinated", "mentions")}
    own = {
        "recall": total["correct"] / total["total"],
        "hallucination": total["hallucinated"] / max(1, total["mentions"]),
    }
    work.load_role("sft")
    rows = []
    for role in roles:
        questions = {("fresh", told): fresh(work, records, told) for told in ("own", "none", "true")}
        if role == "sft":
            questions |= {
                ("trained", told): list(islice(trained(work, replayed, told), videos)) for told in ("none", "true")
            }
        for (kind, told), found in questions.items():
            with work.roles.use(role) as active:
                row = {"role": role, "statements": kind, "narrative": told}
                row |= figures(active, found, work.recipe.preference.claims)
            rows.append(row | (own if told == "own" else {}))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--videos", type=int, default=40, help="of each kind at most")
    parser.add_argument("--roles", nargs="+", default=[BASE, "sft"], choices=[BASE, "sft"])
    given = parser.parse_args()
    write_json(given.run / "judge.json", measure(given.run, given.videos, tuple(given.roles)))


if __name__ == "__main__":
    main()
