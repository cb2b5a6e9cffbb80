"""Advantages without a model: whitening over real tokens and the leave-one-out baseline (GAE is `rlaif_kernels.gae`).

Departure from the release: whitening there counts pads, about 86 % of all positions, so its statistics are the pads'.

Shapes: B answers, T answer positions; `mask_BT` is True at real tokens.
"""

import torch
from torch import Tensor


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales `x_BT` to unit variance over real tokens (Bessel-corrected, eps 1e-8 under the root); pads become 0.

    With `shift_mean` the mean becomes 0; without it the mean stays what it was (for rewards, whose mean is meant).

    Raises ValueError below two real tokens: there is no variance to speak of.
    """
    mask_BT = mask_BT.bool()
    x_N = x_BT[mask_BT]
    if x_N.numel() < 2:
        raise ValueError(f"whitening needs at least two real tokens, found {x_N.numel()}; use larger rollouts")
    mean = x_N.mean()
    white_BT = (x_BT - mean) * torch.rsqrt(x_N.var() + 1e-8)
    if not shift_mean:
        white_BT = white_BT + mean
    return torch.where(mask_BT, white_BT, torch.zeros_like(white_BT))


def rloo(score_B: Tensor, group_size: int) -> Tensor:
    """Each answer's score minus the mean score of its prompt's other answers (Ahmadian et al., arXiv 2402.14740).

    The `group_size` answers to one prompt stand next to each other. Raises ValueError when groups cannot be formed.
    """
    if group_size < 2 or score_B.numel() % group_size:
        raise ValueError(
            f"{score_B.numel()} scores in groups of {group_size}: leave-one-out needs whole groups of two or more; "
            "set ppo.group_size >= 2 and ppo.rollouts to a multiple of it"
        )
    score_GK = score_B.view(-1, group_size)
    others_GK = (score_GK.sum(dim=1, keepdim=True) - score_GK) / (group_size - 1)
    return (score_GK - others_GK).view(-1)
