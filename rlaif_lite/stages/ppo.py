"""PPO against the model's own reward model (VLM-RLAIF section 3.3): every role an adapter on the one frozen base.

One step, in the order of the code:

    1  `rollout`     the policy answers prompts
    2  `score`       policy, reference, reward and value roles read the answers, micro-batch by micro-batch
    3  `advantages`  reward - kl_coef * KL per token, the score on the last real token; GAE, or leave-one-out without
    a critic 4  `update`      clipped policy loss and value loss over a few epochs of minibatches

Micro-batches are cut once per step and are the same rows, with the same padding, in every forward of that step. So at
the first minibatch of a step the new log-probs equal the old ones bit for bit: ratio exactly 1, and at step 0, where
the policy is a copy of the reference, KL exactly 0. Both are checked before an hour is spent (`check_first_step`).
Where memory runs out, the update is undone and the step is cut anew, so that this still holds (`training/oom.py`).

Departures from the release, each one a defect mended or a memory saved: every mean is over real tokens only; the
score stands on the last real token; the stop rule is EOS alone; the KL is not clamped; no factor of 10 on the
rewards; the reward may be standardised on the reference's answers (`ppo.normalize_reward`); `ppo.value: none` trains
no critic (RLOO).

Shapes: B answers of a step, b of a micro-batch, S positions, T answer tokens (padded on the right), N real answer
tokens, D width.
"""

import json
import time

import torch
from rlaif_kernels import PpoStats, gae, ppo_policy_loss
from torch import Tensor

from ..data.records import Record
from ..data.world_text import score as truth_score
from ..errors import StageError
from ..model.inputs import IGNORE, decode_answer, encode_prompt
from ..model.roles import ActiveRole
from ..phases import phase
from ..phases import step as step_begins
from ..progress import progress
from ..rl.advantages import rloo, whiten
from ..rl.losses import explained_variance, repetition, value_loss
from ..rl.shaping import AdaptiveKL, FixedKL, kl_penalty, sequence_score, shaped_reward
from ..rollout import Sampling, Trajectory, sample
from ..training.fit import keep, restore
from ..training.loop import batches, derive_seed
from ..training.oom import Backoff, put_back, remember
from ..workspace import Workspace, chunks, read_jsonl, write_json
from .experience import Experience, Micro, cut, place, token_logp, token_value
from .reward import RewardInput, check_floor

READS = ("seed", "model", "reward.prompt", "reward.pool", "reward.pool_tokens", "reward.floor", "ppo", "data.rl")
NEEDS = ("features", "sft", "reward")
BETAS = (0.9, 0.99)


def run(work: Workspace) -> dict:
    """Train the `policy` role; writes its adapter and the value adapter, and a `metrics.jsonl` line per step."""
    recipe, section = work.recipe, work.recipe.ppo
    check_floor(recipe, read_heldout(work))
    work.load_role("reference")
    work.for_reward.load_role("reward")
    roles = work.roles
    roles.add("policy", copy_of="reference")
    if section.value == "adapter":  # it stays on the policy's base: from the reward role where that is there too
        roles.add("value", copy_of="reward" if work.for_reward is work else "reference")
        roles.add_head("value", zero=True)
    trained = {"policy": section.lr} | ({"value": section.value_lr or section.lr} if section.value == "adapter" else {})
    optimizers = {}
    for role, lr in trained.items():
        roles.trainable(role)
        parameters = roles.parameters(role, head=role in roles.heads)
        optimizers[role] = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=BETAS, fused=True)
    folder = work.stage("ppo") / "checkpoint"
    backoff = Backoff("ppo", section.micro_batch or section.minibatch, work.folder)
    start, state = restore(roles, optimizers, folder)
    controller = (
        AdaptiveKL(section.kl_coef, section.kl_target, section.kl_horizon)
        if section.kl_target
        else FixedKL(section.kl_coef)
    )
    layout = RewardInput(work.for_reward)
    if start:
        controller.load_state_dict(state["controller"])
        mean, std = state["normalizer"]
        backoff.micro = state["micro_batch"]
    else:
        mean, std = reward_scale(work, layout) if section.normalize_reward else (0.0, 1.0)
    work.log.resume("ppo", start)
    records = work.records("rl")
    prompts_of_step = batches(len(records), section.rollouts // section.group_size, section.steps, recipe.seed, "ppo")
    with progress(section.steps, "ppo", unit="step") as bar:
        bar.advance(start)
        for step in range(start, section.steps):
            step_begins()
            began = time.perf_counter()
            torch.manual_seed(derive_seed(recipe.seed, "ppo", step))
            for role, lr in trained.items():
                for group in optimizers[role].param_groups:
                    group["lr"] = lr * lr_share(section, step)
            chosen = [records[i] for i in prompts_of_step[step] for _ in range(section.group_size)]
            answers = rollout(work, chosen, step)
            sampled = time.perf_counter() - began
            with phase("copy to undo"):
                before = remember(roles, optimizers)

            def attempt(size: int):
                micros = cut(work, layout, chosen, answers, step, size)
                experience = score(work, layout, micros, answers, controller.kl_coef, mean, std)
                return experience, update(work, micros, experience, optimizers, step)

            experience, stats = backoff.run(step, attempt, undo=lambda: put_back(roles, optimizers, before))
            if step == 0:
                check_first_step(experience, stats)
            metrics = describe(work, chosen, answers, experience, stats, controller.kl_coef)
            controller.update(metrics["objective/kl"], len(answers))
            seconds = time.perf_counter() - began
            tokens = sum(len(a.ids) for a in answers)
            work.log.append(
                "ppo",
                step,
                metrics,
                {"seconds": seconds, "rollout_seconds": sampled, "tokens_per_second": tokens / seconds},
            )
            if (step + 1) % section.checkpoint_every == 0 or step + 1 == section.steps:
                extra = {"controller": controller.state_dict(), "normalizer": [mean, std], "micro_batch": backoff.micro}
                keep(roles, optimizers, folder, step + 1, extra)
            bar.advance(1, reward=metrics["objective/scores"], kl=metrics["objective/kl"])
    for role in trained:
        roles.trainable(role, False)
        roles.save(role, work.adapter(role))
    sizes = {role: on.size(role)._asdict() for on in (roles, layout.work.roles) for role in on.names}
    own = {} if layout.work is work else {"reward_base_bytes": layout.base.bytes()}
    return finish(work) | own | {
        "roles": sizes,
        "base_bytes": work.base().bytes(),
        "base_fingerprint": work.base().fingerprint(),
    }  # fmt: skip


def rollout(work: Workspace, records: list[Record], step: int) -> list[Trajectory]:
    """1. One answer per record from the policy; answers to the same prompt stand next to each other."""
    section, base = work.recipe.ppo, work.base()
    prompts = [encode_prompt(base, r.prompt, work.features(r)) for r in records[:: section.group_size]]
    sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p, section.top_k)
    seeds = [work.seed("ppo", step, i) for i in range(len(records))]
    with work.roles.use("policy") as policy:
        slots = section.slots or section.rollouts
        return sample(policy, prompts, sampling, seeds=seeds, per_prompt=section.group_size, batch_size=slots)


@torch.no_grad()
def score(
    work: Workspace,
    layout: RewardInput,
    minibatches: list[list[Micro]],
    answers: list[Trajectory],
    kl_coef: float,
    mean: float,
    std: float,
) -> Experience:
    """2. and 3. All roles read the answers; then KL, rewards and advantages."""
    section, roles, device = work.recipe.ppo, work.roles, work.device
    length_B = torch.tensor([len(a.ids) for a in answers], device=device)
    mask_BT = torch.arange(int(length_B.max()), device=device)[None] < length_B[:, None]
    logp_BT, entropy_BT, ref_logp_BT, value_BT = (torch.zeros(mask_BT.shape, device=device) for _ in range(4))
    rm_B = torch.zeros(len(answers), device=device)
    for micro in (m for minibatch in minibatches for m in minibatch):
        rows = micro.index_b
        tokens = micro.batch.ids_BS.numel()
        with roles.use("policy") as policy, phase("score policy", tokens):
            logp_N, entropy_N = token_logp(work, policy, micro)
        place(logp_BT, rows, mask_BT, logp_N)
        place(entropy_BT, rows, mask_BT, entropy_N)
        with roles.use("reference") as reference, phase("score reference", tokens):
            place(ref_logp_BT, rows, mask_BT, token_logp(work, reference, micro)[0])
        with layout.work.roles.use("reward") as reward, phase("score reward", tokens):
            rm_B[rows] = (layout.score(reward, micro.reward_prompts, micro.reward_answers) - mean) / std
        if section.value == "adapter":
            with roles.use("value") as value, phase("score value", micro.value_batch.ids_BS.numel()):
                place(value_BT, rows, mask_BT, token_value(value, micro))
    stopped_B = torch.tensor([a.stopped for a in answers], device=device)
    score_B = sequence_score(
        rm_B, stopped_B, length_B, section.max_new_tokens, section.stop_penalty, section.length_penalty
    )
    with phase("advantages", mask_BT.numel()):
        kl_BT = kl_penalty(logp_BT, ref_logp_BT, section.kl_estimator) * mask_BT
        advantage_BT, return_BT = advantages(work, score_B, kl_BT, value_BT, mask_BT, kl_coef)
    return Experience(mask_BT, logp_BT, entropy_BT, kl_BT, value_BT, rm_B, score_B, advantage_BT, return_BT)


def advantages(
    work: Workspace, score_B: Tensor, kl_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """(advantage_BT, return_BT): GAE on the shaped rewards, or the leave-one-out baseline on whole answers."""
    section = work.recipe.ppo
    if section.value == "none":
        total_B = score_B - kl_coef * kl_BT.sum(1)  # the KL counts as part of the answer's reward, as in RLOO
        advantage_BT = rloo(total_B, section.group_size)[:, None] * mask_BT
        return_BT = total_B[:, None] * mask_BT
    else:
        reward_BT = shaped_reward(score_B, kl_BT, mask_BT, kl_coef)
        if section.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift_mean=False)
        advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, gamma=section.gamma, lam=section.lam)
    if section.whiten_advantages:
        advantage_BT = whiten(advantage_BT, mask_BT)
    return advantage_BT, return_BT


def update(
    work: Workspace,
    minibatches: list[list[Micro]],
    experience: Experience,
    optimizers: dict[str, torch.optim.Optimizer],
    step: int,
) -> list[dict[str, Tensor]]:
    """4. Every epoch goes over all minibatches in a new order; one optimiser step of each trained role per
    minibatch."""
    section, roles = work.recipe.ppo, work.roles
    generator = torch.Generator().manual_seed(derive_seed(work.recipe.seed, "ppo", "epochs", step))
    history = []
    for _ in range(section.epochs):
        for m in torch.randperm(len(minibatches), generator=generator).tolist():
            minibatch = minibatches[m]
            real = torch.cat([experience.mask_BT[micro.index_b].sum()[None] for micro in minibatch]).sum()
            stats: list[dict[str, Tensor]] = []
            with roles.use("policy") as policy:
                parts = [policy_backward(work, policy, micro, experience, real) for micro in minibatch]
                stats.append(merge(parts))
            clip_and_step(roles.parameters("policy"), optimizers["policy"], section.max_grad_norm)
            if section.value == "adapter":
                with roles.use("value") as value:
                    losses = [value_backward(work, value, micro, experience, real) for micro in minibatch]
                stats.append(
                    {"value_loss": sum(loss for loss, _ in losses), "value_clipfrac": sum(c for _, c in losses)}
                )
                clip_and_step(roles.parameters("value", head=True), optimizers["value"], section.max_grad_norm)
            history.append({name: value for part in stats for name, value in part.items()})
    return history


def policy_backward(
    work: Workspace, policy: ActiveRole, micro: Micro, experience: Experience, real: Tensor
) -> PpoStats:
    """Forward and backward of the clipped policy loss on one micro-batch; `real` tokens of the minibatch are its
    denominator."""
    section, base = work.recipe.ppo, work.base()
    scored_bS = micro.target_bS != IGNORE
    mask_bT = experience.mask_BT[micro.index_b]
    with phase("update policy forward", micro.batch.ids_BS.numel()):
        hidden_ND = policy.hidden(micro.batch)[scored_bS]
        loss, stats = ppo_policy_loss(
            hidden_ND, base.head_weight_VD, micro.target_bS[scored_bS],
            experience.logp_BT[micro.index_b][mask_bT], experience.advantage_BT[micro.index_b][mask_bT],
            mask_bT[mask_bT], clip=section.clip, entropy_coef=section.entropy_coef, denominator=real,
            bias_V=base.ban_bias_V, temperature=section.temperature,
        )  # fmt: skip
    with phase("update policy backward", micro.batch.ids_BS.numel()):
        loss.backward()
    return stats


def value_backward(
    work: Workspace, value: ActiveRole, micro: Micro, experience: Experience, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the value loss on one micro-batch -> (loss, clip fraction)."""
    section = work.recipe.ppo
    mask_bT = experience.mask_BT[micro.index_b]
    with phase("update value forward", micro.value_batch.ids_BS.numel()):
        value_1N = token_value(value, micro)[None]
    old_1N, return_1N = (x[micro.index_b][mask_bT][None] for x in (experience.value_BT, experience.return_BT))
    ones_1N = torch.ones_like(old_1N, dtype=torch.bool)
    loss, stats = value_loss(value_1N, old_1N, return_1N, ones_1N, section.value_clip, real)
    with phase("update value backward", micro.value_batch.ids_BS.numel()):
        (section.value_coef * loss).backward()
    return loss.detach(), stats.clipfrac


def merge(parts: list[PpoStats]) -> dict[str, Tensor]:
    """Statistics of a minibatch from those of its micro-batches: means add up, extremes are taken."""
    sums = {
        name: sum(getattr(p, name) for p in parts)
        for name in ("policy_loss", "approxkl", "clipfrac", "entropy", "ratio_mean")
    }
    return sums | {
        "ratio_min": torch.stack([p.ratio_min for p in parts]).min(),
        "ratio_max": torch.stack([p.ratio_max for p in parts]).max(),
    }


def clip_and_step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    with phase("optimiser"):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def lr_share(section, step: int) -> float:
    """Share of the full rate at a step: a linear rise, then a linear fall to `lr_end`."""
    rise = min(1.0, (step + 1) / (section.warmup_steps + 1))
    return rise * max(section.lr_end, 1.0 - step / section.steps)


@torch.no_grad()
def reward_scale(work: Workspace, layout: RewardInput) -> tuple[float, float]:
    """(mean, standard deviation) of the reward model on the reference's own answers to RL prompts."""
    section, base = work.recipe.ppo, work.base()
    records = work.records("rl")[:256]
    prompts = [encode_prompt(base, r.prompt, work.features(r)) for r in records]
    seeds = [work.seed("ppo", "scale", i) for i in range(len(records))]
    with work.roles.use("reference") as reference:
        sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p, section.top_k)
        answers = sample(reference, prompts, sampling, seeds=seeds, batch_size=section.slots or section.rollouts)
    scores = []
    for part in chunks(list(range(len(records))), section.micro_batch or section.minibatch):
        prompts_b = [layout.prompt(records[i]) for i in part]
        with layout.work.roles.use("reward") as reward:
            scores.append(layout.score(reward, prompts_b, [layout.answer(answers[i].ids, base) for i in part]))
    score_N = torch.cat(scores)
    return score_N.mean().item(), max(score_N.std().item(), 1e-6)


def check_first_step(experience: Experience, history: list[dict[str, Tensor]]) -> None:
    """Raises StageError unless the policy was exactly the reference and the first ratio exactly 1."""
    kl = experience.kl_BT.abs().max().item()
    low, high = history[0]["ratio_min"].item(), history[0]["ratio_max"].item()
    if kl != 0.0 or low != 1.0 or high != 1.0:
        raise StageError(
            f"At step 0 the largest |KL| of a token is {kl:.3g} and the ratio lies in [{low:.9f}, {high:.9f}]; they must be exactly 0 "
            "and 1. The policy is not a copy of the reference, or sampling and scoring disagree about the text. Delete the run's "
            "`ppo` and `adapters/policy` folders and start again; if it stays, report it with the recipe."
        )


def describe(
    work: Workspace,
    records: list[Record],
    answers: list[Trajectory],
    experience: Experience,
    history: list[dict[str, Tensor]],
    kl_coef: float,
) -> dict[str, float]:
    """The step's metrics, under TRL's names; `rollout/oracle_score` only where the truth is known (it is never
    trained on)."""
    e, base = experience, work.base()
    mean = {name: torch.stack([h[name] for h in history]).float().mean().item() for name in history[0]}
    lengths = [len(a.ids) for a in answers]
    kl_B = e.kl_BT.sum(1)
    metrics = {
        "objective/kl": kl_B.mean().item(),
        "objective/kl_coef": kl_coef,
        "objective/scores": e.rm_B.mean().item(),
        "objective/rlhf_reward": (e.score_B - kl_coef * kl_B).mean().item(),
        "objective/entropy": e.entropy_BT.sum(1).mean().item(),
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": mean["entropy"],
        "loss/policy_avg": mean["policy_loss"],
        "val/ratio": mean["ratio_mean"],
        "val/ratio_min": min(h["ratio_min"].item() for h in history),
        "val/ratio_max": max(h["ratio_max"].item() for h in history),
        "val/num_eos_tokens": sum(a.stopped for a in answers),
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/stop_rate": sum(a.stopped for a in answers) / len(answers),
        "rollout/repetition": sum(repetition(a.ids) for a in answers) / len(answers),
    }
    if "value_loss" in mean:
        metrics["loss/value_avg"] = mean["value_loss"]
        metrics["val/clipfrac_avg"] = mean["value_clipfrac"]
        metrics["val/explained_variance"] = explained_variance(e.value_BT, e.return_BT, e.mask_BT)
    truths = [
        truth_score(decode_answer(base, a.ids), r.facts)
        for r, a in zip(records, answers, strict=True)
        if r.facts is not None
    ]
    if truths:
        metrics["rollout/oracle_score"] = sum(truths) / len(truths)
    return metrics


def read_heldout(work: Workspace) -> float:
    return json.loads((work.folder / "reward" / "heldout.json").read_text())["heldout_accuracy"]


def finish(work: Workspace) -> dict:
    """The summary's `ppo` block, from the log."""
    lines = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    first, last = lines[0], lines[-1]
    out = {
        "steps": len(lines),
        "kl_start": first["objective/kl"],
        "kl_end": last["objective/kl"],
        "reward_start": first["objective/scores"],
        "reward_end": last["objective/scores"],
    }
    if "rollout/oracle_score" in first:
        out |= {"oracle_start": first["rollout/oracle_score"], "oracle_end": last["rollout/oracle_score"]}
    write_json(work.stage("ppo") / "result.json", out)
    return out
