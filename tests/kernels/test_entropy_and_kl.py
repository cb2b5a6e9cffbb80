"""Gradients of entropy and exact KL (`differentiable="all"`), against float64 autograd through whole logits."""

import math

import pytest
import torch
from helpers import GRAD_TOLERANCE, LOGP_TOLERANCE, double, problem, relative, worst

from conftest import INTERPRETING
from rlaif_kernels import linear_logprob
from rlaif_kernels import reference as plain


def all_both(impl, dtype, scale=(1.0, 1.0, 1.0), reference=True, N=21, V=210, **options):
    """Gradients of a random combination of logp, entropy and KL: ours, and float64 autograd's through whole logits."""
    hidden_ND, weight_VD, target_N, reference_ND = problem(N, 24, V, dtype, spread=0.5)
    options = {"temperature": 0.9, "softcap": 6.0, **options}
    up_3N = torch.randn(3, N) * torch.tensor(scale)[:, None]
    found = []
    for function, cast, more in (
        (linear_logprob, lambda x: x, {"impl": impl, "chunk_rows": 8, "differentiable": "all"}),
        (plain.linear_logprob, double, {}),
    ):
        leaf_ND, given = cast(hidden_ND), cast(reference_ND) if reference else None
        logp_N, _, entropy_N, kl_N = function(
            leaf_ND, cast(weight_VD), target_N, reference_hidden_ND=given, **options, **more
        )
        terms = [logp_N, entropy_N] + [kl_N] * reference
        sum((up_N * term_N).sum() for up_N, term_N in zip(up_3N, terms, strict=False)).backward()
        found.append((terms, leaf_ND.grad))
    (ours, grad), (want, grad64) = found
    return ours, want, grad, grad64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kl", [None, "policy||reference", "reference||policy"])
def test_gradients_of_entropy_and_kl_match_float64(impl, kl, dtype):
    options = {} if kl is None else {"kl": kl}
    ours, want, grad, grad64 = all_both(impl, dtype, reference=kl is not None, **options)
    assert all(worst(a, b) <= 2 * LOGP_TOLERANCE[dtype] for a, b in zip(ours, want, strict=True))
    assert grad.dtype == dtype and relative(grad, grad64) <= GRAD_TOLERANCE[dtype]
    assert not grad[:2].any(), "ignored rows are not 0"


@pytest.mark.parametrize("kl", ["policy||reference", "reference||policy"])
@pytest.mark.parametrize("scale", [(1e3, 0.0, 0.0), (0.0, 1e3, 0.0), (0.0, 0.0, 1e3), (1e-2, 1e-2, 1e-2)])
def test_upstream_gradients_beyond_fp16(impl, scale, kl):
    """dz is stored in units of its bound, so gradients of hundreds fit fp16 as gradients of hundredths do."""
    _, _, grad, grad64 = all_both(impl, torch.float16, scale, N=11 if INTERPRETING else 21, kl=kl)
    assert grad.isfinite().all() and relative(grad, grad64) <= GRAD_TOLERANCE[torch.float16]


def test_all_and_logp_give_the_same_values_and_the_same_gradient_of_logp(impl):
    hidden_ND, weight_VD, target_N, reference_ND = problem(30, 24, 100, torch.float32)
    up_N, grads, values = torch.randn(30), [], []
    for differentiable in ("logp", "all"):
        out = linear_logprob(
            hidden_ND, weight_VD, target_N, reference_hidden_ND=reference_ND, differentiable=differentiable, impl=impl
        )
        grads += torch.autograd.grad((out.logp_N * up_N).sum(), hidden_ND)
        values.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert relative(*grads) <= 1e-6


def test_entropy_and_kl_worked_by_hand(impl):
    """p = (3/4, 1/4) for h = ln 3, reference (1/2, 1/2): dH/dh = -p q h = -3/16 ln 3, dKL/dh = 3/16 ln 3."""
    for name, want in (("entropy_N", -3 / 16 * math.log(3)), ("kl_N", 3 / 16 * math.log(3))):
        hidden_ND = torch.full((1, 1), math.log(3), requires_grad=True)
        out = linear_logprob(
            hidden_ND,
            torch.tensor([[1.0], [0.0]]),
            torch.tensor([0]),
            reference_hidden_ND=torch.zeros(1, 1),
            differentiable="all",
            impl=impl,
        )
        getattr(out, name).sum().backward()
        assert hidden_ND.grad.item() == pytest.approx(want, abs=1e-6)


def test_the_other_kl_worked_by_hand(impl):
    """KL(r || p) of r = (1/2, 1/2) and p = (3/4, 1/4) is ln 2 - ln 3 / 2; its derivative by h is p - r = 1/4. Of a
    policy to itself both are exactly 0."""
    weight_VD, target_N = torch.tensor([[1.0], [0.0]]), torch.tensor([0])
    for policy, want, slope in ((math.log(3), math.log(2) - math.log(3) / 2, 1 / 4), (0.0, 0.0, 0.0)):
        hidden_ND = torch.full((1, 1), policy, requires_grad=True)
        options = {"reference_hidden_ND": torch.zeros(1, 1), "kl": "reference||policy"}
        out = linear_logprob(hidden_ND, weight_VD, target_N, differentiable="all", impl=impl, **options)
        out.kl_N.sum().backward()
        assert out.kl_N.item() == pytest.approx(want, abs=1e-6) and hidden_ND.grad.item() == pytest.approx(slope)
    with pytest.raises(ValueError, match="kl"):
        linear_logprob(hidden_ND, weight_VD, target_N, kl="js")


@pytest.mark.parametrize("kl", ["policy||reference", "reference||policy"])
def test_all_gradcheck(kl):
    hidden_ND, weight_VD, target_N, reference_ND = problem(4, 5, 7, torch.float64)

    def run(hidden_ND):
        out = linear_logprob(
            hidden_ND,
            weight_VD,
            target_N,
            softcap=2.0,
            temperature=0.8,
            reference_hidden_ND=reference_ND,
            differentiable="all",
            chunk_rows=3,
            kl=kl,
        )
        return out.logp_N, out.entropy_N, out.kl_N

    assert torch.autograd.gradcheck(run, (hidden_ND,))


def test_no_real_token_gives_zero_and_no_gradient(impl):
    hidden_ND, weight_VD, _, _ = problem(3, 24, 50, torch.float32)
    for differentiable in ("logp", "all"):
        out = linear_logprob(hidden_ND, weight_VD, torch.full((3,), -100), differentiable=differentiable, impl=impl)
        (grad,) = torch.autograd.grad(out.logp_N.sum(), hidden_ND)
        assert not out.logp_N.any() and not grad.any()
