"""The experiment: references on the task's reward, their early checkpoints as interveners, students that never see it.

A reference is trained on the true reward. Its last checkpoint is the judge: its Q says when to intervene. Earlier ones,
worse at the task, are the interveners that take over. Every arm does the same number of environment steps and updates.

Departures. (1) The judge looks at the step that was DONE, and -1 stands on that step, which is the one before the
takeover. The release judges the action that the learner is ABOUT to do, which is then never done, and puts -1 on the
step before it, which may have been a good one: the arm `rlif_proposal`. (2) No prior data. (3) The release never stores
the last step of an episode; here it is stored, and nothing is bootstrapped from it if the task was over.

Shapes: R runs, S state entries, A actions. A run is a pair of intervener quality and seed, quality by quality.
"""

from typing import NamedTuple

import numpy as np
import torch

from rlaif_lite.progress import say

from .learner import Critics, Learner, Replay, assemble
from .rule import Rule, Takeovers, disapproved
from .tasks import Copies, Task, returns


class Arm(NamedTuple):
    meaning: str
    learns: str = "reward"
    "reward: RLIF's, off-policy. takeovers: the intervener's actions while it acts. all: its action in every state"
    judge: str = "good"
    "whose Q disapproves: the good reference's, or the intervener's own"
    judged: str = "step"
    "the step done, the proposal for the next state, or a coin (a tenth of all steps)"
    drives: str = "student"
    "who acts outside takeovers: the student or the intervener"


ARMS = {
    "rlif": Arm("RLIF"),
    "hg_dagger": Arm("imitates the intervener where it takes over (HG-DAgger)", learns="takeovers"),
    "dagger": Arm("imitates the intervener, asked in every state that the student visits (DAgger)", learns="all"),
    "bc": Arm("imitates the intervener on its own episodes (behaviour cloning)", learns="all", drives="intervener"),
    "rlif_own": Arm("RLIF, disapproval by the intervener's own Q", judge="own"),
    "rlif_proposal": Arm("RLIF, the proposed next action is judged, as in the release", judged="proposal"),
    "rlif_coin": Arm("RLIF, takeovers at random times: no information", judged="coin"),
}


class Settings(NamedTuple):
    seeds: int = 5
    qualities: tuple[float, ...] = (0.4, 0.8, 1.0)
    "interveners: how far their return lies from a random policy's (0) to the reference's (1); the nearest checkpoint"
    reference_steps: int = 10000
    checkpoint: int = 250
    steps: int = 6000
    "environment steps of a student; an update after each"
    every: int = 1000
    "steps between evaluations"
    episodes: int = 30
    "of the last evaluation; ten of the others"
    hidden: int = 64
    ensemble: int = 2
    batch: int = 64
    lr: float = 1e-3
    tau: float = 0.01
    explore: float = 0.05
    gamma: float = 0.9
    "RLIF's discount; the paper has 0.99 and a hundred times the steps"
    rule: Rule = Rule()


class Cast(NamedTuple):
    """Who takes part in R runs."""

    good: Critics
    good_floor_R: np.ndarray
    intervener: Critics
    intervener_floor_R: np.ndarray
    checkpoint_R: np.ndarray
    "the step at which the intervener was saved"


class Outcome(NamedTuple):
    """Of one arm."""

    return_R: np.ndarray
    "the task's own, of the greedy student"
    curve: list[dict]
    "at every evaluation return_R, and of the steps since the last one: rate_R, takeovers for each step of the student;"
    " disapproved_R, the share of the student's steps that the judge disapproves of; taken_R, a share of all steps"
    takeovers_R: np.ndarray
    labels_R: np.ndarray
    "steps at which the student was told the intervener's action"


def make_cast(task: Task, settings: Settings, seed: int) -> Cast:
    """Train one reference for each seed on the task's reward, and choose the interveners among its checkpoints."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    runs = settings.seeds
    copies = Copies(task, runs, rng)
    learner = _learner(task, settings, runs, copies.state_RS.shape[1], generator)
    replay = Replay(runs, settings.reference_steps, copies.state_RS.shape[1])
    saved, score_CR = [], []
    for step in range(1, settings.reference_steps + 1):
        state_RS = copies.state_RS
        explore = max(settings.explore, 1 - step / (0.2 * settings.reference_steps))
        action_R = _explore(learner.critics.greedy(state_RS[:, None])[:, 0], task, explore, rng)
        next_RS, reward_R, terminated_R, _ = copies.step(action_R)
        replay.add(np.ones(runs, dtype=bool), state_RS, action_R, reward_R / task.scale, next_RS, ~terminated_R)
        if step >= settings.batch:
            learner.td(replay.sample(settings.batch, generator), task.gamma)
        if step % settings.checkpoint == 0:
            saved.append(assemble([(learner.policy, run) for run in range(runs)]))
            score_CR.append(returns(task, learner.policy.greedy, runs, 10, rng))
    say(f"references, return: {np.round(score_CR[-1]).tolist()}")

    chance_R = returns(task, lambda state: rng.integers(task.choices, size=state.shape[:2]), runs, 10, rng)
    target_QR = chance_R + np.array(settings.qualities)[:, None] * (score_CR[-1] - chance_R)
    chosen_QR = np.abs(np.array(score_CR)[:, None] - target_QR).argmin(0)
    intervener = assemble([(saved[c], run) for row in chosen_QR.tolist() for run, c in enumerate(row)])
    good = assemble([(saved[-1], run) for _ in settings.qualities for run in range(runs)])
    visited_RBS = replay.sample(2048, generator).state_RBS.repeat(len(settings.qualities), 1, 1).numpy()
    floors = [critics.values(visited_RBS).min((1, 2)) for critics in (good, intervener)]
    return Cast(good, floors[0], intervener, floors[1], (chosen_QR.reshape(-1) + 1) * settings.checkpoint)


def learn(task: Task, arm: Arm, cast: Cast, settings: Settings, seed: int) -> Outcome:
    """One arm's students, one for each run of the cast. The task's reward goes nowhere but into the evaluations."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    runs = len(cast.checkpoint_R)
    copies = Copies(task, runs, rng)
    learner = _learner(task, settings, runs, copies.state_RS.shape[1], generator)
    replay = Replay(runs, settings.steps, copies.state_RS.shape[1])
    takeovers = Takeovers(runs, settings.rule, rng)
    judge, floor_R = cast.good, cast.good_floor_R
    if arm.judge == "own":
        judge, floor_R = cast.intervener, cast.intervener_floor_R

    def propose() -> np.ndarray:
        if arm.drives == "intervener":
            return cast.intervener.greedy(copies.state_RS[:, None])[:, 0]
        action_R = learner.critics.greedy(copies.state_RS[:, None])[:, 0]
        return _explore(action_R, task, settings.explore, rng) if arm.learns == "reward" else action_R

    curve, count_3R, takeovers_R, labels_R = [], np.zeros((3, runs)), np.zeros(runs, int), np.zeros(runs, int)
    proposal_R = propose()
    for step in range(1, settings.steps + 1):
        state_RS, taken_R = copies.state_RS, takeovers.taken_R
        shown_R = cast.intervener.greedy(state_RS[:, None])[:, 0]
        action_R = np.where(taken_R, shown_R, proposal_R)
        next_RS, _, terminated_R, done_R = copies.step(action_R)
        proposal_R = propose()
        watched_RS, choice_R = (next_RS, proposal_R) if arm.judged == "proposal" else (state_RS, action_R)
        bad_R = disapproved(judge.values(watched_RS[:, None])[:, 0], choice_R, floor_R, settings.rule.alpha)
        if arm.judged == "proposal":
            bad_R &= ~done_R
        if arm.judged == "coin":
            bad_R = rng.random(runs) < 0.1
        started_R, stored_R = takeovers.after(bad_R, done_R)

        if arm.learns == "reward":
            replay.add(stored_R, state_RS, action_R, -started_R.astype(np.float32), next_RS, ~terminated_R)
        else:
            stored_R = taken_R if arm.learns == "takeovers" else np.ones(runs, dtype=bool)
            replay.add(stored_R, state_RS, shown_R, np.zeros(runs, np.float32), next_RS, ~terminated_R)
            labels_R += stored_R
        if replay.size_R.min() >= settings.batch:
            batch = replay.sample(settings.batch, generator)
            learner.td(batch, settings.gamma) if arm.learns == "reward" else learner.imitate(batch)

        takeovers_R += started_R
        count_3R += started_R, bad_R & ~taken_R, taken_R
        if step % settings.every == 0:
            episodes = settings.episodes if step == settings.steps else 10
            score_R = returns(task, learner.policy.greedy, runs, episodes, rng)
            own_R = settings.every - count_3R[2]
            shares = {"rate_R": count_3R[0] / own_R, "disapproved_R": count_3R[1] / own_R}
            curve.append({"step": step, "return_R": score_R, **shares, "taken_R": count_3R[2] / settings.every})
            count_3R[:] = 0
    return Outcome(curve[-1]["return_R"], curve, takeovers_R, labels_R)


def _explore(action_R: np.ndarray, task: Task, chance: float, rng: np.random.Generator) -> np.ndarray:
    random_R = rng.integers(task.choices, size=len(action_R))
    return np.where(rng.random(len(action_R)) < chance, random_R, action_R)


def _learner(task: Task, settings: Settings, runs: int, states: int, generator: torch.Generator) -> Learner:
    critics = Critics(runs, states, task.choices, settings.hidden, settings.ensemble, generator)
    return Learner(critics, settings.lr, settings.tau)
