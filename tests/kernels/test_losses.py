"""SFT and PPO losses: by hand, against float64 autograd, and what masked rows and micro-batches must not change."""

import math

import pytest
import torch
from helpers import GRAD_TOLERANCE, double, problem, relative, worst

from rlaif_kernels import linear_logprob, ppo_policy_loss, reference, sft_loss

HEAD = {"temperature": 0.9, "softcap": 6.0}


def rollout(N: int):
    """(old_logp, advantage, mask, reference_logp), the mask leaving out a fifth."""
    return -6 + 0.7 * torch.randn(N), torch.randn(N), torch.rand(N) > 0.2, -6 + 0.7 * torch.randn(N)


def ppo_both(impl, dtype, kl, N=21, V=210, **options):
    """Ours, the float64 reference's, and both gradients."""
    hidden_ND, weight_VD, target_N, reference_ND = problem(N, 24, V, dtype, spread=0.5)
    with torch.no_grad():
        now_N = linear_logprob(hidden_ND, weight_VD, target_N, **HEAD).logp_N
    _, advantage_N, mask_N, _ = rollout(N)
    old_N, ref_N = now_N + 0.3 * torch.randn(N), now_N + 0.3 * torch.randn(N)
    options = {"clip": 0.2, "entropy_coef": 0.03, "kl_coef": 0.2, "kl": kl, "denominator": 15.0, **HEAD, **options}
    loss, stats = ppo_policy_loss(
        hidden_ND,
        weight_VD,
        target_N,
        old_N,
        advantage_N,
        mask_N,
        reference_logp_N=ref_N,
        reference_hidden_ND=reference_ND,
        impl=impl,
        chunk_rows=8,
        **options,
    )
    hidden64_ND = double(hidden_ND)
    want, want_stats = reference.ppo_policy_loss(
        hidden64_ND,
        double(weight_VD),
        target_N,
        double(old_N),
        double(advantage_N),
        mask_N,
        reference_logp_N=double(ref_N),
        reference_hidden_ND=double(reference_ND),
        **options,
    )
    loss.backward()
    want.backward()
    return loss, stats, hidden_ND.grad, want, want_stats, hidden64_ND.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kl", ["none", "k3", "exact"])
def test_ppo_matches_float64(impl, kl, dtype):
    loss, stats, grad, want, want_stats, grad64 = ppo_both(impl, dtype, kl)
    assert worst(loss, want) <= 2e-6
    assert relative(grad, grad64) <= GRAD_TOLERANCE[dtype]
    for name, value in want_stats.items():
        assert worst(getattr(stats, name), value) <= 5e-6, name
    assert not any(stat.requires_grad for stat in stats)
    assert (grad64.abs().sum(1) > 0).sum() > 5


@pytest.mark.parametrize("entropy_coef, kl_coef", [(0.0, 0.0), (1e3, 0.0), (0.0, 1e3)])
def test_ppo_with_coefficients_beyond_fp16(impl, entropy_coef, kl_coef):
    """dz is stored in units of its bound, so gradients of hundreds fit fp16 as gradients of thousandths do."""
    _, _, grad, _, _, grad64 = ppo_both(impl, torch.float16, "exact", entropy_coef=entropy_coef, kl_coef=kl_coef)
    assert grad.isfinite().all() and relative(grad, grad64) <= GRAD_TOLERANCE[torch.float16]


@pytest.mark.parametrize("advantage, loss, slope", [(2.0, -2.4, 0.0), (-1.0, 1.5, 0.375)])
def test_ppo_worked_by_hand(impl, advantage, loss, slope):
    """p = (3/4, 1/4) as above, sampled at 1/2: a ratio of 1.5, clipped at 1.2 only where the advantage is positive."""
    hidden_ND = torch.full((1, 1), math.log(3), requires_grad=True)
    head, one_N = torch.tensor([[1.0], [0.0]]), torch.ones(1)
    got, stats = ppo_policy_loss(
        hidden_ND, head, torch.tensor([0]), one_N * math.log(0.5), one_N * advantage, one_N, clip=0.2, impl=impl
    )
    got.backward()
    assert [got.item(), hidden_ND.grad.item()] == pytest.approx([loss, slope], abs=1e-6)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert [value.item() for value in stats] == pytest.approx(
        [loss, 0.5 - math.log(1.5), 1.0, entropy, 1.5, 1.5, 1.5, 0.0, 1], abs=1e-6
    )


def test_ppo_at_the_sampling_policy_is_the_plain_policy_gradient(impl):
    hidden_ND, weight_VD, target_N, _ = problem(30, 24, 100, torch.float32)
    logp_N = linear_logprob(hidden_ND, weight_VD, target_N).logp_N
    advantage_N = torch.randn(30)
    (want,) = torch.autograd.grad(-(advantage_N * logp_N).sum() / 28, hidden_ND)
    loss, stats = ppo_policy_loss(
        hidden_ND, weight_VD, target_N, logp_N.detach(), advantage_N, torch.ones(30), clip=0.2, impl=impl
    )
    loss.backward()
    assert relative(hidden_ND.grad, want) < 1e-5
    assert (
        stats.tokens == 28 and stats.clipfrac == 0 and abs(stats.approxkl) < 1e-6 and abs(stats.ratio_mean - 1) < 1e-6
    )


def test_what_masked_rows_hold_reaches_nothing(impl):
    hidden_ND, weight_VD, target_N, _reference_ND = problem(12, 24, 100, torch.float32)
    old_N, advantage_N, mask_N, ref_N = rollout(12)
    mask_N[2:4] = torch.tensor([True, False])

    def run(junk: float):
        hidden = hidden_ND.detach().clone().requires_grad_()
        out_N = ~mask_N | (target_N == -100)
        args = [value.masked_fill(out_N, junk) for value in (old_N, advantage_N)]
        loss, stats = ppo_policy_loss(
            hidden,
            weight_VD,
            target_N,
            *args,
            mask_N,
            clip=0.2,
            entropy_coef=0.1,
            kl_coef=0.1,
            kl="k3",
            reference_logp_N=ref_N.masked_fill(out_N, junk),
            impl=impl,
        )
        loss.backward()
        assert not hidden.grad[out_N].any()
        return loss, *stats, hidden.grad

    for plain, junk in zip(run(0.0), run(math.nan)):
        assert torch.equal(plain, junk)


def test_absurd_ratios_stay_finite(impl):
    hidden_ND, weight_VD, target_N, _ = problem(6, 24, 50, torch.float32)
    old_N = torch.tensor([-1e4, 1e4, -1e30, 0.0, -200.0, 200.0])
    loss, stats = ppo_policy_loss(
        hidden_ND,
        weight_VD,
        target_N,
        old_N,
        torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0]),
        torch.ones(6),
        clip=0.2,
        kl="k3",
        kl_coef=1.0,
        reference_logp_N=-old_N.clamp(-1e4, 1e4),
        impl=impl,
    )
    loss.backward()
    assert loss.isfinite() and hidden_ND.grad.isfinite().all() and all(stat.isfinite() for stat in stats)


@pytest.mark.parametrize("kl", ["none", "exact"])
def test_micro_batches_add_up(impl, kl):
    hidden_ND, weight_VD, target_N, reference_ND = problem(24, 24, 100, torch.float32)
    old_N, advantage_N, mask_N, _ = rollout(24)
    total = (mask_N & (target_N != -100)).sum()

    def run(rows: slice):
        loss, stats = ppo_policy_loss(
            hidden_ND[rows],
            weight_VD,
            target_N[rows],
            old_N[rows],
            advantage_N[rows],
            mask_N[rows],
            clip=0.2,
            entropy_coef=0.1,
            kl=kl,
            kl_coef=0.1,
            reference_hidden_ND=reference_ND[rows],
            denominator=total,
            impl=impl,
        )
        (grad,) = torch.autograd.grad(loss, hidden_ND)
        return loss, stats, grad

    loss, stats, grad = run(slice(None))
    parts = [run(slice(0, 5)), run(slice(5, 5)), run(slice(5, 24))]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(sum(part[2] for part in parts), grad)
    for name in ("policy_loss", "approxkl", "clipfrac", "entropy", "ratio_mean", "kl", "tokens"):
        torch.testing.assert_close(sum(getattr(part[1], name) for part in parts), getattr(stats, name))
    assert min(part[1].ratio_min for part in parts) == stats.ratio_min
    assert max(part[1].ratio_max for part in parts) == stats.ratio_max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sft_matches_float64(impl, dtype):
    hidden_ND, weight_VD, target_N, _ = problem(21, 24, 210, dtype, spread=0.5)
    weight_N = torch.rand(21)
    loss, stats = sft_loss(hidden_ND, weight_VD, target_N, weight_N, denominator=7.0, impl=impl, chunk_rows=8, **HEAD)
    hidden64_ND = double(hidden_ND)
    want = reference.sft_loss(hidden64_ND, double(weight_VD), target_N, double(weight_N), 7.0, **HEAD)
    loss.backward()
    want.backward()
    entropy_N = reference.linear_logprob(hidden64_ND, double(weight_VD), target_N, **HEAD)[2]
    assert worst(loss, want) <= 2e-6 and worst(stats.nll, want) <= 2e-6 and stats.tokens == 19
    assert worst(stats.entropy, (weight_N * entropy_N).sum() / 7) <= 5e-6
    assert relative(hidden_ND.grad, hidden64_ND.grad) <= GRAD_TOLERANCE[dtype]


def test_sft_default_is_the_mean_over_real_tokens():
    hidden_ND, weight_VD, target_N, _ = problem(9, 24, 50, torch.float32)
    want = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, target_N)
    loss, _ = sft_loss(hidden_ND, weight_VD, target_N)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*torch.autograd.grad(3 * loss, hidden_ND), 3 * torch.autograd.grad(want, hidden_ND)[0])


def test_no_real_token_gives_zero_and_no_gradient(impl):
    hidden_ND, weight_VD, _, _ = problem(3, 24, 50, torch.float32)
    ignored_N, zero_N = torch.full((3,), -100), torch.zeros(3)
    for loss, _ in (
        sft_loss(hidden_ND, weight_VD, ignored_N, impl=impl),
        ppo_policy_loss(
            hidden_ND, weight_VD, ignored_N, zero_N, zero_N + 1, zero_N + 1, clip=0.2, entropy_coef=0.1, impl=impl
        ),
    ):
        (grad,) = torch.autograd.grad(loss, hidden_ND)
        assert loss == 0 and not grad.any()


@pytest.mark.parametrize("kl", ["none", "k3", "exact"])
def test_gradcheck(kl):
    hidden_ND, weight_VD, target_N, reference_ND = problem(5, 4, 7, torch.float64)
    old_N, advantage_N, _, ref_N = (value.double() for value in rollout(5))

    def ppo(hidden_ND):
        return ppo_policy_loss(
            hidden_ND,
            weight_VD,
            target_N,
            0.5 * old_N,
            advantage_N,
            torch.ones(5),
            clip=0.2,
            entropy_coef=0.3,
            kl_coef=0.7,
            kl=kl,
            reference_logp_N=0.5 * ref_N,
            reference_hidden_ND=reference_ND,
            softcap=2.0,
            chunk_rows=2,
        )[0]

    assert torch.autograd.gradcheck(ppo, (hidden_ND,))
    weight_N = torch.rand(5)
    assert torch.autograd.gradcheck(
        lambda hidden_ND: sft_loss(hidden_ND, weight_VD, target_N, weight_N)[0], (hidden_ND,)
    )


BAD = {
    "old_logp_N is float32 of shape (4,)": {"old_logp_N": torch.zeros(4)},
    "advantage_N is int64 of shape": {"advantage_N": torch.zeros(5, dtype=torch.int64)},
    "mask_N is float32 of shape (5, 1)": {"mask_N": torch.zeros(5, 1)},
    'expected "none", "k3" or "exact"': {"kl": "k1"},
    "reference_logp_N is None; expected the reference's log-probs": {"kl": "k3"},
    "reference_hidden_ND is None; expected the reference's hidden states": {"kl": "exact"},
    "clip is 0": {"clip": 0},
    "requires grad": {"weight_VD": torch.zeros(6, 4, requires_grad=True)},
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_input_is_named(message):
    good = {
        "hidden_ND": torch.zeros(5, 4),
        "weight_VD": torch.zeros(6, 4),
        "target_N": torch.zeros(5, dtype=torch.int64),
        "clip": 0.2,
        "old_logp_N": torch.zeros(5),
        "advantage_N": torch.zeros(5),
        "mask_N": torch.ones(5),
    }
    with pytest.raises(ValueError) as error:
        ppo_policy_loss(**{**good, **BAD[message]})
    assert message in str(error.value)


def test_sft_weight_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"weight_N is float32 of shape \(2,\)"):
        sft_loss(torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(5, dtype=torch.int64), torch.zeros(2))
