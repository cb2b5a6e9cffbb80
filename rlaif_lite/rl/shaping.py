"""From a judged answer to a reward per token: KL penalty, score placement, stop and length penalties, KL controller.

Published: VLM-RLAIF (arXiv 2402.03746), release files RLAIF/models/rl_trainer.py and ppo_trainer.py.
Departures, each because the release's form is a defect:
- the per-token KL is not clamped at zero: the clamp punishes only tokens that became more likely, a biased estimate;
- the score stands on the last real token, not on the last padded position (index 895 whatever the answer's length);
- every term is zero at pads; nothing is multiplied by 10 afterwards;
- an answer counts as stopped when it ends with EOS and for no other reason (the release cut answers at "?").

Shapes: B answers, T answer positions (padded on either side; `mask_BT` is True at real tokens).
"""

from typing import Literal

import torch
from torch import Tensor


def kl_penalty(logp_BT: Tensor, ref_logp_BT: Tensor, kind: Literal["k1", "k3"]) -> Tensor:
    """Per-token estimate, in nats, of KL(policy || reference) from log-probs of tokens that the policy sampled.

    k1 = logp - ref_logp: unbiased, may be negative at a token. k3 = exp(-k1) - 1 + k1: never negative, lower variance
    (Schulman, "Approximating KL divergence", 2020). Neither is clamped. Pads are the caller's to mask.
    """
    k1_BT = logp_BT - ref_logp_BT
    if kind == "k1":
        return k1_BT
    if kind == "k3":
        return torch.expm1(-k1_BT) + k1_BT
    raise ValueError(f"KL estimator is {kind!r}; known are 'k1' and 'k3'")


def sequence_score(
    rm_score_B: Tensor,
    stopped_B: Tensor,
    length_B: Tensor,
    max_length: int,
    stop_penalty: float,
    length_penalty: float | Tensor,
    stop_buffer: int = 0,
) -> Tensor:
    """One number per answer: `rm - stop_penalty * (no EOS) - length_penalty * length / max_length`.

    With a `stop_buffer` of c tokens the stop penalty rises linearly over the last c tokens before `max_length`, for
    answers that did stop, too (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13).
    Both penalties are positive numbers; they change the score and never take its place, as published (8 and 10 there).
    `length_B` counts real answer tokens, EOS included. A length penalty may be given for each answer.
    """
    overlong_B, length_B = (~stopped_B.bool()).to(rm_score_B.dtype), length_B.to(rm_score_B.dtype)
    if stop_buffer:
        overlong_B = overlong_B.maximum(((length_B - max_length) / stop_buffer + 1.0).clamp(0.0, 1.0))
    return rm_score_B - stop_penalty * overlong_B - length_penalty * length_B / max_length


def symbolic_bonus(answer: str, kind: int | None) -> float:
    """What an answer earns by being the one that is known to be right, before its weight (LLaVA-RLHF, arXiv 2309.14525,
    `caption_type` in its files): kinds 2 to 5, an option A to D, 1 for naming it; kind 6, a question to be denied, 0.5
    for "No" and -0.5 for "Yes" at the start; 0 for everything else, as published for a gold Yes, too."""
    if kind in (2, 3, 4, 5):
        letter = "ABCD"[kind - 2]
        return float(answer.startswith(f"{letter}.") or f"correct option is {letter}." in answer)
    if kind == 6:
        return 0.5 * answer.startswith("No") - 0.5 * answer.startswith("Yes")
    return 0.0


def shaped_reward(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Per-token reward: `-kl_coef * kl` at every real token, plus the answer's score at its last real token; 0 at pads.

    Raises ValueError for an answer without a single real token: its score would have no place to stand.
    """
    mask_BT = mask_BT.bool()
    empty_B = ~mask_BT.any(dim=1)
    if empty_B.any():
        rows = empty_B.nonzero().flatten().tolist()
        raise ValueError(f"answers {rows} have no real token, so their score has no place; drop them before shaping")
    last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1)
    reward_BT = torch.where(mask_BT, -kl_coef * kl_BT, torch.zeros_like(kl_BT))
    return reward_BT.scatter_add(1, last_B[:, None], score_B.to(reward_BT.dtype)[:, None])


def adapted(kl_coef: float, kl: float, answers: int, target: float | None, horizon: float) -> float:
    """The KL coefficient of the next step: a proportional controller in log space (Ziegler et al. 2019, arXiv
    1909.08593, section 2.2), kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon).

    `kl`: mean over answers of the KL summed over tokens, in nats; `answers`: how many the step sampled; `target`: nats
    per answer, None for a coefficient that stays as it is (published: 0.1); `horizon`: in answers.
    """
    if target is None:
        return kl_coef
    return kl_coef * (1.0 + min(max(kl / target - 1.0, -0.2), 0.2) * answers / horizon)
