"""Answers laid out for a forward, with their tokens' places; the answers to one prompt share it where that pays.

Shared, a group of answers is one row: the prompt, and every answer as a branch of it that sees the prompt and itself
(see `inputs.branch`). The prompt is computed once, forward and backward, and each answer has the positions and the
hidden states that it has in a row of its own. Apart, each answer has such a row.

Shapes: N answer tokens, answer by answer; places count through all rows of the batch.
"""

from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Base
from .inputs import Batch, Sequence, branch, collate

# Attention scores that cost as much as one token in the linear layers of a decoder layer, per unit of width: a layer
# has about 12 D^2 weights, and a score takes 2 D multiplications (query with key, weight with value).
SCORES_PER_WIDTH = 6


class Group(NamedTuple):
    """The answers to one prompt, as token ids; EOS included where an answer has one."""

    prompt: Sequence
    answers: Seq[Seq[int]]


class AnswerRows(NamedTuple):
    """A batch of answers after their prompts. The tensors are int64, on the base's device."""

    batch: Batch
    token_N: Tensor  # the answers' tokens
    before_N: Tensor  # the place whose hidden state predicts each of them
    at_N: Tensor  # the place where it stands
    answer_N: Tensor  # the answer that it belongs to, counted through the groups


def lay_out(base: Base, groups: Seq[Group]) -> AnswerRows:
    """Groups of answers -> one batch."""
    lengths = [(len(g.prompt.ids_S), [len(ids) for ids in g.answers]) for g in groups]
    prompts = [prompt for prompt, each in lengths for _ in each]
    if sharing_pays(base.width, lengths):
        rows = [g.prompt.extend(g.answers[0]) if len(g.answers) == 1 else branch(*g) for g in groups]
        starts = [
            (b, at) for b, (prompt, each) in enumerate(lengths) for at in [*accumulate(each, initial=prompt)][:-1]
        ]
    else:
        rows = [g.prompt.extend(ids) for g in groups for ids in g.answers]
        starts = list(enumerate(prompts))
    batch = collate(base, rows)
    width = batch.ids_BS.shape[1]
    token, before, at, owner = [], [], [], []
    answers = [ids for g in groups for ids in g.answers]
    for number, (ids, (row, start), prompt) in enumerate(zip(answers, starts, prompts, strict=True)):
        places = range(row * width + start, row * width + start + len(ids))
        token += ids
        at += places
        before += [row * width + prompt - 1, *places[:-1]][: len(ids)]  # the prompt's end predicts the first token
        owner += [number] * len(ids)
    return AnswerRows(batch, *torch.tensor([token, before, at, owner]).to(base.device))


def sharing_pays(width: int, groups: Seq[tuple[int, Seq[int]]]) -> bool:
    """Whether rows of shared prompts cost less than a row for each answer, padding included. `groups` are lengths in
    tokens: (prompt, its answers).

    Shared rows have fewer tokens. But they are longer, and their attention computes every pair of positions, where a
    causal one computes half: with answers much longer than the prompt the latter is more."""
    count = sum(len(answers) for _, answers in groups)
    if count == len(groups):
        return False
    shared = max(prompt + sum(answers) for prompt, answers in groups)
    apart = max(prompt + max(answers) for prompt, answers in groups)
    token = SCORES_PER_WIDTH * width
    return len(groups) * (token * shared + shared**2) < count * (token * apart + apart**2 / 2)
