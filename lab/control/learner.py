"""The off-policy learner: double DQN with a small ensemble of layer-normed critics, for all runs of an arm at once.

The critics of all runs (seeds, interveners) are one batch of small matrices, so that fifteen runs cost less than twice
what two do; no run reads another's data or weights. Departure from RLIF's release, which has SAC with ten critics: the
actions here are few and discrete, and two critics with the smaller of their targets do. The imitators are the same
network, fitted to labels.

Shapes: R runs, E critics of a run, B samples, S state entries, A actions, H hidden units.
"""

import copy
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batch(NamedTuple):
    state_RBS: Tensor
    action_RB: Tensor
    reward_RB: Tensor
    next_RBS: Tensor
    alive_RB: Tensor
    "0 where the task was over at the next state; 1 elsewhere, also where only the clock ran out"


class Replay:
    """What R runs stored, each its own number of transitions."""

    def __init__(self, runs: int, capacity: int, states: int):
        entry_RC = torch.zeros(runs, capacity)
        state_RCS = torch.zeros(runs, capacity, states)
        self.stored = Batch(state_RCS, entry_RC.long(), entry_RC.clone(), state_RCS.clone(), entry_RC.clone())
        self.size_R = torch.zeros(runs, dtype=torch.long)

    def add(self, stored_R: np.ndarray, state_RS, action_R, reward_R, next_RS, alive_R) -> None:
        """One transition of each run where `stored_R`; arrays of numpy."""
        run_N = torch.from_numpy(np.flatnonzero(stored_R))
        place_N = self.size_R[run_N]
        for store, new in zip(self.stored, (state_RS, action_R, reward_R, next_RS, alive_R), strict=True):
            store[run_N, place_N] = torch.from_numpy(new)[run_N].to(store.dtype)
        self.size_R[run_N] += 1

    def sample(self, count: int, generator: torch.Generator) -> Batch:
        """`count` transitions of each run, with replacement."""
        place_RB = (torch.rand(len(self.size_R), count, generator=generator) * self.size_R[:, None]).long()
        run_R1 = torch.arange(len(self.size_R))[:, None]
        return Batch(*(store[run_R1, place_RB] for store in self.stored))


class Critics(nn.Module):
    """(R,B,S) -> (R,E,B,A): two hidden layers, each layer-normed as in RLPD."""

    def __init__(self, runs: int, states: int, actions: int, hidden: int, ensemble: int, generator: torch.Generator):
        super().__init__()
        sizes = (states, hidden, hidden, actions)
        self.weight = nn.ParameterList(
            (torch.rand(runs, ensemble, i, o, generator=generator) * 2 - 1) / i**0.5
            for i, o in itertools.pairwise(sizes)
        )
        self.bias = nn.ParameterList(torch.zeros(runs, ensemble, 1, o) for o in sizes[1:])

    def forward(self, state_RBS: Tensor) -> Tensor:
        hidden_REBH = state_RBS[:, None]
        for layer in range(2):
            hidden_REBH = hidden_REBH @ self.weight[layer] + self.bias[layer]
            hidden_REBH = F.relu(F.layer_norm(hidden_REBH, hidden_REBH.shape[-1:]))
        return hidden_REBH @ self.weight[2] + self.bias[2]

    @torch.no_grad()
    def values(self, state_RBS: np.ndarray) -> np.ndarray:
        """(R,B,A), the mean of a run's critics."""
        return self(torch.from_numpy(state_RBS)).mean(1).numpy()

    def greedy(self, state_RBS: np.ndarray) -> np.ndarray:
        """(R,B) the action of the highest value."""
        return self.values(state_RBS).argmax(-1)


def assemble(parts: list[tuple[Critics, int]]) -> Critics:
    """Critics whose run k is run `parts[k][1]` of `parts[k][0]`; copies."""
    made = copy.deepcopy(parts[0][0])
    sources = zip(*(critics.parameters() for critics, _ in parts), strict=True)
    for parameter, source in zip(made.parameters(), sources, strict=True):
        parameter.data = torch.stack([old.detach()[run] for old, (_, run) in zip(source, parts, strict=True)])
    return made


class Learner:
    """Critics, their moving average `policy` (what targets are made of, and what is evaluated), and the two updates."""

    def __init__(self, critics: Critics, lr: float, tau: float):
        self.critics = critics
        self.policy = copy.deepcopy(critics).requires_grad_(False)
        self.optimizer = torch.optim.Adam(critics.parameters(), lr=lr, fused=True)
        self.tau = tau

    def td(self, batch: Batch, gamma: float) -> None:
        """One step of double DQN; Huber loss; the target is the smallest of the ensemble."""
        with torch.no_grad():
            best_RB1 = self.critics(batch.next_RBS).mean(1).argmax(-1, keepdim=True)
            next_RB = self.policy(batch.next_RBS).amin(1).gather(-1, best_RB1).squeeze(-1)
            goal_RB = batch.reward_RB + gamma * batch.alive_RB * next_RB
        q_REBA = self.critics(batch.state_RBS)
        action_REB1 = batch.action_RB[:, None, :, None].expand(*q_REBA.shape[:3], 1)
        q_REB = q_REBA.gather(-1, action_REB1).squeeze(-1)
        # A sum over runs: each run's gradient, and so its Adam step, is what it would be alone.
        self._descend(F.smooth_l1_loss(q_REB, goal_RB[:, None].expand_as(q_REB), reduction="sum") / goal_RB.shape[1])

    def imitate(self, batch: Batch) -> None:
        """One step of maximum likelihood of the batch's actions, the values being logits."""
        logit_RBA = self.critics(batch.state_RBS).mean(1)
        loss = F.cross_entropy(logit_RBA.flatten(0, 1), batch.action_RB.flatten(), reduction="sum")
        self._descend(loss / batch.action_RB.shape[1])

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, new in zip(self.policy.parameters(), self.critics.parameters(), strict=True):
                average.lerp_(new, self.tau)
