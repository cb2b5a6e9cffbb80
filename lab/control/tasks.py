"""Classic-control tasks of gymnasium with a few discrete actions, many copies of one in lockstep, and the true return.

`terminated` (the task is over) is not truncated (the clock ran out): a learner bootstraps beyond the second alone.

Shapes: R runs, N episodes of a run, S state entries.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('the control study needs gymnasium: pip install "rlaif-lite[control]"') from error


class Task(NamedTuple):
    name: str
    "gymnasium's id"
    actions: tuple[float, ...] | int
    "how many actions; of a continuous task, the values that stand for its one"
    scale: float
    "the task's reward is divided by this before the reference learns from it"
    gamma: float
    "the reference's discount"

    @property
    def choices(self) -> int:
        return self.actions if isinstance(self.actions, int) else len(self.actions)


PENDULUM = Task("Pendulum-v1", (-2.0, -1.0, 0.0, 1.0, 2.0), scale=10.0, gamma=0.97)


class Copies:
    """Copies of a task. One that ends starts again: `step` returns where it ended, `state_RS` is where it starts."""

    def __init__(self, task: Task, copies: int, rng: np.random.Generator):
        self.task = task
        self.envs = [gymnasium.make(task.name, disable_env_checker=True) for _ in range(copies)]
        self.state_RS = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in self.envs])

    def step(self, action_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the actions led (R,S), the task's reward (R), terminated (R), and over for either reason (R)."""
        next_RS = np.empty_like(self.state_RS)
        reward_R = np.zeros(len(self.envs))
        terminated_R, done_R = np.zeros((2, len(self.envs)), dtype=bool)
        for run, (env, choice) in enumerate(zip(self.envs, action_R.tolist(), strict=True)):
            values = self.task.actions
            action = choice if isinstance(values, int) else np.array([values[choice]], dtype=np.float32)
            next_RS[run], reward_R[run], terminated_R[run], truncated, _ = env.step(action)
            done_R[run] = terminated_R[run] or truncated
        self.state_RS = next_RS.copy()
        for run in np.flatnonzero(done_R):
            self.state_RS[run] = self.envs[run].reset()[0]
        return next_RS, reward_R, terminated_R, done_R


def returns(task: Task, policy: Callable, runs: int, episodes: int, rng: np.random.Generator) -> np.ndarray:
    """(R,) the task's own undiscounted return, mean of `episodes`; `policy` maps states (R,N,S) to actions (R,N)."""
    copies = Copies(task, runs * episodes, rng)
    total, live = np.zeros(runs * episodes), np.ones(runs * episodes, dtype=bool)
    while live.any():
        action_RN = policy(copies.state_RS.reshape(runs, episodes, -1))
        _, reward, _, done = copies.step(action_RN.reshape(-1))
        total += reward * live
        live &= ~done
    return total.reshape(runs, episodes).mean(1)
