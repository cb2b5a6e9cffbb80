"""What a PPO step works on: its answers laid out in micro-batches, and what is known of them before the update.

Micro-batches are cut once per step: every forward of the step sees the same rows with the same padding (see
`stages.ppo`).

Shapes: B answers of a step, b of a micro-batch, S positions, T answer tokens (padded on the right), N real answer
tokens.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlaif_kernels import LinearLogprob, linear_logprob

from ... import ranks
from ...data.records import Record
from ...files import chunks
from ...model.base import Base
from ...model.inputs import IGNORE, Batch, Sequence, collate, encode_prompt, target_rows
from ...model.roles import ActiveRole
from ...rollout import Trajectory
from ...training.loop import derive_seed, split_micro
from ...workspace import Workspace


class Micro(NamedTuple):
    """One micro-batch: some answers of the step, laid out for the policy and for the value role."""

    index_b: Tensor  # which answers of the step
    batch: Batch  # prompt + answer, as the policy reads them
    target_bS: Tensor  # the answer token that each position predicts, IGNORE elsewhere
    value_batch: Batch  # the critic's prompt + answer, as the value role reads them
    value_target_bS: Tensor
    at_N: Tensor  # where `target_bS` has a target, counted through all rows; a mask would stall the GPU at each use
    value_at_N: Tensor


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


def cut(
    work: Workspace,
    critic_prompt: Callable[[Record], Sequence],
    records: list[Record],
    answers: list[Trajectory],
    step: int,
    size: int,
) -> list[list[Micro]]:
    """Shuffle the step's answers into minibatches; of each, this rank's answers in micro-batches of `size`.
    `critic_prompt` is what the value role reads before an answer."""
    base, section = work.base(), work.recipe.ppo
    generator = torch.Generator().manual_seed(derive_seed(work.recipe.seed, "ppo", "minibatches", step))
    order = torch.randperm(len(answers), generator=generator).tolist()

    def micro(index: list[int]) -> Micro:
        ids = [answers[i].ids for i in index]
        rows = [
            encode_prompt(base, records[i].prompt, work.features(records[i])).extend(a)
            for i, a in zip(index, ids, strict=True)
        ]
        value_rows = [critic_prompt(records[i]).extend(a) for i, a in zip(index, ids, strict=True)]
        batch, value_batch = collate(base, rows), collate(base, value_rows)
        targets = [target_rows(r, ids, b.ids_BS.shape[1]) for r, b in ((rows, batch), (value_rows, value_batch))]
        return micro_of(torch.tensor(index), batch, targets[0], value_batch, targets[1])

    length = lambda i: len(answers[i].ids)
    own = [ranks.deal(m, length) for m in chunks(order, section.minibatch)]
    return [[micro(sorted(part, key=length)) for part in split_micro(m, size)] for m in own]


def micro_of(index_b: Tensor, batch: Batch, target_bS: Tensor, value_batch: Batch, value_target_bS: Tensor) -> Micro:
    """A micro-batch of targets that are still on the CPU, where counting them waits for nothing."""
    at_N, value_at_N = ((each_bS != IGNORE).flatten().nonzero()[:, 0] for each_bS in (target_bS, value_target_bS))
    on = batch.ids_BS.device
    return Micro(
        index_b.to(on), batch, target_bS.to(on), value_batch, value_target_bS.to(on), at_N.to(on), value_at_N.to(on)
    )


def answer_hidden(role: ActiveRole, micro: Micro) -> Tensor:
    """hidden_ND that predict the micro-batch's answer tokens."""
    return role.hidden(micro.batch).flatten(0, 1).index_select(0, micro.at_N)


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
        micro.target_bS.flatten()[micro.at_N],
        bias_V=base.ban_bias_V,
        temperature=temperature,
        reference_hidden_ND=reference_hidden_ND,
        differentiable=differentiable,
    )


def token_value(role: ActiveRole, micro: Micro) -> Tensor:
    """value_N of the state before each answer token."""
    return role.scalar(role.hidden(micro.value_batch).flatten(0, 1).index_select(0, micro.value_at_N))


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
