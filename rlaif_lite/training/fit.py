"""The supervised loop: one role's adapter (and head), one optimiser, one schedule, resumable at any step.

A step's batch, learning rate and randomness follow from its number alone, so a killed run that goes on from its last
checkpoint ends with the same bits as one that was never killed, on a CPU; a GPU's attention sums up its gradients in
an order that varies. Forward and backward stay inside the role's scope.
A step that runs out of memory, optimiser included, is undone and done again in smaller pieces (`training/oom.py`).
No update is made with a gradient that is not finite.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import ranks
from ..errors import StageError
from ..model.roles import ActiveRole, Roles, refuse_non_finite
from ..phases import phase
from ..phases import step as step_begins
from ..progress import progress
from ..recipe import Training
from .checkpoint import digest, load, restore_optimizer, save
from .loop import MetricsLog, derive_seed, lr_at
from .oom import Backoff, put_back, remember

CHECKPOINT_EVERY = 20  # steps


def steps_of(section: Training, items: int, per_step: int) -> int:
    """`steps` of the recipe, or as many as `epochs` over `items` take at `per_step` of them a step."""
    return section.steps if section.steps is not None else max(1, round(section.epochs * items / per_step))


def fit(
    roles: Roles,
    role: str,
    section: Training,
    steps: int,
    step_loss: Callable[[ActiveRole, int, int], dict[str, float]],
    label: str,
    folder: Path,
    log: MetricsLog,
    seed: int,
    before: Callable[[int, int], None] = lambda step, micro: None,
) -> None:
    """Train `role` for `steps` updates. `step_loss(active, step, micro)` runs the forward and backward of one whole
    batch, `micro` records at a time, leaves the gradients on the parameters, and returns what is to be logged; `label`
    names the phase in the log and in the seeds. Of several ranks each does its share of the batch (`ranks.deal`):
    gradients and what is to be logged are parts that add up. `before(step, micro)` comes first, outside the role's
    scope, where the loss needs what another role reads.

    Training resumes from the checkpoint in `folder` if there is one. One is written every CHECKPOINT_EVERY steps, and
    left there when the last step is done."""
    roles.trainable(role)
    parameters = roles.parameters(role)
    optimizer = torch.optim.AdamW(
        parameters, lr=section.lr, weight_decay=section.weight_decay, betas=(0.9, 0.98), fused=True
    )
    optimizers = {role: optimizer}
    backoff = Backoff(label, section.micro_batch or section.batch_size, log.path.parent)
    start, state = restore(roles, optimizers, folder)
    if start:
        backoff.micro = state["micro_batch"]
    log.resume(label, start, state.get("metrics"))

    def attempt(micro: int) -> dict[str, float]:
        torch.manual_seed(derive_seed(seed, label, step))
        before(step, micro)
        with roles.use(role) as active:
            stats = ranks.totals(step_loss(active, step, micro))
        ranks.sum_gradients(parameters)
        return stats | {
            "grad_norm": clip_and_step(parameters, optimizer, section.max_grad_norm, f"{label}, step {step}")
        }

    with progress(steps, label, unit="step") as bar:
        bar.advance(start)
        for step in range(start, steps):
            step_begins()
            began = time.perf_counter()
            lr = lr_at(step, steps, section.lr, section.schedule, section.warmup_ratio, section.lr_end)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with phase("copy to undo"):
                kept = remember(roles, optimizers)
            stats = backoff.run(step, attempt, undo=lambda kept=kept: put_back(roles, optimizers, kept))
            log.append(label, step, {**stats, "lr": lr}, {"seconds": time.perf_counter() - began})
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                extra = {"micro_batch": backoff.micro, "metrics": log.digest_of(label)}
                keep(roles, optimizers, folder, step + 1, extra)
            bar.advance(1, loss=stats["loss"])
    roles.trainable(role, False)


def clip_and_step(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, max_norm: float, where: str
) -> float:
    """Clip the gradients to `max_norm`, take one optimiser step and drop the gradients -> their norm before the clip.

    Raises StageError, and changes no parameter, where the norm is not finite; `where` names the step."""
    with phase("optimiser"):
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if not math.isfinite(norm):
            raise StageError(
                f"{where}: the gradient's norm is {norm}, so the run diverged. This update was not made and nothing of "
                "it was saved; the last checkpoint is kept. Lower the learning rate, or look at the steps before in "
                "metrics.jsonl."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def keep(roles: Roles, optimizers: dict[str, torch.optim.Optimizer], folder: Path, step: int, state: dict) -> None:
    """Checkpoint the adapters and heads of the roles that `optimizers` train, and the optimisers themselves.

    Raises StageError, and keeps the last checkpoint, where anything is not finite."""
    tensors = {
        f"{role}/{i}": parameter.data for role in optimizers for i, parameter in enumerate(roles.parameters(role))
    }
    if ranks.count() > 1:  # one process has nothing to compare it with
        ranks.same(f"the adapter of {', '.join(optimizers)}", digest(tensors), f"after step {step - 1}")
    moments = {
        f"optimiser of {role}: {name} {index}": value
        for role, optimizer in optimizers.items()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    refuse_non_finite(tensors | moments, f"the checkpoint after step {step - 1}")
    save(folder, step, tensors, optimizers, state)


def restore(roles: Roles, optimizers: dict[str, torch.optim.Optimizer], folder: Path) -> tuple[int, dict]:
    """Put the last checkpoint back, if there is one -> (the step to go on with, the extra state that `keep` was
    given)."""
    checkpoint = load(folder)
    if checkpoint is None:
        return 0, {}
    for role, optimizer in optimizers.items():
        for i, parameter in enumerate(roles.parameters(role)):
            parameter.data.copy_(checkpoint.tensors[f"{role}/{i}"])
        restore_optimizer(optimizer, checkpoint, role)
    return checkpoint.step, checkpoint.state
