"""RLIF in its original setting: the rule by hand, what is stored, the ends of episodes, and the claim in small."""

import numpy as np
import pytest
import torch

from lab.control import study
from lab.control.learner import Batch, Critics, Learner, Replay, assemble
from lab.control.rule import Rule, Takeovers, disapproved
from lab.control.study import ARMS, Cast, Settings, learn, make_cast
from lab.control.tasks import PENDULUM, Copies, Task, returns

CERTAIN = Rule(beta=1.0, spurious=0.0, steps=3)


def judged(q_A: list[float], floor: float) -> list[bool]:
    """Of each action, whether the judge disapproves; alpha is 0.97."""
    count = len(q_A)
    q_RA = np.tile(np.array(q_A), (count, 1))
    return disapproved(q_RA, np.arange(count), np.full(count, floor), 0.97).tolist()


def test_the_rule_is_the_papers_where_values_are_positive():
    """0.97 x 10 = 9.7."""
    assert judged([10.0, 9.75, 9.65], floor=0.0) == [False, False, True]


def test_the_rule_holds_for_negative_values_and_whatever_is_added_to_the_reward():
    """From a floor of -11 the best, -1, stands 10 high; 0.97 x 10 = 9.7, which is a value of -1.3.

    The plain product, 0.97 x -1 = -0.97, would disapprove of the judge's own action.
    """
    assert judged([-1.0, -1.25, -1.35], floor=-11.0) == [False, False, True]
    assert judged([99.0, 98.75, 98.65], floor=89.0) == [False, False, True]
    assert judged([-12.0, -12.5], floor=-11.0) == [False, True], "below the floor: its own best action and no other"


def follow(disapproved_T: list[int], done_T: list[int] | None = None) -> str:
    """Under CERTAIN: l the learner steps, i the intervener, capital if stored, "-" after reward -1."""
    takeovers, line = Takeovers(1, CERTAIN, np.random.default_rng(0)), ""
    for bad, done in zip(disapproved_T, done_T or [0] * len(disapproved_T), strict=True):
        who = "i" if takeovers.taken_R[0] else "l"
        started_R, stored_R = takeovers.after(np.array([bool(bad)]), np.array([bool(done)]))
        line += (who.upper() if stored_R[0] else who) + ("-" if started_R[0] else "")
    return line


def test_the_reward_stands_before_the_takeover_and_of_that_only_the_last_step_is_stored():
    assert follow([0, 1, 0, 0, 0, 0, 0]) == "LL-iiILL"


def test_what_the_intervener_does_is_not_judged_and_the_learner_always_gets_a_step():
    assert follow([1, 1, 1, 1, 1, 1, 1, 1]) == "L-iiIL-iiI"


def test_the_end_of_an_episode_ends_a_takeover():
    assert follow([1, 0, 0, 0, 0], [0, 0, 1, 0, 0]) == "L-iILL", "cut short: the step at which it was cut is stored"
    assert follow([1, 0, 0], [1, 0, 0]) == "L-LL", "disapproval of the last step counts, though nothing follows"


def test_takeovers_come_with_the_two_chances():
    rng = np.random.default_rng(0)
    for bad, chance in ((True, 0.95), (False, 0.05)):
        started_R, _ = Takeovers(20000, Rule(), rng).after(np.full(20000, bad), np.zeros(20000, bool))
        assert started_R.mean() == pytest.approx(chance, abs=0.006)


def test_the_clock_is_not_the_end_of_the_task():
    """A pendulum runs out of time after 200 steps; a cart with a pole that is always pushed left falls within a few."""
    rng = np.random.default_rng(0)
    pendulum = Copies(PENDULUM, 1, rng)
    for _ in range(199):
        assert not pendulum.step(np.array([2]))[3].any()
    last_RS, _, terminated_R, done_R = pendulum.step(np.array([2]))
    assert (bool(terminated_R[0]), bool(done_R[0])) == (False, True)
    assert not np.allclose(last_RS, pendulum.state_RS), "the state it ended in is not the one it starts in again"

    cart = Copies(Task("CartPole-v1", 2, scale=1.0, gamma=0.99), 1, rng)
    ends = [cart.step(np.array([0]))[2:] for _ in range(20)]
    assert any(terminated_R[0] for terminated_R, _ in ends)


def two_runs(actions: int) -> tuple[Critics, Batch]:
    """One state that leads to itself at -1 a step; in run 0 the task is over there, in run 1 it goes on."""
    generator = torch.Generator().manual_seed(0)
    state_RBS = torch.ones(2, 8, 1)
    batch = Batch(
        state_RBS,
        torch.zeros(2, 8, dtype=torch.long),
        torch.full((2, 8), -1.0),
        state_RBS,
        torch.tensor([[0.0] * 8, [1.0] * 8]),
    )
    return Critics(2, 1, actions, 8, 2, generator), batch


def test_returns_are_bootstrapped_beyond_the_clock_and_not_beyond_the_end():
    """-1, and -1 / (1 - 0.5) = -2."""
    critics, batch = two_runs(actions=1)
    learner = Learner(critics, lr=0.02, tau=0.3)
    for _ in range(150):
        learner.td(batch, gamma=0.5)
    value_R = learner.critics.values(np.ones((2, 1, 1), np.float32))[:, 0, 0]
    assert value_R == pytest.approx([-1.0, -2.0], abs=0.02)


@pytest.mark.parametrize("update", ["td", "imitate"])
def test_a_run_in_a_stack_learns_what_it_would_alone(update):
    critics, batch = two_runs(actions=2)
    alone = Learner(assemble([(critics, 1)]), lr=0.02, tau=0.2)
    stack = Learner(critics, lr=0.02, tau=0.2)
    rest = (0.5,) if update == "td" else ()
    for _ in range(5):
        getattr(alone, update)(Batch(*(entry[1:] for entry in batch)), *rest)
        getattr(stack, update)(batch, *rest)
    for one, two in zip(alone.policy.parameters(), stack.policy.parameters(), strict=True):
        torch.testing.assert_close(one[0], two[1])


def test_replay_keeps_runs_of_different_lengths_apart():
    replay = Replay(2, 5, 1)
    for step, stored in enumerate([[1, 1], [1, 0], [1, 0]]):
        row = np.array([step, 10 + step], np.float32)
        replay.add(np.array(stored, bool), row[:, None], np.array([0, 1]), row, row[:, None], np.ones(2))
    batch = replay.sample(64, torch.Generator().manual_seed(0))
    assert [set(row.tolist()) for row in batch.reward_RB] == [{0.0, 1.0, 2.0}, {10.0}]


def test_what_a_student_of_rlif_stores(monkeypatch):
    """Rewards of 0 and -1 and nothing of the task's; -1, then three steps unstored, then the intervener's fourth."""
    kept = []

    class Watched(Replay):
        def add(self, *row) -> None:
            kept.append([np.copy(entry) for entry in row])
            super().add(*row)

    monkeypatch.setattr(study, "Replay", Watched)
    generator = torch.Generator().manual_seed(0)
    critics = Critics(2, 3, PENDULUM.choices, 8, 2, generator)
    cast = Cast(critics, np.full(2, -1.0), critics, np.full(2, -1.0), np.zeros(2))
    settings = Settings(steps=210, every=210, episodes=1, hidden=8)
    outcome = learn(PENDULUM, ARMS["rlif"], cast, settings, seed=0)
    stored_TR, reward_TR = (np.stack([row[entry] for row in kept]) for entry in (0, 3))
    assert set(reward_TR.ravel().tolist()) == {0.0, -1.0}
    assert (reward_TR == -1).sum(0).tolist() == outcome.takeovers_R.tolist()
    for step, run in np.argwhere(reward_TR[:195] == -1).tolist():
        assert stored_TR[step : step + 5, run].tolist() == [True, False, False, False, True]
        state_RS, action_R = kept[step + 4][1:3]
        assert action_R[run] == critics.greedy(state_RS[:, None])[run, 0]
    assert np.all(np.stack([row[5] for row in kept]) == 1), "a pendulum's task is not over when its 200 steps are"


@pytest.mark.slow
def test_rlif_ends_better_than_its_intervener_and_than_its_imitator():
    """The claim in small: four seeds, one poor intervener each. The whole study: python -m lab.control."""
    settings = Settings(
        seeds=4, qualities=(0.3,), reference_steps=3000, checkpoint=150, steps=2500, every=2500, episodes=10
    )
    cast = make_cast(PENDULUM, settings, seed=0)
    intervener = returns(PENDULUM, cast.intervener.greedy, 4, 10, np.random.default_rng(1)).mean()
    outcome = {name: learn(PENDULUM, ARMS[name], cast, settings, seed=2) for name in ("rlif", "hg_dagger")}
    score = {name: found.return_R.mean() for name, found in outcome.items()}
    assert score["rlif"] > intervener + 150
    assert score["rlif"] > score["hg_dagger"] + 150
