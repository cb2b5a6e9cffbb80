"""linear_logprob against float64: dtypes, options, odd shapes, large logits, banned ids, any upstream gradient."""

import math

import pytest
import torch
from helpers import GRAD_TOLERANCE, LOGP_TOLERANCE, double, problem, relative, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import INTERPRETING
from rlaif_kernels import frozen_head, linear_logprob
from rlaif_kernels import reference as plain
from rlaif_kernels.rows import Head, run_rows

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"bias": True},
    {"bias": True, "softcap": 5.0, "temperature": 1.3},
]
SHAPES = [(0, 24, 50), (1, 24, 50), (37, 96, 1009), (513, 40, 1500)]
CASES = [(shape, options) for shape in SHAPES for options in OPTIONS]
if INTERPRETING:  # some ten milliseconds per row and block
    CASES = [((0, 24, 50), {}), ((19, 96, 600), {}), ((19, 96, 600), OPTIONS[-1])]
    CASES += [((5, 24, 601), options) for options in OPTIONS]


def both(impl, hidden_ND, weight_VD, target_N, reference_ND, chunk_rows=None, bias=False, bias_V=None, **options):
    """(ours, float64 reference), and the gradients of a random combination of logp and lse."""
    if bias:
        bias_V = 0.5 * torch.randn(weight_VD.shape[0])
    ours = linear_logprob(
        hidden_ND,
        weight_VD,
        target_N,
        bias_V=bias_V,
        reference_hidden_ND=reference_ND,
        impl=impl,
        chunk_rows=chunk_rows,
        **options,
    )
    hidden64_ND = double(hidden_ND)
    want = plain.linear_logprob(
        hidden64_ND,
        double(weight_VD),
        target_N,
        bias_V=double(bias_V),
        reference_hidden_ND=double(reference_ND),
        **options,
    )
    up_2N = torch.randn(2, len(target_N))
    (ours.logp_N * up_2N[0] + ours.lse_N * up_2N[1]).sum().backward()
    (want[0] * up_2N[0] + want[1] * up_2N[1]).sum().backward()
    return ours, want, hidden_ND.grad, hidden64_ND.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_matches_float64(impl, shape, options, dtype):
    N, D, V = shape
    ours, want, grad, grad64 = both(
        impl, *problem(N, D, V, dtype, spread=0.5), chunk_rows=None if N < 10 else 16, **options
    )
    tolerance = LOGP_TOLERANCE[dtype]
    assert all(out.dtype == torch.float32 for out in ours) and grad.dtype == dtype
    assert worst(ours.logp_N, want[0]) <= tolerance and worst(ours.lse_N, want[1]) <= tolerance
    assert worst(ours.entropy_N, want[2]) <= 2 * tolerance and worst(ours.kl_N, want[3]) <= 2 * tolerance
    assert relative(grad, grad64) <= GRAD_TOLERANCE[dtype]
    if N > 2:
        assert not any(out[:2].any() for out in ours) and not grad[:2].any(), "ignored rows are not 0"


@pytest.mark.parametrize("mean_logit", [-12.0, 12.0])
def test_ragged_vocabulary_far_from_zero(impl, mean_logit):
    """Columns beyond V must not count as logits of 0: at a mean of -12 that is wrong by nats."""
    ours, want, grad, grad64 = both(impl, *problem(9, 33, 1601, torch.float32, mean_logit=mean_logit))
    assert worst(ours.logp_N, want[0]) <= 4e-6  # the logits themselves are rounded to 1e-6
    assert relative(grad, grad64) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand(impl, dtype):
    ours, want, grad, grad64 = both(impl, *problem(12, 24, 130, dtype, spread=1e4))
    assert want[0].abs().max() > 1e4
    for out, expected in zip(ours, want, strict=True):
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-3)
    assert relative(grad, grad64) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_lse_alone_over_a_large_flat_vocabulary(impl, dtype):
    """Without the target's own row nothing is left but probabilities of 2e-5.

    They lie below fp16's normal range, and what bf16 rounds off the target's element of dz is as large as all of them.
    """
    hidden_ND, weight_VD, _, _ = problem(2, 8, 60000, dtype, spread=0.1, mean_logit=1.0)
    linear_logprob(hidden_ND, weight_VD, torch.tensor([7, 59999]), impl=impl).lse_N.sum().backward()
    exact_ND = double(hidden_ND)
    plain.linear_logprob(exact_ND, double(weight_VD), torch.tensor([7, 59999]))[1].sum().backward()
    assert relative(hidden_ND.grad, exact_ND.grad) <= GRAD_TOLERANCE[dtype]


@pytest.mark.skipif(
    not INTERPRETING, reason="off a GPU the public function refuses such a target; this is the kernel's own answer"
)
def test_the_kernel_answers_a_target_out_of_range_with_nan(impl):
    hidden_ND, weight_VD, _, _ = problem(3, 8, 50, torch.float32)
    rows = run_rows(
        hidden_ND,
        Head(weight_VD, None, 1.0, None),
        torch.tensor([1, 50, -7]),
        torch.ones(3, dtype=torch.bool),
        want_grad=True,
        triton=True,
        chunk_rows=None,
    )
    assert rows.logp_N.isnan().tolist() == [False, True, True]
    assert rows.lse_N.isfinite().all()


@pytest.mark.parametrize("ban", [-1e30, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"temperature": 0.01}, {"softcap": 3.0, "temperature": 0.01}], ids=str
)
def test_banned_ids_are_as_if_they_were_not_there(impl, options, ban):
    hidden_ND, weight_VD, target_N, reference_ND = problem(7, 24, 60, torch.float32)
    target_N = target_N.remainder(40)
    bias_V = torch.where(torch.arange(60) < 40, 0.0, ban)
    given = {"bias_V": bias_V, "reference_hidden_ND": reference_ND, "impl": impl, "chunk_rows": 4}
    ours = linear_logprob(hidden_ND, weight_VD, target_N, **given, **options)
    (ours.logp_N.sum() + ours.lse_N.sum()).backward()
    alive_ND = double(hidden_ND)
    want = plain.linear_logprob(
        alive_ND, weight_VD[:40].double(), target_N, reference_hidden_ND=reference_ND.double(), **options
    )
    (want[0].sum() + want[1].sum()).backward()
    for out, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert relative(hidden_ND.grad, alive_ND.grad) <= 1e-5


def test_a_banned_target_is_finite(impl):
    hidden_ND, weight_VD, _, reference_ND = problem(3, 8, 10, torch.float32)
    bias_V = torch.zeros(10).index_fill(0, torch.tensor([4]), -1e30)
    ours = linear_logprob(
        hidden_ND, weight_VD, torch.full((3,), 4), bias_V=bias_V, reference_hidden_ND=reference_ND, impl=impl
    )
    ours.logp_N.sum().backward()
    assert (ours.logp_N < -1e29).all()
    assert all(value.isfinite().all() for value in (*ours, hidden_ND.grad))


def test_kl_to_oneself_is_exactly_zero(impl):
    hidden_ND, weight_VD, target_N, _ = problem(9, 24, 333, torch.bfloat16)
    ours = linear_logprob(
        hidden_ND, weight_VD, target_N, reference_hidden_ND=hidden_ND, softcap=4.0, temperature=0.9, impl=impl
    )
    assert not ours.kl_N.any()


def test_worked_by_hand(impl):
    """h = ln 3 against the rows (1, 0) of the head: p = (3/4, 1/4)."""
    hidden_ND = torch.full((1, 1), math.log(3), requires_grad=True)
    out = linear_logprob(
        hidden_ND, torch.tensor([[1.0], [0.0]]), torch.tensor([0]), reference_hidden_ND=torch.zeros(1, 1), impl=impl
    )
    out.logp_N.sum().backward()
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    got = [out.logp_N.item(), out.lse_N.item(), out.entropy_N.item(), out.kl_N.item(), hidden_ND.grad.item()]
    assert got == pytest.approx([math.log(0.75), math.log(4), entropy, math.log(2) - entropy, 0.25], abs=1e-6)


@settings(max_examples=8 if INTERPRETING else 60, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 20),
    D=st.integers(1, 40),
    V=st.integers(1, 600),
    chunk_rows=st.none() | st.integers(1, 25),
    bias=st.booleans(),
    softcap=st.none() | st.floats(1.0, 30.0),
    temperature=st.floats(0.3, 3.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16] + [torch.float64] * (not INTERPRETING)),
)
def test_any_shape(impl, N, D, V, chunk_rows, bias, softcap, temperature, dtype):
    tensors = problem(N, D, V, dtype)
    ours, want, grad, grad64 = both(
        impl, *tensors, chunk_rows=chunk_rows, bias=bias, softcap=softcap, temperature=temperature
    )
    limit = 1e-9 if dtype == torch.float64 and not bias else 2e-5
    assert (
        worst(ours.logp_N, want[0]) <= limit
        and worst(ours.entropy_N, want[2]) <= limit
        and worst(ours.kl_N, want[3]) <= limit
    )
    assert worst(grad, grad64) <= max(
        10 * limit, float(grad64.abs().max()) * 1e-2 if dtype == torch.bfloat16 and N else 0
    )


def test_gradcheck():
    hidden_ND, weight_VD, target_N, reference_ND = problem(4, 5, 7, torch.float64)
    bias_V = torch.randn(7, dtype=torch.float64)

    def run(hidden_ND):
        return linear_logprob(
            hidden_ND,
            weight_VD,
            target_N,
            bias_V=bias_V,
            softcap=2.0,
            temperature=0.8,
            reference_hidden_ND=reference_ND,
            chunk_rows=3,
        )[:2]

    assert torch.autograd.gradcheck(run, (hidden_ND,))


def test_what_carries_a_gradient():
    hidden_ND, weight_VD, target_N, reference_ND = problem(4, 5, 7, torch.float32)
    for differentiable, want in (("logp", [True, True, False, False]), ("all", [True, False, True, True])):
        out = linear_logprob(
            hidden_ND, weight_VD, target_N, reference_hidden_ND=reference_ND, differentiable=differentiable
        )
        assert [value.requires_grad for value in out] == want
        with torch.no_grad():
            out = linear_logprob(hidden_ND, weight_VD, target_N, differentiable=differentiable)
            assert not out.logp_N.requires_grad


def test_autocast_does_not_lower_the_precision():
    hidden_ND, weight_VD, target_N, reference_ND = problem(20, 64, 200, torch.float32)
    plain = linear_logprob(hidden_ND, weight_VD, target_N, reference_hidden_ND=reference_ND)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_logprob(hidden_ND, weight_VD, target_N, reference_hidden_ND=reference_ND)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


BAD = {
    "hidden_ND is float32 of shape (2, 3, 4)": {"hidden_ND": torch.zeros(2, 3, 4)},
    "weight_VD is float32 of shape (6, 3)": {"weight_VD": torch.zeros(6, 3)},
    "weight_VD is bfloat16 of shape": {"weight_VD": torch.zeros(6, 4, dtype=torch.bfloat16)},
    "weight_VD is a Linear; expected the weight as a (V,D) tensor: weight_VD, bias_V = frozen_head(lm_head)": {
        "weight_VD": nn.Linear(4, 6)
    },
    "requires grad": {"weight_VD": torch.zeros(6, 4, requires_grad=True)},
    "strides (1, 6)": {"weight_VD": torch.zeros(4, 6).T},
    "hidden_ND is int64 of shape": {"hidden_ND": torch.zeros(5, 4, dtype=torch.int64)},
    "hidden_ND is float32 of shape (5, 4) on meta": {"hidden_ND": torch.zeros(5, 4, device="meta")},
    "target_N is int64 of shape (4,)": {"target_N": torch.zeros(4, dtype=torch.int64)},
    "target_N is float32 of shape": {"target_N": torch.zeros(5)},
    "target_N[3] is 6; expected an id in 0..5": {"target_N": torch.tensor([0, 1, 2, 6, 0])},
    "target_N[0] is -1": {"target_N": torch.tensor([-1, 1, 2, 3, 0])},
    "bias_V is float32 of shape (4,)": {"bias_V": torch.zeros(4)},
    "reference_hidden_ND is float32 of shape (4, 4)": {"reference_hidden_ND": torch.zeros(4, 4)},
    "temperature is 0": {"temperature": 0},
    "softcap is -1.0": {"softcap": -1.0},
    "chunk_rows is 0": {"chunk_rows": 0},
    "impl is 'cuda'": {"impl": "cuda"},
    "differentiable is 'kl'": {"differentiable": "kl"},
    'impl="triton" cannot be used: the tensors are on cpu': {"impl": "triton"},
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_input_is_named(message):
    good = {
        "hidden_ND": torch.zeros(5, 4),
        "weight_VD": torch.zeros(6, 4),
        "target_N": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(ValueError) as error:
        linear_logprob(**{**good, **BAD[message]})
    assert message in str(error.value)


def test_frozen_head():
    layer = nn.Linear(4, 6).requires_grad_(False)
    weight_VD, bias_V = frozen_head(layer)
    assert weight_VD is layer.weight and bias_V is layer.bias
    with pytest.raises(ValueError, match="requires grad"):
        frozen_head(nn.Linear(4, 6))
    adapted = nn.Linear(4, 6).requires_grad_(False)
    adapted.lora_A = nn.ModuleDict()
    with pytest.raises(ValueError, match="leave lm_head out of LoRA's target_modules"):
        frozen_head(adapted)
    packed = nn.Linear(4, 6).requires_grad_(False)
    packed.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        frozen_head(packed)


def test_no_tensor_of_tokens_by_vocabulary_ever_exists():
    """1024 x 64000 float32 logits are 262 MB, and a loss holds several such. What torch's allocator holds at its peak
    stays below half of one."""
    N, D, V = 1024, 16, 64000
    hidden_ND = torch.randn(N, D).bfloat16().requires_grad_()
    weight_VD, target_N = torch.randn(V, D).bfloat16(), torch.randint(0, V, (N,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_logprob(hidden_ND, weight_VD, target_N).logp_N.sum().backward()
        out = linear_logprob(hidden_ND, weight_VD, target_N, reference_hidden_ND=hidden_ND, differentiable="all")
        (out.logp_N + out.entropy_N + out.kl_N).sum().backward()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events):
        live += size
        peak = max(peak, live)
    assert 32e6 < peak < 4 * N * V / 2 + 2e6
