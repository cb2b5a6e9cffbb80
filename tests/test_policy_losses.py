"""The policy's losses and means, worked by hand, and each of them chosen by a recipe's keys in a step of PPO."""

import math

import pytest
import torch
from torch import tensor

from core import shake
from rlaif_lite.errors import RecipeError
from rlaif_lite.model.answers import Group, lay_out
from rlaif_lite.model.inputs import Sequence
from rlaif_lite.rl.losses import merge_stats, policy_loss, token_weights
from rlaif_lite.rl.shaping import sequence_score
from rlaif_lite.rollout import Trajectory
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.experience import Micro
from rlaif_lite.stages.ppo.feedback import Feedback
from test_ppo import RAGGED, Step, ragged

GROUPS = {"value": "none", "group_size": 4, "baseline": "group"}


def one(ratios: list[float], gains: list[float], **keys):
    """(loss, gradient, statistics) of one answer of logp -1 at every token, with the mean over its tokens."""
    logp_BT = torch.full((1, len(ratios)), -1.0, dtype=torch.float64, requires_grad=True)
    old_BT = logp_BT.detach() - tensor([ratios], dtype=torch.float64).log()
    weight_BT = token_weights(torch.ones_like(old_BT), "sequence")
    loss, stats = policy_loss(logp_BT, old_BT, tensor([gains], dtype=torch.float64), weight_BT, **keys)
    loss.backward()
    return loss.item(), logp_BT.grad[0].tolist(), merge_stats([stats])


def test_a_higher_clip_above_one_than_below():
    """DAPO: 1.25 is within 1.28, where PPO would cut it at 1.2."""
    loss, grad, stats = one([1.5, 1.25, 0.5], [1.0, 1.0, -1.0], clip=0.2, clip_high=0.28)
    assert loss == pytest.approx((-1.28 - 1.25 + 0.8) / 3)
    assert grad == pytest.approx([0.0, -1.25 / 3, 0.0])
    assert stats["clipfrac"].item() == pytest.approx(2 / 3)


def test_a_bad_token_is_charged_for_a_bounded_ratio():
    loss, grad, stats = one([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], clip=0.2, dual_clip=3.0)
    assert loss == pytest.approx((3.0 + 2.0 - 1.2) / 3)
    assert grad == pytest.approx([0.0, 2 / 3, 0.0])
    assert stats["clipfrac"].item() == pytest.approx(2 / 3)


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    """-A min(ratio, 1.5) logp at logp = -1; the gradient is -A min(ratio, 1.5), however far the ratio is."""
    loss, grad, stats = one([2.0, 0.1], [1.0, -1.0], clip=0.2, clip_high=0.5, kind="cispo")
    assert loss == pytest.approx((1.5 - 0.1) / 2)
    assert grad == pytest.approx([-1.5 / 2, 0.1 / 2])
    assert stats["clipfrac"].item() == pytest.approx(1 / 2)


@pytest.mark.parametrize("clip, loss, slope", [(0.5, -math.sqrt(2), -math.sqrt(2) / 2), (0.2, -1.2, 0.0)])
def test_gspo_has_one_ratio_per_answer(clip, loss, slope):
    """Ratios 2 and 1 have the geometric mean sqrt 2: both tokens share it, its clip and its gradient."""
    found, grad, stats = one([2.0, 1.0], [1.0, 1.0], clip=clip, kind="gspo")
    assert found == pytest.approx(loss) and grad == pytest.approx([slope, slope])
    assert stats["ratio"].item() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    "mean, want",
    [
        ("token", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("sequence", [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0], [0, 0, 0]]),
        ("constant", [[1 / 30, 1 / 30, 0], [1 / 30, 0, 0], [0, 0, 0]]),
    ],
)
def test_what_a_token_weighs(mean, want):
    mask_BT = tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    torch.testing.assert_close(token_weights(mask_BT, mean, 10), tensor(want))


def test_the_stop_penalty_rises_over_its_buffer():
    length_B, stopped_B = tensor([5, 6, 8, 10, 10]), tensor([True, True, True, True, False])
    score_B = sequence_score(torch.zeros(5), stopped_B, length_B, 10, 2.0, 0.0, stop_buffer=4)
    assert score_B.tolist() == pytest.approx([0.0, 0.0, -1.0, -2.0, -2.0])


# ---- by a recipe's keys, in a step


def expected(section, shifts: list[list[float]], gains: list[float]) -> float:
    """The loss of a minibatch, answer by answer and token by token."""
    high = section.clip_high or section.clip
    losses = []
    for shift, gain in zip(shifts, gains, strict=True):
        if section.policy_loss == "gspo":
            shift = [sum(shift) / len(shift)] * len(shift)
        row = []
        for x in shift:
            ratio = math.exp(x)
            cost = max(-gain * ratio, -gain * min(max(ratio, 1 - section.clip), 1 + high))
            row.append(min(cost, -gain * section.dual_clip) if section.dual_clip and gain < 0 else cost)
        losses.append(row)
    if section.loss_mean == "sequence":
        return sum(sum(row) / len(row) for row in losses) / len(losses)
    total = sum(map(sum, losses))
    return total / (len(losses) * section.max_new_tokens if section.loss_mean == "constant" else sum(map(len, losses)))


@pytest.mark.parametrize(
    "keys",
    [
        {"clip_high": 0.28},
        {"dual_clip": 1.5},
        {"loss_mean": "sequence"},
        {"loss_mean": "constant", "group_std": False},
        {"policy_loss": "gspo", "loss_mean": "sequence", "clip": 0.05, "clip_high": 0.08},
    ],
    ids=str,
)
def test_a_recipe_chooses_the_loss(finished, keys):
    """Cut into micro-batches, the first minibatch has the loss that loops over answers and tokens give."""
    step = Step(finished, **{**GROUPS, "minibatch": 8, "micro_batch": 3, "epochs": 1, **keys})
    _, e = step.score(ragged(step))
    shift_BT = 0.4 * torch.randn(e.logp_BT.shape, generator=torch.Generator().manual_seed(0))
    history = step.update(e._replace(logp_BT=e.logp_BT - shift_BT * e.mask_BT), roles=("policy",))
    shifts = [shift_BT[i, :length].tolist() for i, length in enumerate(RAGGED)]
    want = expected(step.section, shifts, e.advantage_BT[:, 0].tolist())
    assert history[0]["policy_loss"].item() == pytest.approx(want, abs=1e-5)
    assert history[0]["clipfrac"] > 0


def test_cispo_by_a_recipe(finished):
    step = Step(finished, **GROUPS, policy_loss="cispo", minibatch=8, epochs=1)
    _, e = step.score(ragged(step))
    history = step.update(e, roles=("policy",))
    want = (-e.advantage_BT * e.logp_BT)[e.mask_BT].mean().item()  # every ratio is 1
    assert history[0]["policy_loss"].item() == pytest.approx(want, abs=1e-5)


def scored(step: Step, scores: list[float]):
    """The step's experience where each answer has the given score."""
    step.feedback = Feedback(step.work)
    answers = ragged(step)
    taken = step.feedback.take(step.records, answers, 0)._replace(scores=scores)
    return step.score(taken)[1]


def test_answers_cut_at_the_limit_are_left_out(finished):
    step = Step(finished, **GROUPS, mask_unstopped=True)
    experience = scored(step, [1.0, 0.0] * 4)
    assert experience.learn_BT.any(1).tolist() == [length < 8 for length in RAGGED]


def test_groups_of_equal_scores_are_left_out(finished):
    """One of two groups is equal: the mean is over the other. All are equal: the policy does not move, Adam's momentum
    included."""
    step = Step(finished, **GROUPS, skip_equal_groups=True, minibatch=8, epochs=1)
    experience = scored(step, [1.0] * 4 + [0.0, 1.0, 0.0, 1.0])
    assert experience.learn_BT.any(1).tolist() == [False] * 4 + [True] * 4
    step.work.roles.trainable("policy")
    parameters = step.work.roles.parameters("policy")
    adam = {"policy": torch.optim.AdamW(parameters, lr=1e-3)}

    def update(experience) -> tuple[dict, float]:
        before = [p.detach().clone() for p in parameters]
        (stats,) = ppo.update(step.work.roles, step.work.recipe, step.minibatches, experience, adam, 0, 0.1)
        return stats, max((p - old).abs().max().item() for p, old in zip(parameters, before, strict=True))

    stats, moved = update(experience)
    want = -(experience.advantage_BT * experience.learn_BT).sum() / experience.learn_BT.sum()
    assert stats["policy_loss"].item() == pytest.approx(want.item(), abs=1e-5) and moved > 0
    stats, moved = update(scored(step, [1.0] * 4 + [0.5] * 4))
    assert moved == 0 and stats["policy_loss"] == 0 and stats["ratio_min"] == stats["ratio_max"] == 1


def test_score_and_update_need_no_run_folder(roles, recipe):
    """Roles on a base, a recipe and rows of tokens are enough."""
    small = recipe("ppo.value=none", "ppo.baseline=group", "ppo.group_size=4", "ppo.rollouts=4", "ppo.minibatch=4")
    base = roles.base
    roles.add("reference")
    shake(roles, "reference")
    roles.add("policy", copy_of="reference")
    roles.trainable("policy")
    prompt = Sequence([10] * 6, torch.arange(6)[None], None, torch.tensor([6]))
    answers = [Trajectory(0, [11 + i, 12, base.eos_id], True, []) for i in range(4)]
    rows = lay_out(base, [Group(prompt, [a.ids for a in answers])])
    minibatches = [[Micro(torch.arange(4), rows, rows)]]
    feedback = Feedback(None)
    taken = feedback.take([None] * 4, answers, 0)._replace(scores=[1.0, 0.0, 0.0, 0.0])
    experience = ppo.score(roles, small.ppo, feedback, minibatches, taken, 0.1)
    assert experience.kl_BT.abs().max() == 0 and (experience.advantage_BT[0] > 0).all()
    optimizers = {"policy": torch.optim.SGD(roles.parameters("policy"), lr=1.0)}
    history = ppo.update(roles, small, minibatches, experience, optimizers, 0, 0.1)
    assert history[0]["ratio_min"] == history[0]["ratio_max"] == 1 != history[-1]["ratio_max"]


@pytest.mark.parametrize(
    "keys, message",
    [
        (["ppo.policy_loss=gspo"], "ppo.policy_loss.*gspo.*Set ppo.loss_mean to sequence"),
        (["ppo.policy_loss=cispo", "ppo.dual_clip=3"], "ppo.dual_clip.*cispo"),
        (["ppo.dual_clip=1.1"], "ppo.dual_clip.*within the range of the clip"),
        (["ppo.skip_equal_groups=true"], "ppo.skip_equal_groups.*Set ppo.value to none"),
        (["ppo.stop_buffer=1000"], "ppo.stop_buffer.*below ppo.max_new_tokens"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(recipe, keys, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*keys)
