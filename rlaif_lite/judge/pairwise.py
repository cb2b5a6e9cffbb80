"""Two answers compared by the judge: the gap between the logits of its two choices, over both orders (VLM-RLAIF
section 3.2).

The paper asks the model to choose A or B, with the narrative in the prompt. Here the choice is read from the logits,
so no text is parsed, and both orders are always asked: their mean cancels what the position adds, and how often they
agree is reported. A template with `<|>` marks lays the two answers side by side as branches of the prompt, neither
seeing the other and neither standing first (see `model.inputs`); a template without marks is the plain sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..model.inputs import collate, encode_prompt
from ..model.memory import in_pieces
from ..model.roles import ActiveRole
from ..model.text import word_tokens
from ..recipe import Pairwise
from ..video.cache import FeatureRecord
from .claims import MIN_MASS, user_message


class AnswerPair(NamedTuple):
    """Two answers to one question."""

    video: FeatureRecord | None
    question: str
    a: str
    b: str
    context: str | None


class Comparison(NamedTuple):
    """What the judge says about a pair."""

    margin: float  # mean over both orders of logit(first choice) - logit(second): positive = a is better
    consistent: bool  # both orders named the same winner
    mass: float  # P(first choice) + P(second), the lower of both orders

    @property
    def has_mass(self) -> bool:
        """Whether the judge names a choice in both orders."""
        return self.mass >= MIN_MASS


@torch.no_grad()
def judge_pairs(role: ActiveRole, pairs: Sequence[AnswerPair], section: Pairwise, batch_size: int) -> list[Comparison]:
    """Compare pairs in both orders; results stand in the order of `pairs`."""
    gaps = []
    for swapped in (False, True):
        texts = [(p.b, p.a) if swapped else (p.a, p.b) for p in pairs]
        gaps.append(_gaps(role, pairs, texts, section, batch_size))
    return [
        Comparison((ab - ba) / 2, (ab > 0) == (ba < 0), min(mass_ab, mass_ba))
        for (ab, mass_ab), (ba, mass_ba) in zip(*gaps, strict=True)
    ]


def _gaps(
    role: ActiveRole, pairs: Sequence[AnswerPair], texts, section: Pairwise, batch_size: int
) -> list[tuple[float, float]]:
    """(logit(first choice) - logit(second choice), P(either)), per pair, in the order that `texts` gives. A choice
    counts with and without a blank before it."""
    base = role.roles.base

    def read(part: Sequence[tuple[AnswerPair, tuple[str, str]]]) -> list[tuple[float, float]]:
        rows = []
        for pair, (a, b) in part:
            seen = pair.video is not None
            message = user_message(
                section.prompt, section.context_prefix, pair.context, seen, question=pair.question, a=a, b=b
            )
            rows.append(encode_prompt(base, [message], pair.video))
        batch = collate(base, rows)
        hidden_BSD = role.hidden(batch)
        last_B = batch.mask_BS.sum(1) - 1
        hidden_BD = hidden_BSD[torch.arange(len(rows), device=last_B.device), last_B]
        spelled = [
            word_tokens(base, rows[0].opening, choice, "preference.pairwise.choices", capitals=False)
            for choice in section.choices
        ]
        logit_B2 = torch.stack(
            [(hidden_BD.float() @ base.head_weight_VD[ids].float().T).logsumexp(1) for ids in spelled], 1
        )
        total_B1 = ((hidden_BD @ base.head_weight_VD.T).float() + base.ban_bias_V).logsumexp(1, keepdim=True)
        mass_B = (logit_B2 - total_B1).exp().sum(1)
        return list(zip((logit_B2[:, 0] - logit_B2[:, 1]).tolist(), mass_B.tolist(), strict=True))

    return in_pieces(list(zip(pairs, texts, strict=True)), batch_size, read)
