"""DPO's arithmetic against numbers worked by hand."""

import math

import pytest
import torch

from rlaif_lite.rl.dpo import Pair, Scored, balance_lengths, dpo_loss, draw_pairs, implicit_reward, pairs_by_score


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


POLICY = Scored(column(-4.0, -10.0), column(-9.0, -6.0))
REFERENCE = Scored(column(-6.0, -9.0), column(-8.0, -6.5))
LENGTHS = Scored(column(4, 5), column(5, 2))
# log-ratios: chosen 2, -1; rejected -1, 0.5; h = 3, -1.5. By length: 0.5, -0.2; -0.2, 0.25; h = 0.7, -0.45.


def test_sigmoid_loss_and_what_is_said_of_it():
    loss, stats = dpo_loss(POLICY, REFERENCE, LENGTHS, beta=0.5)
    by_hand = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(0.75))) / 2
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)
    assert stats.accuracy == 0.5
    assert stats.margin.item() == pytest.approx(0.375) and stats.chosen.item() == pytest.approx(0.25)
    assert stats.nll.item() == pytest.approx((4 / 4 + 10 / 5) / 2)


def test_at_the_reference_the_loss_is_log_2_and_nothing_is_right_yet():
    loss, stats = dpo_loss(REFERENCE, REFERENCE, LENGTHS, beta=0.1)
    assert loss.item() == pytest.approx(math.log(2)) and stats.accuracy == 0


def test_length_normalised_divides_each_answer_by_its_own_length():
    loss, _ = dpo_loss(POLICY, REFERENCE, LENGTHS, beta=2.0, normalised=True)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.4)) + math.log1p(math.exp(0.9))) / 2, abs=1e-12)


def test_ipo_aims_at_a_gap_of_half_the_inverse_beta():
    loss, _ = dpo_loss(POLICY, REFERENCE, LENGTHS, beta=0.25, kind="ipo")
    assert loss.item() == pytest.approx(((3 - 2) ** 2 + (-1.5 - 2) ** 2) / 2)
    loss, _ = dpo_loss(POLICY, REFERENCE, LENGTHS, beta=0.25, kind="ipo", normalised=True)
    assert loss.item() == pytest.approx(((0.7 - 2) ** 2 + (-0.45 - 2) ** 2) / 2)
    with pytest.raises(ValueError, match="hinge"):
        dpo_loss(POLICY, REFERENCE, LENGTHS, beta=0.25, kind="hinge")


def test_the_sft_weight_adds_the_chosen_answers_loss_per_token():
    without, _ = dpo_loss(POLICY, REFERENCE, LENGTHS, beta=0.5)
    loss, _ = dpo_loss(POLICY, REFERENCE, LENGTHS, beta=0.5, sft_weight=0.3)
    assert (loss - without).item() == pytest.approx(0.3 * 1.5)


def test_gradients_push_the_two_answers_apart_and_reach_no_reference():
    policy = Scored(*(x.clone().requires_grad_() for x in POLICY))
    reference = Scored(*(x.clone().requires_grad_() for x in REFERENCE))
    dpo_loss(policy, reference, LENGTHS, beta=0.5)[0].backward()
    # d softplus(-beta h) / d logp_chosen = -beta sigmoid(-beta h), over 2 pairs
    expected = [-0.25 / (1 + math.exp(1.5)), -0.25 / (1 + math.exp(-0.75))]
    assert policy.chosen_B.grad.tolist() == pytest.approx(expected)
    assert policy.rejected_B.grad.tolist() == pytest.approx([-value for value in expected])
    assert reference.chosen_B.grad is None and reference.rejected_B.grad is None


def test_the_reward_of_best_of_n_does_not_favour_the_short_answer():
    """Two answers with the same log-ratio per token: the sum prefers the short one of a negative ratio."""
    logp_B, ref_B, length_B = column(-3.0, -12.0), column(-2.0, -8.0), column(2, 8)
    assert implicit_reward(logp_B, ref_B, length_B, 0.1, True).tolist() == pytest.approx([-0.05, -0.05])
    assert implicit_reward(logp_B, ref_B, length_B, 0.1, False).tolist() == pytest.approx([-0.1, -0.4])


def test_pairs_are_all_answers_that_differ_by_a_claim():
    assert pairs_by_score([-2, 0, -2, -1], 0) == [
        Pair(1, 0, 2),
        Pair(1, 2, 2),
        Pair(1, 3, 1),
        Pair(3, 0, 1),
        Pair(3, 2, 1),
    ]
    assert pairs_by_score([-2, 0, -2, -1], 1) == [Pair(1, 0, 2), Pair(1, 2, 2)]
    assert pairs_by_score([-1, -1], 0) == []


def test_two_pairs_a_prompt_are_drawn_by_seed_without_repeating():
    pairs = pairs_by_score([0, -1, -2, -3], 0)
    drawn = {tuple(draw_pairs(pairs, 2, seed)) for seed in range(200)}
    assert len(drawn) == 15  # every two of six, in their order
    assert all(len(found) == 2 and pairs.index(found[0]) < pairs.index(found[1]) for found in drawn)
    assert draw_pairs(pairs, 2, 7) == draw_pairs(pairs, 2, 7)
    assert draw_pairs(pairs[:1], 2, 0) == pairs[:1] and draw_pairs([], 2, 0) == []


def test_length_balancing_takes_the_ratio_that_levels_the_means():
    # excess of the rejected answer: 5/10, 1/10, -4/8, 0. At ratio 0: chosen 12 + 6, rejected 8 + 6 -> 4/14.
    # From .1: + (9, 10): 27, 24 -> 3/24. From .5 all: 32, 34 -> 2/34.
    lengths = [(5, 10), (9, 10), (12, 8), (6, 6)]
    assert balance_lengths(lengths) == (0.5, [True] * 4)
    # without the long chosen one: at 0 only (6, 6), level; any more makes it worse
    assert balance_lengths([(5, 10), (9, 10), (6, 6)]) == (0.0, [False, False, True])


def test_length_balancing_at_its_edges():
    assert balance_lengths([]) == (0.98, [])
    assert balance_lengths([(1, 100)]) == (0.98, [False])  # no ratio leaves anything
    assert balance_lengths([(3, 0), (1, 2)]) == (0.5, [True, True])  # an empty rejected answer divides by nothing
    assert balance_lengths([(1, 50)]) == (0.98, [True])  # exactly .98
