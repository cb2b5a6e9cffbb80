"""RMS norms as one kernel on a GPU, where transformers' modules launch six.

Inside it computes in float32 and rounds once; transformers rounds before it multiplies by the weight as well. Its
backward keeps the input in its own dtype, where transformers' keeps a float32 copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipe import Model


class RmsNorm:
    """The forward of one norm: x (..., D) -> (..., D)."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        weight_D = self.module.weight
        return F.rms_norm(x, weight_D.shape, weight_D, self.module.variance_epsilon)


def fuses_norms(section: Model, device: torch.device) -> bool:
    """Whether a base on `device` has them. unsloth's loader brings kernels of its own."""
    return device.type == "cuda" and section.loader == "transformers"


def fuse_norms(model: nn.Module) -> None:
    """Give every norm of Llama's kind (of whatever family) the forward of this module."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "variance_epsilon" in vars(module):
            setattr(module, "forward", RmsNorm(module))  # noqa: B010  as in `lora.quicken`
