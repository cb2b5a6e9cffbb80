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

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlaif_kernels import linear_logprob

from ..data.records import VIDEO_MARK, Message
from ..data.sentences import split_claims
from ..errors import ModelError
from ..model.base import Base
from ..model.inputs import BRANCH_MARK, branch, collate, encode_prompt, split_prompt
from ..model.memory import in_pieces
from ..model.roles import ActiveRole
from ..model.text import Opening, encode_answer, word_tokens
from ..recipe import Claims
from ..video.cache import FeatureRecord

MIN_MASS = 1e-3  # P(yes) + P(no) below which a judge gives no verdict
VERDICT = 0.5  # P(yes) + P(no) from which on an inline judge's word is a verdict


class AnswerToJudge(NamedTuple):
    """One answer to be judged."""

    video: FeatureRecord | None
    question: str  # as the user asked it, without the video's mark
    answer: str
    context: str | None  # the narrative, or None to judge without it
    ids: list[int] | None = None  # the answer's tokens as they were sampled, read `inline`; None: encoded here


class ClaimScores(NamedTuple):
    """What the judge says about one answer."""

    score: float  # sum of P(yes) - P(no): higher is better
    claims: list[str]  # the sentences asked about, or the words at which a verdict was read
    values: list[float]  # P(yes) - P(no) of each claim, in [-1, 1]
    odds: list[float]  # log P(no) - log P(yes) of each claim: positive = more likely false
    mass: list[float]  # P(yes) + P(no) of each claim: near 0 where an inline judge sees no claim

    @property
    def has_mass(self) -> bool:
        """Whether the judge says yes or no anywhere; true for an answer without claims."""
        return not self.mass or max(self.mass) >= MIN_MASS

    def said(self, answer: str, mode: str) -> list[tuple[str, float, float]]:
        """(claim, P(yes), P(no)), to show people. An `inline` judge's claim is the part of the answer that ends at a
        word with a verdict; words without one are no claims."""
        found, start, end = [], 0, 0
        for claim, value, mass in zip(self.claims, self.values, self.mass, strict=True):
            verdict = (round((mass + value) / 2, 4), round((mass - value) / 2, 4))
            if mode == "ask":
                found.append((claim, *verdict))
                continue
            at = answer.find(claim.strip(), end)
            end = end if at < 0 else at + len(claim.strip())
            if mass > VERDICT:
                found.append((answer[start:end].strip(" .,!?\n"), *verdict))
                start = end
        return found


def refuse_silent_judge(with_mass: Sequence[bool], who: str) -> int:
    """How many verdicts have no probability mass. Raises ModelError where none has any: such a judge answers with
    other words than the recipe's, and what is read is noise."""
    silent = len(with_mass) - sum(with_mass)
    if with_mass and not any(with_mass):
        raise ModelError(
            f"{who}: in all of {silent} verdicts the judge gives its verdict words together less than {MIN_MASS} of "
            "probability, so they say nothing. Ask for these words in the judge's prompt, choose words that the model "
            "uses (`preference.claims.yes` and `.no`, `preference.pairwise.choices`), or train it longer in `sft`."
        )
    return silent


@torch.no_grad()
def judge_claims(
    role: ActiveRole, items: Sequence[AnswerToJudge], section: Claims, batch_size: int
) -> list[ClaimScores]:
    """Judge answers; the role is the judge's. Results stand in the order of `items`; work is batched by length."""
    by_claims = lambda role, items, section: ask(role, items, [split_claims(item.answer) for item in items], section)
    score = _inline if section.mode == "inline" else by_claims
    verdicts: list[ClaimScores | None] = [None] * len(items)
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


def _inline(role: ActiveRole, items: Sequence[AnswerToJudge], section: Claims) -> list[ClaimScores]:
    base = role.roles.base
    rows, answers = [], []
    for item in items:
        seen = item.video is not None
        message = user_message(
            section.prompt, section.context_prefix, item.context, seen, question=item.question, claim=""
        )
        prompt = encode_prompt(base, [message], item.video)
        answers.append(encode_answer(base, prompt.opening, item.answer, end=False) if item.ids is None else item.ids)
        rows.append(prompt.extend(answers[-1]))
    batch = collate(base, rows)
    hidden_BSD = role.hidden(batch)
    # A verdict on token t is the prediction made AT t, having read it.
    at = [
        (b, len(row.ids_S) - len(answer) + t)
        for b, (row, answer) in enumerate(zip(rows, answers, strict=True))
        for t in range(len(answer))
    ]
    rows_N, places_N = torch.tensor(at, device=base.device).T if at else torch.zeros(2, 0, dtype=torch.long)
    words = [[base.tokenizer.decode([token]) for token in answer] for answer in answers]
    return _verdicts(base, hidden_BSD[rows_N, places_N], words, section, rows[0].opening)


@torch.no_grad()
def ask(
    role: ActiveRole, items: Sequence[AnswerToJudge], claims: Sequence[Sequence[str]], section: Claims
) -> list[ClaimScores]:
    """Ask about `claims` of each item (its `answer` is not read), those of one item in one row; one forward for all."""
    base = role.roles.base
    rows, ends = [], []
    for b, (item, found) in enumerate(zip(items, claims, strict=True)):
        seen = item.video is not None
        message = user_message(
            section.prompt, section.context_prefix, item.context, seen, question=item.question, claim="\0"
        )
        lead, _, rest = message.content.partition("\0")
        prompt = split_prompt(base, lead + BRANCH_MARK, item.video)
        branches = [prompt.branch(base, claim + rest) for claim in found]
        row = branch(prompt.prefix, branches)
        at = len(prompt.prefix.ids_S)
        for tokens in branches:
            at += len(tokens)
            ends.append((b, at - 1))
        rows.append(row)
    hidden_BSD = role.hidden(collate(base, rows))
    rows_N, places_N = torch.tensor(ends, device=base.device).T if ends else torch.zeros(2, 0, dtype=torch.long)
    return _verdicts(base, hidden_BSD[rows_N, places_N], claims, section, prompt.opening)


def _verdicts(
    base: Base, hidden_ND: torch.Tensor, claims: Sequence[Sequence[str]], section: Claims, opening: Opening
) -> list[ClaimScores]:
    """What the next-token distribution at each claim says of it; hidden_ND is in the order of the claims. All
    spellings of yes and of no count."""
    target_N = torch.empty(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)

    def logp_N(word: str) -> torch.Tensor:
        tokens = word_tokens(base, opening, word, "preference.claims")
        every = [
            linear_logprob(hidden_ND, base.head_weight_VD, target_N.fill_(token), bias_V=base.ban_bias_V).logp_N
            for token in tokens
        ]
        return torch.stack(every).logsumexp(0)

    yes_N, no_N = logp_N(section.yes), logp_N(section.no)
    figures_3N = torch.stack([yes_N.exp() - no_N.exp(), no_N - yes_N, yes_N.exp() + no_N.exp()])
    out, at = [], 0
    for found in claims:
        values, odds, mass = figures_3N[:, at : at + len(found)].tolist()
        out.append(ClaimScores(sum(values), list(found), values, odds, mass))
        at += len(found)
    return out
