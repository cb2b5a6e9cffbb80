"""What both row passes, torch's and Triton's, are given and give back: the head, the PPO loss's inputs, the rows' results.

Shapes: N tokens (rows), D channels, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A bias at or below this bans its token id: the logit is set to BANNED after the softcap, and never yields inf or NaN.
BANNED = -1e30


class Head(NamedTuple):
    """A frozen output layer and what is done to its logits."""

    weight_VD: Tensor
    bias_V: Tensor | None  # float32 (float64 for a float64 head), nothing below BANNED
    temperature: float
    softcap: float | None


class PpoInputs(NamedTuple):
    """What the PPO loss needs per row; constants of the loss beside it."""

    old_logp_N: Tensor
    advantage_N: Tensor
    mask_N: Tensor  # 1.0 on rows that count
    reference_logp_N: Tensor | None  # for the k3 penalty
    clip: float
    entropy_coef: float
    k3_coef: float
    kl_coef: float  # of the exact KL

    def upstream(self, logp_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(g, h, k): derivatives of each row's loss by logp, entropy and exact KL; 0 on masked rows."""
        ratio_N = capped_exp(logp_N - self.old_logp_N)
        unclipped_N = -self.advantage_N * ratio_N
        clipped_N = -self.advantage_N * ratio_N.clamp(1 - self.clip, 1 + self.clip)
        g_N = unclipped_N.where(unclipped_N >= clipped_N, 0.0)
        if self.reference_logp_N is not None:
            g_N = g_N + self.k3_coef * (1 - capped_exp(self.reference_logp_N - logp_N))
        real_N = self.mask_N > 0
        return g_N.where(real_N, 0.0), -self.entropy_coef * self.mask_N, self.kl_coef * self.mask_N


class Rows(NamedTuple):
    """Per-row results, float32 (float64 for float64 inputs); 0 on rows whose target is the ignore index."""

    logp_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor | None
    # how much of W[y] to add to -grad for T * d lse / d hidden: T dz_y/ds_y, less the rounding of dz
    at_target_N: Tensor | None
    grad_ND: Tensor | None  # d/d hidden: of logp times T in float32, or of the loss's sum in the dtype of hidden


def take(fields: Rows | PpoInputs, rows: slice) -> Rows | PpoInputs:
    """The same for these rows only; views."""
    return type(fields)(*(field[rows] if isinstance(field, Tensor) else field for field in fields))


def capped_exp(x: Tensor) -> Tensor:
    """exp(x), x held within +-80: float32 stays finite, and no probability ratio that means anything is touched."""
    return x.clamp(-80.0, 80.0).exp()


def dz_unit(dtype: torch.dtype) -> float:
    """What dz is multiplied by before it is rounded to `dtype`.

    fp16 ends at 6e-8, the probabilities of a large vocabulary do not; dz lies in [-1, 1], so there is room above it.
    """
    return 8192.0 if dtype == torch.float16 else 1.0
