"""What each function means, written as plainly as it can be: whole logits, Python loops, autograd. Slow, large,
obviously right.

The tests call these in float64; nothing else does. Same arguments and results as the public functions, less the checks.

Shapes: N tokens (rows), D channels, V vocabulary; B rows, T tokens of a padded batch; T frames, P cells, C channels, K
kept.
"""

import torch
from torch import Tensor


def logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """z_NV = softcap(hidden W^T + bias) / temperature; ids with a bias of -1e30 or -inf are banned."""
    z_NV = hidden_ND @ weight_VD.T
    if bias_V is not None:
        bias_V = bias_V.clamp(min=-1e30)
        z_NV = z_NV + bias_V
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
        if bias_V is not None:
            z_NV = z_NV.masked_fill(bias_V <= -5e29, -1e30)
    return z_NV / temperature


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reference_hidden_ND: Tensor | None = None,
    kl: str = "policy||reference",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logp_N, lse_N, entropy_N, kl_N or None), all of them differentiable here."""
    real_N = target_N != ignore_index
    z_NV = logits(hidden_ND, weight_VD, bias_V, temperature, softcap)
    lse_N = z_NV.logsumexp(1)
    logp_NV = z_NV - lse_N[:, None]
    p_NV = logp_NV.exp()
    logp_N = logp_NV.gather(1, target_N.where(real_N, 0)[:, None])[:, 0]
    entropy_N = -(p_NV * logp_NV).sum(1)
    kl_N = None
    if reference_hidden_ND is not None:
        logr_NV = logits(reference_hidden_ND, weight_VD, bias_V, temperature, softcap).log_softmax(1)
        gap_NV = logp_NV - logr_NV
        kl_NV = p_NV * gap_NV if kl == "policy||reference" else -logr_NV.exp() * gap_NV
        kl_N = kl_NV.sum(1).where(real_N, 0.0)
    return logp_N.where(real_N, 0.0), lse_N.where(real_N, 0.0), entropy_N.where(real_N, 0.0), kl_N


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Backwards over each row's real tokens, one number at a time."""
    advantage_BT, return_BT = torch.zeros_like(reward_BT), torch.zeros_like(reward_BT)
    for b in range(reward_BT.shape[0]):
        advantage = next_value = 0.0
        for t in reversed(range(reward_BT.shape[1])):
            if mask_BT[b, t]:
                delta = reward_BT[b, t] + gamma * next_value - value_BT[b, t]
                advantage = delta + gamma * lam * advantage
                next_value = value_BT[b, t]
                advantage_BT[b, t], return_BT[b, t] = advantage, advantage + value_BT[b, t]
    return advantage_BT, return_BT


def frame_dissimilarity(features_TPC: Tensor) -> Tensor:
    """1 - cosine to the same cell of the frame before; +inf on frame 0."""
    score_TP = torch.full(features_TPC.shape[:2], torch.inf, dtype=features_TPC.dtype)
    for t in range(1, features_TPC.shape[0]):
        score_TP[t] = 1 - torch.cosine_similarity(features_TPC[t], features_TPC[t - 1], dim=-1)
    return score_TP


def select(score_N: Tensor, k: int) -> list[int]:
    """Indices of the k highest scores, of equals the first, in ascending order."""
    scores = score_N.tolist()
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
