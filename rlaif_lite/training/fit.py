"""The supervised loop: one role's adapter (and head), one optimiser, one schedule, resumable at any step.

A step's batch, learning rate and randomness follow from its number alone, so a killed run that goes on from its last
checkpoint ends with the same bits as one that was never killed. Forward and backward stay inside the role's scope.
A step that runs out of memory is done again in smaller pieces (`training/oom.py`).
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..model.roles import ActiveRole, Roles
from ..phases import phase
from ..phases import step as step_begins
from ..progress import progress
from ..recipe import Training
from .checkpoint import load, restore_optimizer, save
from .loop import MetricsLog, derive_seed, lr_at
from .oom import Backoff


def steps_of(section: Training, items: int, per_step: int) -> int:
    """`steps` of the recipe, or as many as `epochs` over `items` take at `per_step` of them a step."""
    return section.steps if section.steps is not None else max(1, round(section.epochs * items / per_step))


def fit(
    roles: Roles,
    role: str,
    section: Training,
    steps: int,
    step_loss: Callable[[ActiveRole, int, int], dict[str, float]],
    *,
    label: str,
    folder: Path,
    log: MetricsLog,
    seed: int,
    checkpoint_every: int,
) -> None:
    """Train `role` for `steps` updates. `step_loss(active, step, micro)` runs the forward and backward of one whole
    batch, `micro` records at a time, leaves the gradients on the parameters, and returns what is to be logged; `label`
    names the phase in the log and in the seeds.

    The checkpoint in `folder` is gone on with if there is one, and is left there when the last step is done."""
    roles.trainable(role)
    parameters = roles.parameters(role, head=role in roles.heads)
    optimizer = torch.optim.AdamW(
        parameters, lr=section.lr, weight_decay=section.weight_decay, betas=(0.9, 0.98), fused=True
    )
    backoff = Backoff(label, section.micro_batch or section.batch_size, log.path.parent)
    start, state = restore(roles, {role: optimizer}, folder)
    if start:
        backoff.micro = state["micro_batch"]

    def attempt(micro: int) -> dict[str, float]:
        torch.manual_seed(derive_seed(seed, label, step))
        with roles.use(role) as active:
            return step_loss(active, step, micro)

    log.resume(label, start)
    with progress(steps, label, unit="step") as bar:
        bar.advance(start)
        for step in range(start, steps):
            step_begins()
            began = time.perf_counter()
            lr = lr_at(step, steps, section.lr, section.schedule, section.warmup_ratio, section.lr_end)
            for group in optimizer.param_groups:
                group["lr"] = lr
            stats = backoff.run(step, attempt, undo=lambda: optimizer.zero_grad(set_to_none=True))
            with phase("optimiser"):
                norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            log.append(
                label, step, {**stats, "lr": lr, "grad_norm": norm.item()}, {"seconds": time.perf_counter() - began}
            )
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                keep(roles, {role: optimizer}, folder, step + 1, {"micro_batch": backoff.micro})
            bar.advance(1, loss=stats["loss"])
    roles.trainable(role, False)


def keep(roles: Roles, optimizers: dict[str, torch.optim.Optimizer], folder: Path, step: int, state: dict) -> None:
    """Checkpoint the adapters and heads of the roles that `optimizers` train, and the optimisers themselves."""
    tensors = {}
    for role in optimizers:
        for i, parameter in enumerate(roles.parameters(role, head=role in roles.heads)):
            tensors[f"{role}/{i}"] = parameter.data
    save(folder, step, tensors, optimizers, state)


def restore(roles: Roles, optimizers: dict[str, torch.optim.Optimizer], folder: Path) -> tuple[int, dict]:
    """Put the last checkpoint back, if there is one -> (the step to go on with, the extra state that `keep` was
    given)."""
    checkpoint = load(folder)
    if checkpoint is None:
        return 0, {}
    for role, optimizer in optimizers.items():
        for i, parameter in enumerate(roles.parameters(role, head=role in roles.heads)):
            parameter.data.copy_(checkpoint.tensors[f"{role}/{i}"])
        restore_optimizer(optimizer, checkpoint, role)
    return checkpoint.step, checkpoint.state
