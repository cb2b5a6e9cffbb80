"""Problems for the row functions, and the distances that the tests hold them to."""

import torch
from torch import Tensor

LOGP_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}
GRAD_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float64: 1e-12}


def problem(N: int, D: int, V: int, dtype: torch.dtype, spread: float = 1.0, mean_logit: float = 0.0):
    """(hidden, weight, target, reference hidden): logits of this spread and mean, the first two targets ignored."""
    hidden_ND, weight_VD = torch.randn(N, D), spread * torch.randn(V, D) / D**0.5
    hidden_ND[:, 0], weight_VD[:, 0] = 1.0, mean_logit + 0.1 * torch.randn(V)
    reference_ND = hidden_ND + 0.1 * torch.randn(N, D)
    target_N = torch.randint(0, V, (N,))
    target_N[: min(2, N - 1)] = -100
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype), target_N, reference_ND.to(dtype)


def double(tensor: Tensor | None) -> Tensor | None:
    """The same values in float64, as a leaf of their own graph."""
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def worst(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.numel() else 0.0


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
