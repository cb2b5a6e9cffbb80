"""What a PPO step works on: its answers laid out in micro-batches, and what is known of them before the update.

Micro-batches are cut once per step: every forward of the step sees the same rows with the same padding (see
`stages.ppo`).

Shapes: B answers of a step, b of a micro-batch, T answer tokens (padded on the right), N real answer tokens.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlaif_kernels import LinearLogprob, linear_logprob

from ... import ranks
from ...data.records import Record
from ...files import chunks
from ...model.answers import AnswerRows, Group, lay_out
from ...model.base import Base
from ...model.inputs import Sequence, encode_prompt
from ...model.roles import ActiveRole
from ...rollout import Sampling, Trajectory, sample_together
from ...training.loop import derive_seed, split_micro
from ...workspace import Workspace


class Micro(NamedTuple):
    """One micro-batch: some answers of the step. Those to one prompt are next to each other (see `model.answers`)."""

    index_b: Tensor  # which answers of the step
    policy: AnswerRows  # prompt + answer, as the policy reads them
    value: AnswerRows  # the critic's prompt + answer, as the value role reads them


class Experience(NamedTuple):
    """What is known of a step's answers before the update; everything is 0 at pads."""

    mask_BT: Tensor  # bool, real answer tokens (EOS included)
    learn_BT: Tensor  # bool, those of them that the policy's loss is over: sampled by the policy, and not left out
    logp_BT: Tensor  # log-probs of the sampling policy, recomputed
    ref_logp_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor  # per token, estimated or exact: KL(policy || reference), nats
    value_BT: Tensor  # value of the state before each token; zeros without a critic
    raw_B: Tensor  # all that feedback gave an answer: its score and its tokens' rewards
    score_B: Tensor  # the same with stop and length penalties
    advantage_BT: Tensor
    return_BT: Tensor


def answers_of(
    work: Workspace,
    role: str,
    prompts: int,
    prompt_of: Callable[[int], Sequence],
    seeds: list[int],
    per_prompt: int = 1,
    longest: int | None = None,
) -> list[Trajectory]:
    """Answers of a role, sampled as the recipe says: `per_prompt` to each prompt, next to each other. `longest`: tokens
    of an answer, where `ppo.max_new_tokens` is not meant."""
    section = work.recipe.ppo
    sampling = Sampling(longest or section.max_new_tokens, section.temperature, section.top_p, section.top_k)
    slots = int(section.slots or section.rollouts)
    with work.roles.use(role) as active:
        return sample_together(
            active, prompts, prompt_of, sampling, seeds=seeds, per_prompt=per_prompt, batch_size=slots
        )


def cut(
    work: Workspace,
    critic_prompt: Callable[[Record], Sequence],
    records: list[Record],
    answers: list[Trajectory],
    step: int,
    size: int,
) -> list[list[Micro]]:
    """Shuffle the step's answers into minibatches; of each, this rank's answers in micro-batches of `size`. The answers
    to one prompt stay together, up to `ppo.group_size` of them. `critic_prompt` is what the value role reads before an
    answer."""
    base, section = work.base(), work.recipe.ppo
    generator = torch.Generator().manual_seed(derive_seed(work.recipe.seed, "ppo", "minibatches", step))
    of_record: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        of_record.setdefault(id(record), []).append(number)
    groups = [part for numbers in of_record.values() for part in chunks(numbers, section.group_size)]
    order = [i for g in torch.randperm(len(groups), generator=generator).tolist() for i in groups[g]]
    group_of = {i: g for g, group in enumerate(groups) for i in group}

    def micro(index: list[int]) -> Micro:
        together = [list(group) for _, group in groupby(index, group_of.__getitem__)]
        ids = [[answers[i].ids for i in group] for group in together]
        read = [records[group[0]] for group in together]
        prompts = [encode_prompt(base, r.prompt, work.features(r)) for r in read]
        rows = (lay_out(base, list(map(Group, each, ids))) for each in (prompts, map(critic_prompt, read)))
        return Micro(torch.tensor(index, device=base.device), *rows)

    def cost(group: list[int]) -> int:
        return sum(len(answers[i].ids) for i in group)

    by_length = lambda i: (group_of[i] if section.group_size > 1 else 0, len(answers[i].ids))
    minibatches = []
    for whole in chunks(order, section.minibatch):
        together = [list(group) for _, group in groupby(whole, group_of.__getitem__)]
        own = [i for group in ranks.deal(together, cost) for i in group]
        minibatches.append([micro(sorted(part, key=by_length)) for part in split_micro(own, size)])
    return minibatches


def answer_hidden(role: ActiveRole, micro: Micro) -> Tensor:
    """hidden_ND that predict the micro-batch's answer tokens."""
    return role.hidden(micro.policy.batch).flatten(0, 1).index_select(0, micro.policy.before_N)


def answer_logp(
    base: Base,
    hidden_ND: Tensor,
    micro: Micro,
    temperature: float,
    reference_hidden_ND: Tensor | None = None,
    differentiable: Literal["logp", "all"] = "logp",
) -> LinearLogprob:
    """Log-probs of the answer tokens and entropies at the sampling temperature; with the reference's hidden states the
    exact KL to it."""
    return linear_logprob(
        hidden_ND,
        base.head_weight_VD,
        micro.policy.token_N,
        bias_V=base.ban_bias_V,
        temperature=temperature,
        reference_hidden_ND=reference_hidden_ND,
        differentiable=differentiable,
    )


def token_value(role: ActiveRole, micro: Micro) -> Tensor:
    """value_N of the state before each answer token."""
    return role.scalar(role.hidden(micro.value.batch).flatten(0, 1).index_select(0, micro.value.before_N))


def padded(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of all real tokens, row by row -> a padded tensor, 0 at pads; differentiable."""
    return torch.zeros_like(mask_BT, dtype=values_N.dtype).masked_scatter(mask_BT, values_N)


def place(out_BT: Tensor, rows: Tensor, mask_BT: Tensor, values_N: Tensor) -> None:
    """Write the values of some rows' real tokens, in order, into a padded tensor."""
    out_BT[rows] = padded(values_N, mask_BT[rows])


def spread(lists: list[list[float]], mask_BT: Tensor) -> Tensor:
    """A number for every token of every answer -> a padded tensor, 0 at pads."""
    out_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    out_BT[mask_BT] = torch.tensor([float(x) for row in lists for x in row], device=mask_BT.device)
    return out_BT
