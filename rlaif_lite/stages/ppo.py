"""PPO against the model's own feedback (VLM-RLAIF section 3.3): every role an adapter on the one frozen base.

One step, in the order of the code:

    1  `rollout`     the policy answers prompts; what gives feedback may change them (`Feedback.take`)
    2  `score`       policy, reference and value roles read the answers, micro-batch by micro-batch, and feedback says
                     what they are worth (`stages.feedback`)
    3  `advantages`  reward - kl_coef * KL per token, the score on the last real token; GAE, or leave-one-out without
                     a critic
    4  `update`      clipped policy loss and value loss over a few epochs of minibatches

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

import time

import torch
from rlaif_kernels import PpoStats, gae, ppo_policy_loss
from torch import Tensor

from ..data.records import Record
from ..model.inputs import IGNORE, encode_prompt
from ..model.roles import ActiveRole
from ..phases import phase
from ..phases import step as step_begins
from ..progress import progress
from ..recipe import Ppo
from ..rl.advantages import rloo, whiten
from ..rl.losses import value_loss
from ..rl.shaping import AdaptiveKL, FixedKL, kl_penalty, sequence_score, shaped_reward
from ..rollout import Sampling, Trajectory, sample
from ..training.fit import keep, restore
from ..training.loop import batches, derive_seed
from ..training.oom import Backoff, put_back, remember
from ..workspace import Workspace
from .experience import Experience, Micro, cut, place, spread, token_logp, token_value
from .feedback import Feedback, Taken, feedback_of
from .ppo_log import check_first_step, describe, summary

READS = ("seed", "model", "reward.prompt", "reward.pool", "reward.pool_tokens", "reward.floor", "ppo", "data.rl",
         "preference.judge", "preference.batch_size", "preference.claims", "preference.pairwise")  # fmt: skip
NEEDS = ("features", "sft", "context", "reward")
BETAS = (0.9, 0.99)


def run(work: Workspace) -> dict:
    """Train the `policy` role; writes its adapter and the value adapter, and a `metrics.jsonl` line per step."""
    recipe, section = work.recipe, work.recipe.ppo
    feedback = feedback_of(work)
    optimizers = prepare(work, feedback)
    folder = work.stage("ppo") / "checkpoint"
    backoff = Backoff("ppo", section.micro_batch or section.minibatch, work.folder)
    controller = (
        AdaptiveKL(section.kl_coef, section.kl_target, section.kl_horizon)
        if section.kl_target
        else FixedKL(section.kl_coef)
    )
    start, state = restore(work.roles, optimizers, folder)
    if start:
        controller.load_state_dict(state["controller"])
        feedback.load_state(state["feedback"])
        backoff.micro = state["micro_batch"]
    else:
        feedback.begin()
    work.log.resume("ppo", start)
    records = work.records("rl")
    prompts_of_step = batches(len(records), section.rollouts // section.group_size, section.steps, recipe.seed, "ppo")
    with progress(section.steps, "ppo", unit="step") as bar:
        bar.advance(start)
        for step in range(start, section.steps):
            step_begins()
            began = time.perf_counter()
            torch.manual_seed(derive_seed(recipe.seed, "ppo", step))
            set_rates(section, optimizers, step)
            chosen = [records[i] for i in prompts_of_step[step] for _ in range(section.group_size)]
            answers = rollout(work, chosen, step)
            taken = feedback.take(chosen, answers, step)
            sampled = time.perf_counter() - began
            with phase("copy to undo"):
                before = remember(work.roles, optimizers)

            def attempt(size: int):
                micros = cut(work, feedback.critic_prompt, taken.records, taken.answers, step, size)
                experience = score(work, feedback, micros, taken.records, taken, controller.kl_coef)
                return experience, update(work, micros, experience, optimizers, step)

            experience, stats = backoff.run(step, attempt, undo=lambda: put_back(work.roles, optimizers, before))
            if step == 0:
                check_first_step(experience, stats)
            metrics = describe(work, chosen, answers, experience, stats, controller.kl_coef) | taken.metrics
            controller.update(metrics["objective/kl"], len(answers))
            seconds = time.perf_counter() - began
            tokens = sum(len(a.ids) for a in answers)
            times = {"seconds": seconds, "rollout_seconds": sampled, "tokens_per_second": tokens / seconds}
            work.log.append("ppo", step, metrics, times)
            if (step + 1) % section.checkpoint_every == 0 or step + 1 == section.steps:
                extra = {"controller": controller.state_dict(), "feedback": feedback.state(), "micro_batch": backoff.micro}
                keep(work.roles, optimizers, folder, step + 1, extra)
            bar.advance(1, reward=metrics["objective/scores"], kl=metrics["objective/kl"])
    for role in optimizers:
        work.roles.trainable(role, False)
        work.roles.save(role, work.adapter(role))
    return summary(work, feedback.beside)


def prepare(work: Workspace, feedback: Feedback) -> dict[str, torch.optim.Optimizer]:
    """Reference, policy and value roles onto the base -> the optimisers of those that are trained."""
    section, roles, optimizers = work.recipe.ppo, work.roles, {}
    work.load_role("reference")
    roles.add("policy", copy_of="reference")
    trained = ["policy"]
    if section.value == "adapter":
        roles.add("value", copy_of=feedback.critic_from)
        roles.add_head("value", zero=True)
        trained.append("value")
    for role in trained:
        roles.trainable(role)
        parameters = roles.parameters(role, head=role in roles.heads)
        optimizers[role] = torch.optim.AdamW(parameters, weight_decay=0.0, betas=BETAS, fused=True)
    return optimizers


def set_rates(section: Ppo, optimizers: dict[str, torch.optim.Optimizer], step: int) -> None:
    """The learning rates of a step: a linear rise, then a linear fall to `lr_end`."""
    for role, optimizer in optimizers.items():
        highest = section.lr if role == "policy" else section.value_lr or section.lr
        for group in optimizer.param_groups:
            group["lr"] = highest * lr_share(section, step)


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
    feedback: Feedback,
    minibatches: list[list[Micro]],
    records: list[Record],
    taken: Taken,
    kl_coef: float,
) -> Experience:
    """2. and 3. All roles read the answers; then KL, rewards and advantages."""
    section, roles, answers = work.recipe.ppo, work.roles, taken.answers
    length_B = torch.tensor([len(a.ids) for a in answers], device=work.device)
    mask_BT = torch.arange(int(length_B.max()), device=work.device)[None] < length_B[:, None]
    own_BT = spread(taken.own, mask_BT).bool()
    logp_BT, entropy_BT, ref_logp_BT, value_BT = (torch.zeros(mask_BT.shape, device=work.device) for _ in range(4))
    for micro in (m for minibatch in minibatches for m in minibatch):
        rows = micro.index_b
        tokens = micro.batch.ids_BS.numel()
        with roles.use("policy") as policy, phase("score policy", tokens):
            logp_N, entropy_N = token_logp(work, policy, micro)
        place(logp_BT, rows, mask_BT, logp_N)
        place(entropy_BT, rows, mask_BT, entropy_N)
        with roles.use("reference") as reference, phase("score reference", tokens):
            place(ref_logp_BT, rows, mask_BT, token_logp(work, reference, micro)[0])
        if section.value == "adapter":
            with roles.use("value") as value, phase("score value", micro.value_batch.ids_BS.numel()):
                place(value_BT, rows, mask_BT, token_value(value, micro))
    said = feedback.score(records, taken, minibatches, logp_BT, mask_BT)
    stopped_B = torch.tensor([a.stopped for a in answers], device=work.device)
    score_B = sequence_score(
        said.score_B, stopped_B, length_B, section.max_new_tokens, section.stop_penalty, section.length_penalty
    )
    with phase("advantages", mask_BT.numel()):
        kl_BT = kl_penalty(logp_BT, ref_logp_BT, section.kl_estimator) * own_BT
        reward_BT = shaped_reward(score_B, kl_BT, mask_BT, kl_coef) + said.token_reward_BT
        advantage_BT, return_BT = advantages(section, reward_BT, value_BT, mask_BT, own_BT)
    raw_B, score_B = (score_B + said.token_reward_BT.sum(1) for score_B in (said.score_B, score_B))
    return Experience(mask_BT, own_BT, logp_BT, entropy_BT, kl_BT, value_BT, raw_B, score_B, advantage_BT, return_BT)


def advantages(
    section: Ppo, reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, own_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """(advantage_BT, return_BT): GAE on the shaped rewards, or the leave-one-out baseline on whole answers."""
    if section.value == "none":
        total_B = reward_BT.sum(1)  # the KL counts as part of the answer's reward, as in RLOO
        advantage_BT = rloo(total_B, section.group_size)[:, None] * own_BT
        return_BT = total_B[:, None] * mask_BT
    else:
        if section.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift_mean=False)
        advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, gamma=section.gamma, lam=section.lam)
        advantage_BT = advantage_BT * own_BT
    if section.whiten_advantages:
        advantage_BT = whiten(advantage_BT, own_BT)
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
            rows = torch.cat([micro.index_b for micro in minibatch])
            real, own = experience.mask_BT[rows].sum(), experience.own_BT[rows].sum()
            stats: list[dict[str, Tensor]] = []
            with roles.use("policy") as policy:
                parts = [policy_backward(work, policy, micro, experience, own) for micro in minibatch]
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
    work: Workspace, policy: ActiveRole, micro: Micro, experience: Experience, own: Tensor
) -> PpoStats:
    """Forward and backward of the clipped policy loss on one micro-batch; the `own` tokens of the minibatch, those that
    the policy sampled, are its denominator."""
    section, base = work.recipe.ppo, work.base()
    scored_bS = micro.target_bS != IGNORE
    mask_bT = experience.mask_BT[micro.index_b]
    with phase("update policy forward", micro.batch.ids_BS.numel()):
        hidden_ND = policy.hidden(micro.batch)[scored_bS]
        loss, stats = ppo_policy_loss(
            hidden_ND, base.head_weight_VD, micro.target_bS[scored_bS],
            experience.logp_BT[micro.index_b][mask_bT], experience.advantage_BT[micro.index_b][mask_bT],
            experience.own_BT[micro.index_b][mask_bT], clip=section.clip, entropy_coef=section.entropy_coef,
            denominator=own,
            bias_V=base.ban_bias_V, temperature=section.temperature,
        )  # fmt: skip
    with phase("update policy backward", micro.batch.ids_BS.numel()):
        loss.backward()
    return stats


def value_backward(
    work: Workspace, value: ActiveRole, micro: Micro, experience: Experience, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the value loss on one micro-batch -> (loss, clip fraction); the `real` tokens of the
    minibatch are its denominator."""
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


def lr_share(section: Ppo, step: int) -> float:
    """Share of the full rate at a step: a linear rise, then a linear fall to `lr_end`."""
    rise = min(1.0, (step + 1) / (section.warmup_steps + 1))
    return rise * max(section.lr_end, 1.0 - step / section.steps)
