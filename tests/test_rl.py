"""RL arithmetic against numbers worked by hand."""

import math

import pytest
import torch
from torch import tensor

from rlaif_lite.rl.advantages import group_relative, place_gain, rank_penalty, rloo, whiten
from rlaif_lite.rl.losses import (
    explained_variance,
    merge_stats,
    pairwise_loss,
    policy_loss,
    repetition,
    sft_loss,
    token_weights,
    value_loss,
)
from rlaif_lite.rl.shaping import adapted, kl_penalty, sequence_score, shaped_reward, symbolic_bonus

NAN, INF = float("nan"), float("inf")


def test_kl_is_signed_and_unclamped():
    logp_BT = tensor([[-1.0, -2.0]])
    ref_BT = tensor([[-1.5, -1.0]])
    assert kl_penalty(logp_BT, ref_BT, "k1").tolist() == [[0.5, -1.0]]
    k3 = [[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]]
    torch.testing.assert_close(kl_penalty(logp_BT, ref_BT, "k3"), tensor(k3))
    with pytest.raises(ValueError, match="k2"):
        kl_penalty(logp_BT, ref_BT, "k2")


def test_kl_of_equal_models_is_exactly_zero():
    logp_BT = torch.randn(3, 5)
    for kind in ("k1", "k3"):
        assert torch.equal(kl_penalty(logp_BT, logp_BT.clone(), kind), torch.zeros(3, 5))


def test_k1_and_k3_both_estimate_the_exact_kl():
    p, q = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_penalty(p[None], q[None], kind)[0]).sum(), exact)


def test_score_stands_on_the_last_real_token_with_padding_on_either_side():
    mask_BT = tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    kl_BT = tensor([[1.0, 2.0, NAN, INF], [NAN, 9.0, 3.0, -4.0], [0.0, 5.0, 5.0, 5.0]])
    reward_BT = shaped_reward(tensor([10.0, 20.0, 30.0]), kl_BT, mask_BT, kl_coef=0.5)
    assert reward_BT.tolist() == [[-0.5, 9.0, 0.0, 0.0], [0.0, 0.0, -1.5, 22.0], [30.0, 0.0, 0.0, 0.0]]


def test_an_answer_without_tokens_is_refused_by_row():
    with pytest.raises(ValueError, match=r"\[1\]"):
        shaped_reward(torch.zeros(2), torch.zeros(2, 2), tensor([[1, 0], [0, 0]]), 0.1)


def test_penalties_are_added_to_the_score_never_substituted():
    stopped_B, length_B = tensor([True, False]), tensor([100, 400])
    score_B = sequence_score(tensor([2.0, 2.0]), stopped_B, length_B, 896, stop_penalty=8.0, length_penalty=10.0)
    torch.testing.assert_close(score_B, tensor([2.0 - 1000 / 896, 2.0 - 8.0 - 4000 / 896]))


def test_the_bonus_of_a_known_answer_by_its_type():
    """LLaVA-RLHF's types: 2 to 5 are the options A to D, 6 is a question whose answer is No; 1 and 7 earn nothing."""
    for kind, letter in zip((2, 3, 4, 5), "ABCD", strict=True):
        assert symbolic_bonus(f"{letter}. a dog", kind) == symbolic_bonus(f"The correct option is {letter}.", kind) == 1
        assert symbolic_bonus("E. a dog", kind) == symbolic_bonus(f"It is {letter}.", kind) == 0
    assert [symbolic_bonus(text, 6) for text in ("No, none.", "Yes.", "There is no dog.")] == [0.5, -0.5, 0]
    assert {symbolic_bonus(text, kind) for text in ("Yes", "No", "A.") for kind in (None, 1, 7)} == {0}


def test_the_kl_coefficient_follows_ziegler():
    step = {"answers": 100, "target": 6.0, "horizon": 1000}
    assert adapted(0.1, kl=6.6, **step) == pytest.approx(0.1 * 1.01)  # error .1, times 100 / 1000
    assert adapted(0.1, kl=60.0, **step) == pytest.approx(0.1 * 1.02)  # error clipped to .2
    assert adapted(0.1, kl=0.0, **step) == pytest.approx(0.1 * 0.98)  # and to -.2


def test_a_kl_coefficient_without_a_target_stays():
    assert adapted(0.3, kl=1e9, answers=10, target=None, horizon=1000) == 0.3


def test_whitening_sees_real_tokens_only():
    x_BT = tensor([[1.0, 3.0, NAN], [5.0, INF, 1e9]], dtype=torch.float64)
    mask_BT = tensor([[1, 1, 0], [1, 0, 0]])
    # real tokens 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4
    expected = tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(x_BT, mask_BT), expected)
    kept = tensor([[2.0, 3.0, 0.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(x_BT, mask_BT, shift_mean=False), kept)
    with pytest.raises(ValueError, match="found 1"):
        whiten(x_BT, tensor([[1, 0, 0], [0, 0, 0]]))


def test_rloo_leaves_the_answer_itself_out():
    assert rloo(tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    for group in (1, 4):
        with pytest.raises(ValueError, match="group_size"):
            rloo(torch.zeros(6), group)


def test_group_relative_by_hand():
    score_B = tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    assert group_relative(score_B, 3, scale=False).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    std = math.sqrt((4 + 1 + 9) / 2)  # of 1, 2, 6 around 3
    assert group_relative(score_B, 3, scale=True).tolist() == pytest.approx(
        [x / (std + 1e-4) for x in (-2.0, -1.0, 3.0)] + [0.0] * 3
    )
    with pytest.raises(ValueError, match="6 answers in groups of 4"):
        group_relative(score_B, 4, scale=True)


DCG = [1.0, 1 / (2 * math.log2(3)), 1 / (3 * 2), 1 / (4 * math.log2(5))]  # of places 0, 1, 2, 3


def test_the_gain_of_a_place_and_of_shared_places():
    x_GK = tensor([[0.3, 9.0, -2.0, 1.0], [5.0, 5.00001, 7.0, 5.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    shared = sum(DCG[1:]) / 3
    want = [[DCG[2], DCG[0], DCG[3], DCG[1]], [shared, shared, DCG[0], shared], [sum(DCG) / 4] * 4]
    torch.testing.assert_close(place_gain(x_GK), tensor(want, dtype=torch.float64))


def test_rank_penalty_by_hand():
    """Two groups: the policy's order is the judge's but for two answers; then the same order, told by other numbers."""
    judged_B = tensor([3.0, 2.0, 1.0, 10.0, 30.0, 20.0], dtype=torch.float64)
    logp_B = tensor([-5.0, -1.0, -9.0, -7.0, -2.0, -3.0], dtype=torch.float64)
    too_low, too_high = 1 - DCG[1] / DCG[0], 1 - DCG[0] / DCG[1]
    delta_B = rank_penalty(judged_B, logp_B, 3)
    torch.testing.assert_close(delta_B, tensor([too_low, too_high, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert 0 < too_low < 1 and too_high < -2


def test_pairwise_loss_and_centring_by_hand():
    chosen_B = tensor([2.0, 0.0, 1.0], requires_grad=True)
    rejected_B = tensor([0.0, 1.0, 1.0], requires_grad=True)
    loss, stats = pairwise_loss(chosen_B, rejected_B, centering=0.0)
    bce = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)) + math.log(2)) / 3
    assert loss.item() == pytest.approx(bce, abs=1e-6)
    centred, _ = pairwise_loss(chosen_B, rejected_B, centering=0.3)
    assert centred.item() == pytest.approx(bce + 0.3 * 5 / 3, abs=1e-6)
    assert stats.accuracy.item() == pytest.approx(1 / 3)  # the tie counts as wrong
    assert stats.margin.item() == pytest.approx(1 / 3) and stats.score.item() == pytest.approx(5 / 6)
    loss.backward()
    assert chosen_B.grad[0] < 0 < rejected_B.grad[0]  # chosen is pushed up, rejected down


def test_centring_is_the_size_of_the_mean_not_the_mean_of_sizes():
    loss, _ = pairwise_loss(tensor([3.0, -3.0]), tensor([3.0, -3.0]), centering=1.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_policy_clipping_by_hand():
    ratio_BT = tensor([[1.5, 1.5, 0.5, 0.5, 1.1]], dtype=torch.float64)
    advantage_BT = tensor([[1.0, -1.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    logp_BT = ratio_BT.log().requires_grad_()
    weight_BT = token_weights(torch.ones(1, 5, dtype=torch.float64))
    loss, stats = policy_loss(logp_BT, torch.zeros_like(logp_BT), advantage_BT, weight_BT, clip=0.2)
    # clipped where it would promise too much: 1.2 for the first, 0.8 for the fourth
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8 - 2.2) / 5)
    means = merge_stats([stats])
    assert means["clipfrac"].item() == pytest.approx(2 / 5)
    assert means["ratio"].item() == pytest.approx(5.1 / 5)
    assert (means["ratio_min"].item(), means["ratio_max"].item()) == pytest.approx((0.5, 1.5))
    logs = [math.log(r) for r in ratio_BT[0].tolist()]
    assert means["approxkl"].item() == pytest.approx(sum(0.5 * x * x for x in logs) / 5)
    loss.backward()  # -A * ratio / 5 where the free term is active, 0 where it is clipped
    torch.testing.assert_close(logp_BT.grad, tensor([[0.0, 0.3, -0.1, 0.0, -0.44]], dtype=torch.float64))


def test_first_policy_update_has_ratio_exactly_one():
    logp_BT = torch.randn(2, 3)
    mask_BT = tensor([[1, 1, 0], [1, 1, 1]])
    _, stats = policy_loss(logp_BT, logp_BT.clone(), torch.randn(2, 3), token_weights(mask_BT), 0.2)
    means = merge_stats([stats])
    assert means["ratio_min"] == means["ratio_max"] == 1.0 and means["approxkl"] == means["clipfrac"] == 0.0
    assert means["ratio"] == 1.0


def test_micro_batches_of_the_policy_loss_add_up():
    """Loss, gradient and statistics, one micro-batch without a token that counts among them."""
    logp_BT, old_BT, advantage_BT = torch.randn(3, 6, 5, dtype=torch.float64)
    mask_BT = torch.rand(6, 5) > 0.3
    mask_BT[2] = False
    weight_BT = token_weights(mask_BT)

    def run(parts):
        leaf_BT, losses, stats = logp_BT.clone().requires_grad_(), 0.0, []
        for rows in parts:
            loss, found = policy_loss(leaf_BT[rows], old_BT[rows], advantage_BT[rows], weight_BT[rows], 0.2)
            losses, stats = losses + loss, [*stats, found]
        losses.backward()
        return losses.item(), merge_stats(stats), leaf_BT.grad

    whole, cut = run([slice(0, 6)]), run([slice(0, 2), slice(2, 3), slice(3, 6)])
    assert whole[0] == pytest.approx(cut[0])
    torch.testing.assert_close(whole[2], cut[2])
    for name, value in whole[1].items():
        assert float(cut[1][name]) == pytest.approx(float(value)), name


def test_absurd_ratios_stay_finite():
    logp_BT = torch.zeros(1, 4, requires_grad=True)
    old_BT, advantage_BT = tensor([[-1e4, 1e4, -200.0, 200.0]]), tensor([[1.0, -1.0, -1.0, 1.0]])
    loss, stats = policy_loss(logp_BT, old_BT, advantage_BT, token_weights(torch.ones(1, 4)), 0.2)
    loss.backward()
    assert loss.isfinite() and logp_BT.grad.isfinite().all() and all(value.isfinite() for value in stats)


def test_a_minibatch_without_a_token_that_counts_has_no_loss():
    logp_BT = torch.randn(2, 3, requires_grad=True)
    loss, _ = policy_loss(logp_BT, logp_BT, torch.randn(2, 3), token_weights(torch.zeros(2, 3)), 0.2)
    loss.backward()
    assert loss == 0 and not logp_BT.grad.any()


def test_sft_loss_is_the_weighted_cross_entropy():
    assert sft_loss(tensor([-1.0, -2.0]), tensor([1.0, 0.5]), 4.0).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nothing_at_pads_reaches_a_loss_or_a_gradient(poison):
    mask_BT = tensor([[1, 1, 0], [0, 1, 1]])

    def losses(fill: float) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        gen = torch.Generator().manual_seed(0)
        new, old, weight = (torch.randn(2, 3, generator=gen).masked_fill(mask_BT == 0, fill) for _ in range(3))
        logp_BT, value_BT = new.clone().requires_grad_(), new.clone().requires_grad_()
        policy, policy_stats = policy_loss(logp_BT, old, weight, token_weights(mask_BT), 0.2)
        value, value_stats = value_loss(value_BT, old, weight, mask_BT, 0.2, 4)
        (policy + value).backward()
        numbers = [x.item() for x in (policy, value, *policy_stats, *value_stats)]
        return numbers + [explained_variance(new, weight, mask_BT)], logp_BT.grad, value_BT.grad

    clean, poisoned = losses(0.0), losses(poison)
    assert clean[0] == poisoned[0] and all(map(math.isfinite, clean[0]))
    for clean_grad, grad in zip(clean[1:], poisoned[1:], strict=True):
        assert torch.equal(clean_grad, grad)
        assert torch.equal(grad[mask_BT == 0], torch.zeros(2)) and grad[mask_BT == 1].any()


def test_value_loss_takes_the_worse_of_free_and_clipped():
    value_BT = tensor([[1.0, 0.1, 1.0]], requires_grad=True)
    old_BT = torch.zeros(1, 3)
    return_BT = tensor([[2.0, 2.0, 0.0]])
    loss, stats = value_loss(value_BT, old_BT, return_BT, torch.ones(1, 3), clip=0.2, denominator=3)
    # token 1: held at .2, (.2 - 2)^2 = 3.24 > 1; token 2: within the clip, 1.9^2; token 3: free 1 > .04
    assert loss.item() == pytest.approx(0.5 * (3.24 + 3.61 + 1.0) / 3)
    assert stats.clipfrac.item() == pytest.approx(1 / 3)
    loss.backward()
    torch.testing.assert_close(value_BT.grad, tensor([[0.0, -1.9 / 3, 1.0 / 3]]))
    free, _ = value_loss(value_BT, old_BT, return_BT, torch.ones(1, 3), clip=None, denominator=3)
    assert free.item() == pytest.approx(0.5 * (1.0 + 3.61 + 1.0) / 3)


def test_micro_batches_of_the_value_loss_add_up():
    gen = torch.Generator().manual_seed(1)
    a_BT, b_BT, c_BT = torch.randn(3, 4, 6, generator=gen, dtype=torch.float64)
    mask_BT = torch.rand(4, 6, generator=gen) > 0.4
    tokens = mask_BT.sum().item()

    def run(rows: slice) -> torch.Tensor:
        value, stats = value_loss(a_BT[rows], b_BT[rows], c_BT[rows], mask_BT[rows], 0.2, tokens)
        return torch.stack([value, *stats])

    torch.testing.assert_close(run(slice(0, 1)) + run(slice(1, 4)), run(slice(0, 4)))


def test_explained_variance():
    return_BT = tensor([[1.0, 2.0, 3.0, 100.0]])
    mask_BT = tensor([[1, 1, 1, 0]])
    assert explained_variance(return_BT + 7.0, return_BT, mask_BT) == pytest.approx(1.0)  # an offset is no variance
    assert explained_variance(torch.zeros(1, 4), return_BT, mask_BT) == 0.0
    assert explained_variance(-return_BT, return_BT, mask_BT) == pytest.approx(-3.0)
    assert explained_variance(return_BT, torch.ones(1, 4), mask_BT) == 0.0


def test_repetition_counts_repeated_ngrams():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(1 - 2 / 5)
    assert repetition([7] * 11, n=4) == pytest.approx(1 - 1 / 8)
    assert repetition([1, 2, 3], n=4) == 0.0
