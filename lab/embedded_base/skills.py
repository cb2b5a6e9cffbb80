"""How well the embedded base does each of its tasks on held-out videos."""

from __future__ import annotations

import random
from collections import defaultdict

import torch

from lab.embedded_base.network import forward
from lab.embedded_base.sheet import NUMBER, collate
from lab.embedded_base.tasks import skill_sheets


@torch.no_grad()
def measure(model, pooled_NFKD: torch.Tensor, facts: list, start: int, count: int, seed: int = 5) -> dict[str, float]:
    """Skills on `count` videos from index `start`, as shares.

    Short answers and captions count when every word is right (greedy). Checks count attribute words; `pair_check` is
    the share of pairs whose two summed checks (sum of P(yes) - P(no)) are ordered as the truth, `pair_letter` the same
    of the mean of both orders of the pairwise judge, `consistency` the share of untied pairs whose two orders agree.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for first in range(start, start + count, 20):
        rngs = [
            (video, random.Random(f"skills/{seed}/{video}")) for video in range(first, min(first + 20, start + count))
        ]
        batch = collate([sheet for video, rng in rngs for sheet in skill_sheets(video, facts[video], rng)])
        logits_BLV = forward(model, batch, pooled_NFKD).last_BLD @ model.lm_head.weight.t()
        sums: dict[int, list[tuple[str, float, int]]] = defaultdict(list)
        for span in batch.spans:
            columns = slice(span.columns.start, span.columns.stop)
            target, logits = batch.target_BL[span.row, columns], logits_BLV[span.row, columns]
            if span.kind.startswith("check"):
                words = (target == NUMBER["yes"]) | (target == NUMBER["no"])
                chance = logits.softmax(1)
                gap = chance[:, NUMBER["yes"]] - chance[:, NUMBER["no"]]
                right[span.kind] += ((gap > 0) == (target == NUMBER["yes"]))[words].float().tolist()
                truth = int((target == NUMBER["yes"]).sum() - (target == NUMBER["no"]).sum())
                sums[span.row].append((span.kind.split()[1], gap.sum().item(), truth))
            else:
                right[span.kind].append(float((logits.argmax(1) == target).all()))
        for (where, a, score_a), (_, b, score_b) in sums.values():
            if score_a != score_b:
                right[f"pair_check {where}"].append(float((a > b) == (score_a > score_b)))
        for one, two in zip(batch.letters[0::2], batch.letters[1::2], strict=True):
            if one.margin:
                gaps = [
                    (logits_BLV[x.row, x.column, NUMBER["A"]] - logits_BLV[x.row, x.column, NUMBER["B"]]).item()
                    for x in (one, two)
                ]
                where = "context" if NUMBER["context"] in batch.tokens_BL[one.row] else "video"
                right[f"pair_letter {where}"].append(float((gaps[0] > gaps[1]) == (one.margin > 0)))
                right[f"consistency {where}"].append(float((gaps[0] > 0) == (gaps[1] < 0)))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}
