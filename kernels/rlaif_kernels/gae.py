"""Generalised advantage estimation over a padded batch, in one launch.

Schulman et al. 2016, eq. 16: delta_t = r_t + gamma v_{t+1} - v_t, A_t = delta_t + gamma lambda A_{t+1}; return_t = A_t
+ v_t. The value after the last real token is 0: a finished answer has no future.

Shapes: B rows, T tokens.
"""

import torch
from torch import Tensor

from .checks import FLOATS, need_tensor, use_triton


def gae(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B,T), float32 (float64 for float64 rewards), 0 on masked positions; no gradient.

    `mask_BT` is 1 (or True) on real tokens and 0 on the padding, which stands at the end of a row only: what a padded
    position holds, be it NaN, reaches nothing. Rewards and values may differ in dtype; arithmetic is float32.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    need_tensor("reward_BT", reward_BT, (None, None), reward_BT, FLOATS)
    need_tensor("value_BT", value_BT, tuple(reward_BT.shape), reward_BT, FLOATS)
    need_tensor("mask_BT", mask_BT, tuple(reward_BT.shape), reward_BT, (torch.bool, torch.int64, *FLOATS))
    with torch.no_grad():
        real_BT = mask_BT.bool()
        if use_triton(impl, reward_BT):
            from . import triton_kernels

            return triton_kernels.gae(reward_BT, value_BT, real_BT, gamma, lam)
        dtype = torch.promote_types(reward_BT.dtype, torch.float32)
        reward_BT = reward_BT.detach().to(dtype).masked_fill(~real_BT, 0.0)
        value_BT = value_BT.detach().to(dtype).masked_fill(~real_BT, 0.0)
        return _gae_torch(reward_BT, value_BT, real_BT, gamma, lam)


def _gae_torch(reward_BT: Tensor, value_BT: Tensor, real_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Everything but the recursion is vectorised; the recursion is one fused multiply-add per token."""
    next_value_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], dim=1)
    delta_TB = (reward_BT + gamma * next_value_BT - value_BT).T.contiguous()
    for t in range(delta_TB.shape[0] - 2, -1, -1):
        delta_TB[t].add_(delta_TB[t + 1], alpha=gamma * lam)
    advantage_BT = delta_TB.T.contiguous().masked_fill_(~real_BT, 0.0)
    return advantage_BT, advantage_BT + value_BT
