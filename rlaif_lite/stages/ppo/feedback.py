"""What a step's answers are worth to PPO: the door through which feedback of any kind reaches the update.

A feedback speaks twice in a step:

    `take`   as soon as the answers are sampled, once: a judge reads them, and may cut them short or write into them
    `score`  once the policy's log-probs are known: a score per answer, and rewards that stand on single tokens

What `ppo` adds to it (penalties, KL, where the score stands, advantages) is the same for every kind.

Shapes: B answers of a step, T answer tokens (padded on the right).
"""

from collections.abc import Sequence as Seq
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ranks
from ...data.records import Record
from ...files import read_json
from ...model.answers import Group
from ...model.inputs import Sequence, encode_prompt
from ...model.memory import in_pieces_together
from ...phases import phase
from ...rollout import Trajectory
from ...workspace import Workspace
from ..reward import RewardInput, check_floor, reward_prompt
from .experience import Micro, answers_of, spread


class Taken(NamedTuple):
    """A step's answers as they enter the update; lists have an item per answer, the inner ones an item per token."""

    records: list[Record]  # that each answers; more than were asked where an answer enters in several parts
    answers: list[Trajectory]  # perhaps shorter or other than they were sampled
    own: list[list[bool]]  # the policy sampled this token; False: put in by the judge, and not learnt from
    scores: list[float]  # of whole answers, where a judge gives any
    rewards: list[list[float]]  # that stand on tokens, in the scale of the scores
    metrics: dict[str, float]  # what to log of them


class Scored(NamedTuple):
    """What a feedback says of a step's answers."""

    score_B: Tensor  # float32, before stop and length penalties
    token_reward_BT: Tensor  # float32, beside the score; 0 at pads and wherever nothing was said


class Feedback:
    """Leaves the answers as they are and finds nothing in them; kinds of feedback say what they are worth."""

    def __init__(self, work: Workspace):
        self.work = work
        self.beside = work  # the run on the base that the judging role sits on
        self.critic_from = "reference"  # the role whose adapter the value role starts from

    def critic_prompt(self, record: Record) -> Sequence:
        """What the value role reads before an answer."""
        return encode_prompt(self.work.base(), record.prompt, self.work.features(record))

    def begin(self) -> None:
        """Before the first step, when the roles are on the base; not when a run is gone on with."""

    def state(self) -> dict:
        """What a checkpoint keeps, for `load_state`."""
        return {}

    def load_state(self, state: dict) -> None:
        pass

    def take(self, records: list[Record], answers: list[Trajectory], step: int) -> Taken:
        """The answers that the step learns from; `records` has one for each, groups next to each other."""
        own, rewards = [[True] * len(a.ids) for a in answers], [[0.0] * len(a.ids) for a in answers]
        return Taken(records, answers, own, [0.0] * len(answers), rewards, {})

    def score(self, taken: Taken, minibatches: list[list[Micro]], logp_BT: Tensor, mask_BT: Tensor) -> Scored:
        """`minibatches`: this rank's share of the answers; what is said is of all of them. `logp_BT`: of the sampling
        policy, 0 at pads, as `mask_BT` has them."""
        return Scored(torch.tensor(taken.scores, device=mask_BT.device), spread(taken.rewards, mask_BT))


class RewardModelFeedback(Feedback):
    """The reward role reads every answer to its end (VLM-RLAIF), standardised on the reference's answers to RL prompts
    where `ppo.normalize_reward` says so. Raises StageError for a reward role below `reward.floor`."""

    def __init__(self, work: Workspace):
        super().__init__(work)
        heldout = read_json(work.folder / "reward" / "heldout.json")["heldout_accuracy"]
        check_floor(work.recipe, heldout)
        self.beside = work.for_reward
        self.beside.load_role("reward")
        self.layout = RewardInput(self.beside)
        self.critic_from = "reward" if self.beside is work else "reference"  # an adapter of the policy's own base
        self.mean, self.std = 0.0, 1.0

    def critic_prompt(self, record: Record) -> Sequence:
        return reward_prompt(self.work, record)

    def begin(self) -> None:
        if self.work.recipe.ppo.normalize_reward:
            self.mean, self.std = self.scale()

    def state(self) -> dict:
        return {"normalizer": [self.mean, self.std]}

    def load_state(self, state: dict) -> None:
        self.mean, self.std = state["normalizer"]

    def score(self, taken: Taken, minibatches: list[list[Micro]], logp_BT: Tensor, mask_BT: Tensor) -> Scored:
        score_B = torch.zeros(len(taken.answers), device=self.work.device)
        for micro in (m for minibatch in minibatches for m in minibatch):
            rows = micro.index_b.tolist()
            with phase("score reward", micro.policy.batch.ids_BS.numel()):
                read_b = self.read([taken.records[i] for i in rows], [taken.answers[i] for i in rows])
            score_B[micro.index_b] = (read_b - self.mean) / self.std
        return Scored(ranks.total(score_B), spread(taken.rewards, mask_BT))

    def read(self, records: list[Record], answers: list[Trajectory]) -> Tensor:
        """score_b of a micro-batch, as the reward role gives it. Neighbouring answers to one record are one group."""
        base, groups, start = self.work.base(), [], 0
        for _, same in groupby(records, id):
            prompt, end = self.layout.prompt(records[start]), start + len(list(same))
            groups.append(Group(prompt, [self.layout.answer(prompt, a.ids, base) for a in answers[start:end]]))
            start = end
        with self.beside.roles.use("reward") as reward:
            return self.layout.score(reward, groups)

    @torch.no_grad()
    def scale(self) -> tuple[float, float]:
        """(mean, standard deviation) of the reward model on the reference's own answers to RL prompts."""
        work, section, base = self.work, self.work.recipe.ppo, self.work.base()
        records = work.records("rl")[:256]
        seeds = [work.seed("ppo", "scale", i) for i in range(len(records))]
        prompt_of = lambda i: encode_prompt(base, records[i].prompt, work.features(records[i]))
        answers = answers_of(work, "reference", len(records), prompt_of, seeds)
        size = section.micro_batch or section.minibatch

        def read(part: Seq[tuple[Record, Trajectory]]) -> list[float]:
            return self.read([record for record, _ in part], [answer for _, answer in part]).tolist()

        score_N = torch.tensor(in_pieces_together(list(zip(records, answers, strict=True)), size, read))
        return score_N.mean().item(), max(score_N.std(correction=0).item(), 1e-6) if len(score_N) > 1 else 1.0
