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

from ..model.inputs import collate, encode_prompt, single_token
from ..model.memory import in_pieces
from ..model.roles import ActiveRole
from ..recipe import Pairwise
from ..video.cache import FeatureRecord
from .claims import user_message


class Pair(NamedTuple):
    """Two answers to one question."""

    video: FeatureRecord | None
    question: str
    a: str
    b: str
    context: str | None


class Choice(NamedTuple):
    """What the judge said of a pair."""

    margin: float  # mean over both orders of logit(first choice) - logit(second): positive = a is better
    consistent: bool  # both orders named the same winner


@torch.no_grad()
def judge_pairs(role: ActiveRole, pairs: Sequence[Pair], section: Pairwise, batch_size: int) -> list[Choice]:
    """Compare pairs in both orders; results stand in the order of `pairs`."""
    gaps = []
    for swapped in (False, True):
        texts = [(p.b, p.a) if swapped else (p.a, p.b) for p in pairs]
        gaps.append(_gaps(role, pairs, texts, section, batch_size))
    return [Choice((ab - ba) / 2, (ab > 0) == (ba < 0)) for ab, ba in zip(*gaps, strict=True)]


def _gaps(role: ActiveRole, pairs: Sequence[Pair], texts, section: Pairwise, batch_size: int) -> list[float]:
    """logit(first choice) - logit(second choice), per pair, in the order that `texts` gives."""
    base = role.roles.base
    first, second = (single_token(base, choice, "preference.pairwise.choices") for choice in section.choices)

    def read(part: Sequence[tuple[Pair, tuple[str, str]]]) -> list[float]:
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
        logits_B2 = hidden_BD.float() @ base.head_weight_VD[[first, second]].float().T
        return (logits_B2[:, 0] - logits_B2[:, 1]).tolist()

    return in_pieces(list(zip(pairs, texts, strict=True)), batch_size, read)
