"""The Triton kernels as a GPU runs them, against float64."""

import pytest
import torch
from helpers import GRAD_TOLERANCE, LOGP_TOLERANCE, double, problem, relative, worst

from rlaif_kernels import linear_logprob, reference


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_gradients_on_a_gpu(dtype):
    hidden_ND, weight_VD, target_N, _ = problem(300, 256, 5000, dtype)
    exact_ND = double(hidden_ND)
    exact_N = reference.linear_logprob(exact_ND, double(weight_VD), target_N)[0]
    on_gpu_ND = hidden_ND.detach().cuda().requires_grad_()
    found_N = linear_logprob(on_gpu_ND, weight_VD.cuda(), target_N.cuda(), impl="triton").logp_N
    assert worst(found_N.cpu(), exact_N) <= LOGP_TOLERANCE[dtype]
    upstream_N = torch.linspace(-1, 1, len(target_N))
    exact_N.backward(upstream_N.double())
    found_N.backward(upstream_N.cuda())
    assert relative(on_gpu_ND.grad.cpu(), exact_ND.grad) <= GRAD_TOLERANCE[dtype]
