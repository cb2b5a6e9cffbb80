"""Advantages without a model: whitening over real tokens, and answers compared within their group (GAE, which without
values gives the rewards to come, is `rlaif_kernels.gae`).

Departure from the release: whitening there counts pads, about 86 % of all positions, so its statistics are the pads'.

Shapes: B answers, T answer positions; `mask_BT` is True at real tokens; G groups of K answers to one prompt, which
stand next to each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales `x_BT` to unit variance over real tokens (Bessel-corrected, eps 1e-8 under the root); pads become 0.

    With `shift_mean` the mean becomes 0; without it the mean stays what it was (for rewards, whose mean is meant).

    Raises ValueError below two real tokens: there is no variance to speak of.
    """
    mask_BT = mask_BT.bool()
    x_N = x_BT[mask_BT]
    if x_N.numel() < 2:
        raise ValueError(f"whitening needs at least two real tokens, found {x_N.numel()}; use larger rollouts")
    mean = x_N.mean()
    white_BT = (x_BT - mean) * torch.rsqrt(x_N.var() + 1e-8)
    if not shift_mean:
        white_BT = white_BT + mean
    return torch.where(mask_BT, white_BT, torch.zeros_like(white_BT))


def rloo(score_B: Tensor, group_size: int) -> Tensor:
    """Each answer's score minus the mean score of its prompt's other answers (Ahmadian et al., arXiv 2402.14740).

    Raises ValueError when groups cannot be formed.
    """
    score_GK = in_groups(score_B, group_size)
    others_GK = (score_GK.sum(dim=1, keepdim=True) - score_GK) / (group_size - 1)
    return (score_GK - others_GK).view(-1)


def group_relative(score_B: Tensor, group_size: int, scale: bool, deviation_B: Tensor | None = None) -> Tensor:
    """Each answer's score minus the mean of its group, over the group's standard deviation (GRPO, arXiv 2402.03300).

    Without `scale` it is not divided (Dr. GRPO, arXiv 2503.20783: the division lifts prompts whose answers hardly
    differ). The deviation is Bessel-corrected and has 1e-4 added, as in TRL: a group of equal scores teaches nothing.
    `deviation_B`, of each answer's task, takes the group's place (`TaskDeviation`), but for a group that it would give
    an advantage beyond 5.
    Raises ValueError when groups cannot be formed.
    """
    score_GK = in_groups(score_B, group_size)
    gain_GK = score_GK - score_GK.mean(dim=1, keepdim=True)
    if not scale:
        return gain_GK.view(-1)
    own_GK = gain_GK / (score_GK.std(dim=1, keepdim=True) + 1e-4)
    if deviation_B is None:
        return own_GK.view(-1)
    by_task_GK = gain_GK / (in_groups(deviation_B, group_size) + 1e-6)
    return torch.where(by_task_GK.abs().amax(1, keepdim=True) > 5.0, own_GK, by_task_GK).view(-1)


class TaskDeviation:
    """The running standard deviation of scores, for each task apart (EMA-GRPO of OneThinker): rewards of one task may
    lie close together and those of another far apart, and a group's own deviation lifts the former.

    Two moments per task move by 1 - `decay` towards those of a step's scores, before that step uses them. They start
    at the first step's (the release starts at 0). The deviation is at least 1e-3.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._step = -1
        self._before: dict[str, tuple[float, float]] = {}  # moments without the step in hand
        self._now: dict[str, tuple[float, float]] = {}

    def of(self, step: int, tasks: Sequence[str], score_B: Tensor) -> Tensor:
        """deviation_B of each answer's task, the step's scores counted in. A step that is repeated counts once."""
        if step != self._step:
            self._step, self._before = step, dict(self._now)
        for task in dict.fromkeys(tasks):
            score_N = score_B[[i for i, each in enumerate(tasks) if each == task]].double()
            new = (score_N.mean().item(), score_N.square().mean().item())
            old = self._before.get(task, new)
            self._now[task] = tuple(self.decay * o + (1 - self.decay) * n for o, n in zip(old, new, strict=True))
        deviation = {task: max(second - first**2, 1e-6) ** 0.5 for task, (first, second) in self._now.items()}
        return torch.tensor([deviation[task] for task in tasks], dtype=score_B.dtype, device=score_B.device)

    def state_dict(self) -> dict:
        return {"step": self._step, "before": self._before, "now": self._now}

    def load_state_dict(self, state: dict) -> None:
        self._step = state["step"]
        self._before, self._now = ({t: tuple(m) for t, m in state[key].items()} for key in ("before", "now"))


def needs_order(ordered_B: Tensor, shuffled_J: Tensor, group_size: int) -> Tensor:
    """bool_B, the answers that earn T-GRPO's bonus (Video-R1, arXiv 2503.21776, section 3.2, as released): those with
    an accuracy above 0.1 in groups whose mean accuracy is at least 0.8 times that of the answers to the same prompt
    with the frames shuffled. `shuffled_J`: accuracies of the latter, as many of each prompt.
    Raises ValueError when groups cannot be formed."""
    ordered_GK = in_groups(ordered_B, group_size)
    shuffled_G = shuffled_J.view(len(ordered_GK), -1).mean(1)
    return ((ordered_GK.mean(1) >= 0.8 * shuffled_G)[:, None] & (ordered_GK > 0.1)).view(-1)


def rank_penalty(judged_B: Tensor, logp_B: Tensor, group_size: int) -> Tensor:
    """delta_B = 1 - DCG(place by `logp_B`) / DCG(place by `judged_B`), places within the group (Oracle-RLAIF, arXiv
    2510.02561): 0 where the policy ranks an answer as the judge does, up to 1 where it ranks it too low, far below 0
    where it ranks it too high.

    Only the order of the numbers counts, the highest first. Raises ValueError when groups cannot be formed.
    """
    judged_GK, logp_GK = in_groups(judged_B, group_size), in_groups(logp_B, group_size)
    return (1 - place_gain(logp_GK) / place_gain(judged_GK)).view(-1)


def place_gain(x_GK: Tensor) -> Tensor:
    """DCG(r) = 1 / ((1 + r) log2(2 + r)) of each number's place r in its row, the highest at 0. Numbers that are equal
    to four decimals share their places' mean: the same answer twice is read in other batches, and rounds otherwise."""
    x_GK = x_GK.round(decimals=4)
    place_K = torch.arange(x_GK.shape[1], device=x_GK.device, dtype=x_GK.dtype)
    gain_K = 1 / ((1 + place_K) * torch.log2(2 + place_K))
    before_K1 = torch.cat([gain_K.new_zeros(1), gain_K.cumsum(0)])  # gain of all places before each
    ahead_GK = (x_GK[:, None, :] > x_GK[:, :, None]).sum(2)
    alike_GK = (x_GK[:, None, :] == x_GK[:, :, None]).sum(2)
    return (before_K1[ahead_GK + alike_GK] - before_K1[ahead_GK]) / alike_GK


def in_groups(x_B: Tensor, group_size: int) -> Tensor:
    """x_GK, a row per prompt. Raises ValueError when groups cannot be formed."""
    if group_size < 2 or x_B.numel() % group_size:
        raise ValueError(
            f"{x_B.numel()} answers in groups of {group_size}: comparing them needs whole groups of two or more; "
            "set ppo.group_size >= 2 and ppo.rollouts to a multiple of it"
        )
    return x_B.view(-1, group_size)
