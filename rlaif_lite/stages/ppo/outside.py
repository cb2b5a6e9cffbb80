"""Scores of a judge from outside as feedback to PPO (`preference.outside`): a model behind an endpoint, or a second
one on this machine. It reads the narrative with `ppo.judge_context`.

An answer whose verdict cannot be read gets the mean of its prompt's other answers, and nothing is learnt from it.
"""

from ... import ranks
from ...data.records import Record
from ...files import chunks
from ...model.text import decode_answer
from ...rollout import Trajectory
from ...workspace import Workspace
from ..judging import outside_scores, refuse_unread
from .feedback import Feedback, Taken


class OutsideFeedback(Feedback):
    """One score per answer, 0 to 10."""

    def __init__(self, work: Workspace):
        super().__init__(work)
        self.contexts = work.narratives() if work.recipe.ppo.judge_context else None

    def take(self, records: list[Record], answers: list[Trajectory], step: int) -> Taken:
        texts = [decode_answer(self.work.base(), a.ids) for a in answers]
        asked = list(zip(records, texts, strict=True))
        found = ranks.spread(asked, lambda own: outside_scores(self.work, own, self.contexts) if own else [])
        unread = refuse_unread(self.work, [score is not None for score in found], f"ppo, step {step}")
        taken = super().take(records, answers, step)
        own = [mine if score is not None else [False] * len(mine) for mine, score in zip(taken.own, found, strict=True)]
        scores = filled(found, self.work.recipe.ppo.group_size)
        return taken._replace(own=own, scores=scores, metrics={"judge/unread": unread / len(found)})


def filled(scores: list[float | None], size: int) -> list[float]:
    """The scores with the mean of its group's others, or of all, for each that is missing; some are there."""
    known = [score for score in scores if score is not None]
    out = []
    for group in chunks(scores, size):
        of = [score for score in group if score is not None] or known
        out += [sum(of) / len(of) if score is None else score for score in group]
    return out
