"""Answers checked claim by claim, by the judge's own yes/no probabilities.

Two ways, the same question ("is this true of the video?"):

`ask`     each sentence of an answer is a claim and is asked about in words (RLAIF-V's divide and conquer, arXiv
          2405.17220). All claims about one video go through ONE forward: the prompt with the video is their shared
          prefix, each claim is a branch that sees the prefix and itself. An answer's score is the sum over its claims
          of P(yes) - P(no).
`inline`  the answer is read once, and the verdict is read off the next-token distribution at every one of its tokens:
          a judge trained with verdicts says `yes` or `no` where a claim ends and a neutral word elsewhere (the way
          step-level reward models mark steps, e.g. Math-Shepherd). The score is the sum over tokens of P(yes) -
          P(no).

Departure from RLAIF-V: probabilities are summed, not counted as rejected / not rejected, so that near-ties keep their
order.

Shapes: B rows, S positions, D width, N scored positions.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlaif_kernels import linear_logprob

from ..data.records import VIDEO_MARK, Message
from ..model.base import Base
from ..model.inputs import BRANCH_MARK, branch, collate, encode_prompt, encode_text, single_token, split_prompt
from ..model.memory import in_pieces
from ..model.roles import ActiveRole
from ..recipe import Claims
from ..video.cache import FeatureRecord

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Item(NamedTuple):
    """One answer to be judged."""

    video: FeatureRecord | None
    question: str  # as the user asked it, without the video's mark
    answer: str
    context: str | None  # the narrative, or None to judge without it
    ids: list[int] | None = None  # the answer's tokens as they were sampled, read `inline`; None: encoded anew


class Verdict(NamedTuple):
    """What the judge said of one answer."""

    score: float  # sum of P(yes) - P(no): higher is better
    claims: list[str]  # the sentences asked about, or the words at which a verdict was read
    values: list[float]  # P(yes) - P(no) of each claim, in [-1, 1]
    odds: list[float]  # log P(no) - log P(yes) of each claim: positive = more likely false
    told: list[float]  # P(yes) + P(no) of each claim: near 0 where an inline judge sees no claim


def split_claims(answer: str) -> list[str]:
    """The sentences of an answer."""
    return [part.strip() for part in SENTENCE_END.split(answer) if part.strip(" .")]


@torch.no_grad()
def judge_claims(role: ActiveRole, items: Sequence[Item], section: Claims, batch_size: int) -> list[Verdict]:
    """Judge answers; the role is the judge's. Results stand in the order of `items`; work is batched by length."""
    score = _inline if section.mode == "inline" else _ask
    verdicts: list[Verdict | None] = [None] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(items[i].answer))
    found = in_pieces(order, batch_size, lambda chunk: score(role, [items[i] for i in chunk], section))
    for i, verdict in zip(order, found, strict=True):
        verdicts[i] = verdict
    return verdicts


def user_message(template: str, context_template: str, context: str | None, video: bool, **fields: str) -> Message:
    """Fill a judge prompt; `{context}` becomes the context template with the narrative in it, or nothing. A video's
    mark is put in front when the template has none."""
    filled = context_template.format(context=context) if context is not None else ""
    mark = f"{VIDEO_MARK}\n" if video and VIDEO_MARK not in template else ""
    return Message("user", mark + template.format(context=filled, **fields))


def _inline(role: ActiveRole, items: Sequence[Item], section: Claims) -> list[Verdict]:
    base = role.roles.base
    rows, answers = [], []
    for item in items:
        seen = item.video is not None
        message = user_message(
            section.prompt, section.context_prefix, item.context, seen, question=item.question, claim=""
        )
        answers.append(encode_text(base, item.answer) if item.ids is None else item.ids)
        rows.append(encode_prompt(base, [message], item.video).extend(answers[-1]))
    batch = collate(base, rows)
    hidden_BSD = role.hidden(batch)
    # A verdict on token t is the prediction made AT t, having read it.
    at = [
        (b, len(row.ids_S) - len(answer) + t)
        for b, (row, answer) in enumerate(zip(rows, answers))
        for t in range(len(answer))
    ]
    rows_N, places_N = torch.tensor(at, device=base.device).T if at else torch.zeros(2, 0, dtype=torch.long)
    words = [[base.tokenizer.decode([token]) for token in answer] for answer in answers]
    return _verdicts(base, hidden_BSD[rows_N, places_N], words, section)


def _ask(role: ActiveRole, items: Sequence[Item], section: Claims) -> list[Verdict]:
    return ask(role, items, [split_claims(item.answer) for item in items], section)


@torch.no_grad()
def ask(role: ActiveRole, items: Sequence[Item], claims: Sequence[Sequence[str]], section: Claims) -> list[Verdict]:
    """Ask about `claims` of each item (its `answer` is not read), those of one item in one row; one forward for all."""
    base = role.roles.base
    rows, ends = [], []
    for b, (item, found) in enumerate(zip(items, claims, strict=True)):
        seen = item.video is not None
        message = user_message(
            section.prompt, section.context_prefix, item.context, seen, question=item.question, claim="\0"
        )
        lead, _, rest = message.content.partition("\0")
        prefix, tail = split_prompt(base, lead + BRANCH_MARK, item.video)
        branches = [encode_text(base, claim + rest) + tail for claim in found]
        row = branch(prefix, branches)
        at = len(prefix.ids_S)
        for tokens in branches:
            at += len(tokens)
            ends.append((b, at - 1))
        rows.append(row)
    hidden_BSD = role.hidden(collate(base, rows))
    rows_N, places_N = torch.tensor(ends, device=base.device).T if ends else torch.zeros(2, 0, dtype=torch.long)
    return _verdicts(base, hidden_BSD[rows_N, places_N], claims, section)


def _verdicts(base: Base, hidden_ND: torch.Tensor, claims: Sequence[Sequence[str]], section: Claims) -> list[Verdict]:
    """What the next-token distribution at each claim says of it; hidden_ND stands in the order of the claims."""
    logps = []
    for word in (section.yes, section.no):
        token = single_token(base, word, "preference.claims")
        target_N = torch.full((hidden_ND.shape[0],), token, device=hidden_ND.device)
        logps.append(linear_logprob(hidden_ND, base.head_weight_VD, target_N, bias_V=base.ban_bias_V).logp_N)
    yes_N, no_N = logps
    figures_3N = torch.stack([yes_N.exp() - no_N.exp(), no_N - yes_N, yes_N.exp() + no_N.exp()])
    out, at = [], 0
    for found in claims:
        values, odds, told = figures_3N[:, at : at + len(found)].tolist()
        out.append(Verdict(sum(values), list(found), values, odds, told))
        at += len(found)
    return out
