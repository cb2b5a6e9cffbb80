"""What is left of GRPO's kin: equal groups sampled again (DAPO) and a running deviation per task (EMA-GRPO)."""

import math
from dataclasses import replace

import pytest
from torch import tensor

from core import record
from rlaif_lite.errors import RecipeError
from rlaif_lite.rl.advantages import TaskDeviation, group_relative
from rlaif_lite.rollout import Trajectory
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.feedback import Feedback, Taken
from rlaif_lite.stages.ppo.resample import resampled
from test_ppo import Step, ragged


def test_a_tasks_running_deviation_by_hand():
    """Moments 2 and 5 at first (deviation 1); then .9 * 2 + .1 * 0 = 1.8 and .9 * 5 + .1 * 4 = 4.9."""
    kept = TaskDeviation(0.9)
    tasks = ["mc", "iou", "mc", "iou"]
    assert kept.of(0, tasks, tensor([1.0, 0.5, 3.0, 0.5])).tolist() == pytest.approx([1.0, 1e-3, 1.0, 1e-3])
    want = [math.sqrt(4.9 - 1.8**2)] * 2
    for _ in range(2):  # a step that is repeated counts once
        assert kept.of(1, ["mc", "mc"], tensor([-2.0, 2.0])).tolist() == pytest.approx(want)
    again = TaskDeviation(0.9)
    again.load_state_dict(kept.state_dict())
    for each in (kept, again):
        second = 0.9 * 4.9 + 0.1 * 1.0
        assert each.of(2, ["mc"], tensor([1.0])).item() == pytest.approx(math.sqrt(second - (0.9 * 1.8 + 0.1) ** 2))


def test_advantages_by_a_tasks_deviation_and_the_guard():
    """The first group is divided by its task's 0.5. In the second 1 / 0.1 is beyond 5: its own deviation is taken."""
    score_B, deviation_B = tensor([1.0, 0.0, 2.0, 0.0]), tensor([0.5, 0.5, 0.1, 0.1])
    found = group_relative(score_B, 2, True, deviation_B)
    own = 1 / (math.sqrt(2) + 1e-4)
    assert found.tolist() == pytest.approx([1.0, -1.0, own, -own], abs=1e-5)
    assert group_relative(score_B, 2, False, deviation_B).tolist() == [0.5, -0.5, 1.0, -1.0]


def test_a_recipe_divides_by_the_tasks_deviation(finished):
    step = Step(finished, value="none", group_size=4, baseline="group", kl_coef=0.0, whiten_advantages=False)
    step.feedback, kept = Feedback(step.work), TaskDeviation(0.99)
    step.score(ragged(step))
    scores, tasks = [1.0, 0.0, 0.0, 0.0, 0.6, 0.4, 0.4, 0.4], ["mc"] * 4 + ["iou"] * 4
    taken = step.feedback.take(step.records, ragged(step), 0)._replace(scores=scores)
    free = step.work.recipe.ppo.model_copy(update={"stop_penalty": 0.0})
    e = ppo.score(
        step.work.roles, free, step.feedback, step.minibatches, taken, 0.0, lambda x_B: kept.of(0, tasks, x_B)
    )
    mc, iou = (1 / 4 - 1 / 16) ** 0.5, 0.01 * 0.75
    assert e.advantage_BT[0, 0].item() == pytest.approx(0.75 / mc, abs=1e-4)
    assert e.advantage_BT[4, 0].item() == pytest.approx(0.15 / iou**0.5, abs=1e-3)


# ---- equal groups


def taken_of(names: list[str], scores: list[float]) -> Taken:
    records = [replace(record(name, video=None), key=name) for name in names]
    answers = [Trajectory(0, [i], True, [0.0]) for i in range(len(names))]
    return Feedback(None).take(records, answers, 0)._replace(scores=scores, metrics={"rules/match": 0.5})


class Prompts:
    """A workspace as far as resampling reads it: ten prompts of PPO."""

    def __init__(self, rounds: int, recipe):
        self.recipe = recipe("ppo.feedback=rules", "ppo.rules.rewards=[{rule: match}]", f"ppo.resample={rounds}",
                             "ppo.value=none", "ppo.group_size=2")  # fmt: skip

    def records(self, split: str):
        assert split == "rl"
        return [replace(record(f"p{i}", video=None), key=f"p{i}") for i in range(10)]

    def seed(self, *parts):
        return 7


def test_equal_groups_are_replaced_until_the_rounds_are_over(recipe):
    """Of three groups two are equal. The first round finds one useful group, the second one more; the logged score is
    of the first answers."""
    given = taken_of(["p0", "p0", "p1", "p1", "p2", "p2"], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    asked = []

    def answers_to(records, turn):
        asked.append((turn, [r.id for r in records]))
        return taken_of([r.id for r in records], {1: [1.0, 1.0, 1.0, 0.0], 2: [0.0, 1.0]}[turn])

    found = resampled(Prompts(3, recipe), given, 0, answers_to)
    assert [turn for turn, _ in asked] == [1, 2] and [len(names) for _, names in asked] == [4, 2]
    first, second = asked[0][1][2], asked[1][1][0]
    assert [r.id for r in found.records] == [first, first, "p1", "p1", second, second]
    assert found.scores == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert found.metrics["objective/scores"] == 0.5 and found.metrics["rollout/resampled"] == pytest.approx(2 / 3)
    assert given.scores == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # as it was
    only = resampled(Prompts(1, recipe), given, 0, answers_to)
    assert only.metrics["rollout/resampled"] == pytest.approx(1 / 3) and only.scores[4:] == [0.0, 0.0]


@pytest.mark.parametrize(
    "keys, message",
    [
        (["ppo.resample=2"], "ppo.resample.*Set ppo.feedback to rules"),
        (["ppo.task_std=0.99"], "ppo.task_std.*takes the place of a group's deviation"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(recipe, keys, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*keys)
