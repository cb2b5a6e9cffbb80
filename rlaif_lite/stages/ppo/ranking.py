"""The answers to a prompt put in order by a judge, as feedback to PPO, without a reward model (Oracle-RLAIF, arXiv
2510.02561).

The judge is the SFT role, by `preference.judge` and, with `ppo.judge_context`, with the narrative. `claims` gives
every answer a score and so the order; `pairwise` compares all answers of a prompt with each other, and an answer's
mean margin gives it; `outside` is no role but another model, which scores answers (`preference.outside`).
`ppo.rank_reward` says what an answer's place is worth, `ppo.baseline: group` makes advantages of it.

`place` (ours): the gain DCG of the judge's place. `reported`: the published advantage, after an account of the paper,
A = mean(delta) - delta, delta = 1 - DCG(the policy's place) / DCG(the judge's); the policy ranks its answers by their
log-prob per token, so that none is ranked low for its length. Taken at its word it raises the answers that the policy
ranks above the judge, as delta is far below 0 there; with its sign turned it says nothing once the two agree.

Shapes: B answers of a step, T answer tokens, K answers to a prompt.
"""

from itertools import combinations

import torch
from torch import Tensor

from ... import ranks
from ...data.records import Record, question_of
from ...files import chunks
from ...judge.claims import judge_claims, refuse_silent_judge
from ...judge.pairwise import AnswerPair, judge_pairs
from ...model.text import decode_answer
from ...phases import phase
from ...rl.advantages import in_groups, place_gain, rank_penalty
from ...rollout import Trajectory
from ...workspace import Workspace
from ..judging import context_of, item_of, outside_scores, refuse_unread
from .experience import Micro, spread
from .feedback import Feedback, Scored, Taken
from .outside import filled


class RankingFeedback(Feedback):
    """The order of a prompt's answers, from the SFT role."""

    def __init__(self, work: Workspace):
        super().__init__(work)
        work.load_role("sft")
        self.contexts = work.narratives() if work.recipe.ppo.judge_context else None
        self.without_mass = 0.0  # share of the last step's verdicts in which the judge says neither of its words

    def take(self, records: list[Record], answers: list[Trajectory], step: int) -> Taken:
        texts = [decode_answer(self.work.base(), a.ids) for a in answers]
        with phase("judge", sum(len(a.ids) for a in answers)):
            by = {"claims": self.by_claims, "pairwise": self.by_pairs, "outside": self.by_outside}
            scores = by[self.work.recipe.preference.judge](records, texts)
        # places are worth the same in every step
        metrics = {"objective/scores": sum(scores) / len(scores), "judge/without_mass": self.without_mass}
        return super().take(records, answers, step)._replace(scores=scores, metrics=metrics)

    def by_claims(self, records: list[Record], texts: list[str]) -> list[float]:
        section = self.work.recipe.preference
        items = [item_of(self.work, r, text, self.contexts) for r, text in zip(records, texts, strict=True)]
        with self.work.roles.use("sft") as judge:
            verdicts = ranks.spread(items, lambda own: judge_claims(judge, own, section.claims, section.batch_size))
        silent = refuse_silent_judge([verdict.has_mass for verdict in verdicts], "ppo: ranking")
        self.without_mass = silent / len(verdicts)
        return [verdict.score for verdict in verdicts]

    def by_outside(self, records: list[Record], texts: list[str]) -> list[float]:
        asked = list(zip(records, texts, strict=True))
        found = ranks.spread(asked, lambda own: outside_scores(self.work, own, self.contexts) if own else [])
        silent = refuse_unread(self.work, [score is not None for score in found], "ppo: ranking")
        self.without_mass = silent / len(found)
        return filled(found, self.work.recipe.ppo.group_size)

    def by_pairs(self, records: list[Record], texts: list[str]) -> list[float]:
        """Each answer's mean margin over the others of its prompt."""
        work, section, size = self.work, self.work.recipe.preference, self.work.recipe.ppo.group_size
        numbers = [pair for group in chunks(list(range(len(texts))), size) for pair in combinations(group, 2)]
        pairs = [
            AnswerPair(work.features(r), question_of(r), texts[i], texts[j], context_of(work, r, self.contexts))
            for i, j in numbers
            for r in (records[i],)
        ]
        with work.roles.use("sft") as judge:
            choices = ranks.spread(pairs, lambda own: judge_pairs(judge, own, section.pairwise, section.batch_size))
        silent = refuse_silent_judge([choice.has_mass for choice in choices], "ppo: ranking")
        self.without_mass = silent / len(choices)
        totals = [0.0] * len(texts)
        for (i, j), choice in zip(numbers, choices, strict=True):
            totals[i] += choice.margin
            totals[j] -= choice.margin
        return [total / (size - 1) for total in totals]

    def score(self, taken: Taken, minibatches: list[list[Micro]], logp_BT: Tensor, mask_BT: Tensor) -> Scored:
        section = self.work.recipe.ppo
        judged_B = torch.tensor(taken.scores, device=mask_BT.device)
        if section.rank_reward == "place":
            worth_B = place_gain(in_groups(judged_B, section.group_size)).view(-1)
        else:
            worth_B = -rank_penalty(judged_B, logp_BT.sum(1) / mask_BT.sum(1), section.group_size)
        return Scored(worth_B, spread(taken.rewards, mask_BT))
