"""When the intervener takes over, what reward that gives, and which steps are stored. RLIF, arXiv 2311.12996.

The learner acts and is watched. Where the judge disapproves of a step of the learner's, the intervener takes over with
probability `beta`, elsewhere with probability `spurious`. The step BEFORE the takeover gets the reward -1, every other
step 0. A takeover lasts a few steps, of which only the last is stored; then the learner acts, for one step at least.

The judge disapproves where Q(s, a_learner) < alpha * Q(s, a_judge), a_judge being its own best action. Departure: the
paper's product needs positive values. Of a negative Q, alpha * Q lies ABOVE Q, and the judge would disapprove of its
own best action. Here both sides are measured from `floor`, the lowest value that the judge gives in states of its
training: the same rule where that is 0, right for values of either sign, and deaf to a constant added to all of them.

Shapes: R runs in lockstep, A actions.
"""

from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    alpha: float = 0.97
    "how near to the judge's own action a step must be; the paper has 0.97 to 0.99"
    beta: float = 0.95
    "chance of a takeover after a step that the judge disapproves of"
    spurious: float = 0.05
    "chance of a takeover after any other step"
    steps: int = 4
    "how long a takeover lasts"


def disapproved(q_RA: np.ndarray, action_R: np.ndarray, floor_R: np.ndarray, alpha: float) -> np.ndarray:
    """(R,) whether the judge, whose values are `q_RA`, disapproves of `action_R`. Never of its own best action."""
    best_R = q_RA.max(-1)
    allowed_R = (1 - alpha) * np.maximum(best_R - floor_R, 0.0)
    return q_RA[np.arange(len(action_R)), action_R] < best_R - allowed_R


class Takeovers:
    """Whose step it is in each of R runs."""

    def __init__(self, runs: int, rule: Rule, rng: np.random.Generator):
        self.rule, self.rng = rule, rng
        self.left_R = np.zeros(runs, dtype=int)

    @property
    def taken_R(self) -> np.ndarray:
        """(R,) whether the intervener acts in the coming step."""
        return self.left_R > 0

    def after(self, disapproved_R: np.ndarray, done_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R,) whether the step just done is answered by a takeover (reward -1; else 0), and (R,) whether it is stored.

        A takeover that the end of the episode leaves no step for still counts: to fall over must not be a way out. One
        that the end cuts short stores the step at which it was cut.
        """
        rule, taken_R = self.rule, self.taken_R
        chance_R = np.where(disapproved_R, rule.beta, rule.spurious)
        started_R = ~taken_R & (self.rng.random(len(taken_R)) < chance_R)
        self.left_R = np.where(started_R, rule.steps, self.left_R - taken_R)
        self.left_R[done_R] = 0
        return started_R, ~taken_R | (self.left_R == 0)
