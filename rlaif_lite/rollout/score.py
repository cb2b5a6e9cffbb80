"""What whole answers are worth to a role: the log-probs of their tokens, summed; and the best of several by them.

Shapes: B answers, N answer tokens.
"""

from collections.abc import Sequence as Seq
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif_kernels import linear_logprob

from ..model.answers import Group, lay_out
from ..model.inputs import Sequence
from ..model.memory import in_pieces
from ..model.roles import ActiveRole, Roles
from ..rl.dpo import implicit_reward
from .loop import sample
from .sampling import Sampling, Trajectory


def answer_logps(role: ActiveRole, groups: Seq[Group]) -> Tensor:
    """logp_B float32 of all answers of the groups, summed over their tokens, at temperature 1; differentiable. Logits
    are never held."""
    base = role.roles.base
    rows = lay_out(base, groups)
    hidden_ND = role.hidden(rows.batch).flatten(0, 1).index_select(0, rows.before_N)
    found = linear_logprob(hidden_ND, base.head_weight_VD, rows.token_N, bias_V=base.ban_bias_V)
    count = sum(len(group.answers) for group in groups)
    return torch.zeros(count, device=base.device).index_add(0, rows.answer_N, found.logp_N)


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
