"""What whole answers are worth to a role: the log-probs of their tokens, summed; and the best of several by them.

Shapes: B answers, N answer tokens.
"""

from collections.abc import Sequence as Seq
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif_kernels import linear_logprob

from ..model.answers import AnswerRows, Group, lay_out
from ..model.inputs import Sequence
from ..model.memory import in_pieces
from ..model.roles import ActiveRole, Roles
from ..rl.dpo import implicit_reward
from .loop import sample
from .sampling import Sampling, Trajectory


class TokenScores(NamedTuple):
    """What is known of every token of some answers under a role, float32."""

    logp_N: Tensor  # log-prob, at temperature 1
    kl_N: Tensor | None  # exact KL(reference || role) of the distribution that it was taken from
    answer_N: Tensor  # int64, the answer that it belongs to, counted through the groups

    def per_answer(self, x_N: Tensor, answers: int) -> Tensor:
        """x_B, sums over each answer's tokens."""
        return torch.zeros(answers, device=x_N.device).index_add(0, self.answer_N, x_N)


def answer_hidden(role: ActiveRole, groups: Seq[Group]) -> tuple[AnswerRows, Tensor]:
    """The groups laid out, and the hidden states (N, D) that predict their answers' tokens."""
    rows = lay_out(role.roles.base, groups)
    return rows, role.hidden(rows.batch).flatten(0, 1).index_select(0, rows.before_N)


def token_scores(role: ActiveRole, groups: Seq[Group], reference_hidden_ND: Tensor | None = None) -> TokenScores:
    """Of all answers of the groups; differentiable. Logits are never held. `reference_hidden_ND`: the reference's
    `answer_hidden` of the same groups, for the KL."""
    base = role.roles.base
    rows, hidden_ND = answer_hidden(role, groups)
    found = linear_logprob(
        hidden_ND,
        base.head_weight_VD,
        rows.token_N,
        bias_V=base.ban_bias_V,
        reference_hidden_ND=reference_hidden_ND,
        kl="reference||policy",
        differentiable="logp" if reference_hidden_ND is None else "all",
    )
    return TokenScores(found.logp_N, found.kl_N, rows.answer_N)


def answer_logps(role: ActiveRole, groups: Seq[Group]) -> Tensor:
    """logp_B float32 of all answers of the groups, summed over their tokens, at temperature 1; differentiable."""
    found = token_scores(role, groups)
    return found.per_answer(found.logp_N, sum(len(group.answers) for group in groups))


class Best(NamedTuple):
    """The answer taken among several to one prompt."""

    answer: Trajectory
    reward: float  # beta * mean log-ratio per token


@torch.no_grad()
def best_of(
    roles: Roles,
    policy: str,
    reference: str,
    prompts: Seq[Sequence],
    sampling: Sampling,
    *,
    count: int,
    seeds: Seq[int],
    beta: float,
    batch_size: int,
) -> list[Best]:
    """Draw `count` answers to every prompt from role `policy` and take the one of the highest reward (beta / T) * sum
    log(policy / reference), T its tokens (RLAIF-V's self-feedback at inference): needs no judge, only the role that
    the policy was trained against. The first of equals is taken."""
    with roles.use(policy) as role:
        found = sample(role, prompts, sampling, seeds=seeds, per_prompt=count, batch_size=batch_size)
    logps = []
    for name in (policy, reference):
        with roles.use(name) as role:

            def read(part: Seq[Trajectory]) -> list[float]:
                groups = [Group(prompts[i], [t.ids for t in of]) for i, of in groupby(part, lambda t: t.prompt)]
                return answer_logps(role, groups).tolist()

            logps.append(torch.tensor(in_pieces(found, batch_size, read)))
    length_B = torch.tensor([len(t.ids) for t in found])
    reward_B = implicit_reward(*logps, length_B, beta, normalised=True).tolist()
    groups = [range(start, start + count) for start in range(0, len(found), count)]
    winners = [max(group, key=lambda i: reward_B[i]) for group in groups]
    return [Best(found[i], reward_B[i]) for i in winners]
