"""What both row passes, torch's and Triton's, take and give: the head, derivatives of a loss, results of rows.

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


class Upstream(NamedTuple):
    """Derivatives of a loss by each row's statistics, divided by `rows.bound_of_dz`; 0 on rows that do not count."""

    logp_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor


class Rows(NamedTuple):
    """Per-row results, float32 (float64 for float64 inputs); 0 on rows whose target is the ignore index."""

    logp_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor | None
    # how much of W[y] to add to -grad for T * d lse / d hidden: T dz_y/ds_y, less the rounding of dz
    at_target_N: Tensor | None
    grad_ND: Tensor | None  # T * d/d hidden of logp, or of the loss whose derivatives are upstream


def take(fields: Rows | Upstream, rows: slice) -> Rows | Upstream:
    """The same for these rows only; views."""
    return type(fields)(*(field[rows] if isinstance(field, Tensor) else field for field in fields))


def dz_unit(dtype: torch.dtype) -> float:
    """What dz is multiplied by before it is rounded to `dtype`.

    fp16 ends at 6e-8, the probabilities of a large vocabulary do not; dz lies in [-1, 1], so there is room above it.
    """
    return 8192.0 if dtype == torch.float16 else 1.0
