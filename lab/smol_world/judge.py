"""Does a judge know anything? `python -m lab.smol_world.judge RUN` asks about fresh statements whose truth is known.

RUN is a run of recipes/smol_world.yaml that has done `context`. The statements are drawn from the facts of its
preference videos, half of them true, and are asked as the run's own judge asks: by the base (before SFT) and by the
SFT role (after), with the run's narratives and without. `right` is the share of statements whose sign P(yes) - P(no)
is right, with a 95 % interval that resamples videos; `mass` is P(yes) + P(no).
"""

import argparse
import random
from pathlib import Path

import numpy as np

from rlaif_lite.data.records import question_of
from rlaif_lite.files import write_json
from rlaif_lite.judge.claims import AnswerToJudge, ask
from rlaif_lite.recipe import load_recipe
from rlaif_lite.workspace import Workspace

from .english import statement

PER_VIDEO, BATCH = 4, 8


def measure(run: Path, videos: int) -> list[dict]:
    """A row for each role, with and without the narrative."""
    work = Workspace(load_recipe(run / "recipe.yaml", [f"output={run}"]))
    records, told = work.records("preference")[:videos], work.narratives()
    asked = [[statement(r.facts, random.Random(f"{r.key}/{n}")) for n in range(PER_VIDEO)] for r in records]
    work.load_role("sft")
    rows = []
    for role in ("base", "sft"):
        for context in (True, False):
            with work.roles.use(role) as active:
                found = []
                for start in range(0, len(records), BATCH):
                    part = range(start, min(start + BATCH, len(records)))
                    items = [
                        AnswerToJudge(
                            work.features(records[i]),
                            question_of(records[i]),
                            "",
                            told[work.name_of(records[i])] if context else None,
                        )
                        for i in part
                    ]
                    texts = [[said.text for said in asked[i]] for i in part]
                    found += ask(active, items, texts, work.recipe.preference.claims)
            right = [
                [(value > 0) == said.true for value, said in zip(scores.values, statements, strict=True)]
                for scores, statements in zip(found, asked, strict=True)
            ]
            drawn = np.random.default_rng(0).integers(0, len(right), (2000, len(right)))
            low, high = np.percentile(np.mean(right, 1)[drawn].mean(1), [2.5, 97.5])
            mass = float(np.mean([scores.mass for scores in found]))
            rows.append(
                {"role": role, "narrative": context, "statements": len(right) * PER_VIDEO}
                | {"right": float(np.mean(right)), "low": float(low), "high": float(high), "mass": mass}
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--videos", type=int, default=40)
    given = parser.parse_args()
    write_json(given.run / "judge.json", measure(given.run, given.videos))


if __name__ == "__main__":
    main()
