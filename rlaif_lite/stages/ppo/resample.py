"""Groups whose answers all score alike are replaced by answers to other prompts (DAPO's dynamic sampling, arXiv
2503.14476, section 3.2), so that a step learns from as many answers as it can.

Departure: at most `ppo.resample` rounds, and as many new prompts a round as there are equal groups. What is still equal
then stays in the step.
"""

import random
from collections.abc import Callable

from ...data.records import Record
from ...workspace import Workspace
from .feedback import Taken

Answers = Callable[[list[Record], int], Taken]  # (records, round from 1) -> their answers, with scores


def resampled(work: Workspace, taken: Taken, step: int, answers_to: Answers) -> Taken:
    """The step's answers with equal groups replaced. The score and the rules that are logged are of the first answers:
    the others are a choice, and would flatter the policy."""
    size = work.recipe.ppo.group_size
    metrics = taken.metrics | {"objective/scores": sum(taken.scores) / len(taken.scores)}
    in_step = {record.key for record in taken.records}
    others = [record for record in work.records("rl") if record.key not in in_step]
    random.Random(work.seed("ppo", "resample", step)).shuffle(others)
    columns: list[list] = [
        list(column) for column in (taken.records, taken.answers, taken.own, taken.scores, taken.rewards)
    ]
    replaced = 0
    for turn in range(1, work.recipe.ppo.resample + 1):
        flat = equal_groups(columns[3], size)
        drawn, others = others[: len(flat)], others[len(flat) :]
        if not drawn:
            break
        new = answers_to([record for record in drawn for _ in range(size)], turn)
        useful = [at for at in range(0, len(new.scores), size) if at not in equal_groups(new.scores, size)]
        for mine, theirs in zip(columns, (new.records, new.answers, new.own, new.scores, new.rewards), strict=True):
            for at, other in zip(flat, useful, strict=False):
                mine[at : at + size] = theirs[other : other + size]
        replaced += min(len(flat), len(useful))
    records, answers, own, scores, rewards = columns
    metrics["rollout/resampled"] = replaced * size / len(taken.scores)
    return Taken(records, answers, own, scores, rewards, metrics)


def equal_groups(scores: list[float], size: int) -> list[int]:
    """Where groups of `size` begin whose scores are all equal."""
    return [at for at in range(0, len(scores), size) if len(set(scores[at : at + size])) == 1]
