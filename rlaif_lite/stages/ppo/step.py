"""PPO against the model's own feedback (VLM-RLAIF section 3.3): every role an adapter on the one frozen base.

One step, in the order of the code:

    1  `rollout`     the policy answers prompts; what gives feedback may change them (`Feedback.take`)
    2  `score`       policy, reference and value roles read the answers, micro-batch by micro-batch, and feedback says
                     what they are worth (`stages.feedback`)
    3  `advantages`  reward - kl_coef * KL per token, the score on the last real token; GAE, or without a critic what
                     `ppo.baseline` says
    4  `update`      policy loss (`rl.losses`) and value loss over a few epochs of minibatches

Micro-batches are cut once per step and are the same rows, with the same padding, in every forward of that step. So at
the first minibatch of a step the new log-probs equal the old ones bit for bit: ratio exactly 1, and at step 0, where
the policy is a copy of the reference, KL exactly 0. Both are checked before an hour is spent (`check_first_step`).
Where memory runs out, the update is undone and the step is cut anew, so that this still holds (`training/oom.py`).

Departures from the release, each one a defect mended or a memory saved: every mean is over real tokens only; the
score stands on the last real token; the stop rule is EOS alone; the KL is not clamped; no factor of 10 on the
rewards; the reward may be standardised on the reference's answers (`ppo.normalize_reward`); `ppo.value: none` trains
no critic (RLOO, GRPO, REINFORCE++); the KL may stand in the loss (`ppo.kl_in`).

Shapes: B answers of a step, b of a micro-batch, S positions, T answer tokens (padded on the right), N real answer
tokens, D width.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif_kernels import gae

from ... import ranks
from ...data.records import Record
from ...data.truth import TRUTH
from ...model.base import Base
from ...model.inputs import encode_prompt
from ...model.roles import ActiveRole, Roles
from ...model.text import decode_answer
from ...phases import phase
from ...phases import step as step_begins
from ...progress import progress, say
from ...recipe import Ppo, Recipe
from ...rl.advantages import TaskDeviation, group_relative, rloo, whiten
from ...rl.losses import PolicyStats, merge_stats, policy_loss, token_weights, value_loss, weighted_sum
from ...rl.shaping import adapted, kl_penalty, sequence_score, shaped_reward, symbolic_bonus
from ...rollout import Trajectory
from ...training.fit import clip_and_step, keep, restore
from ...training.health import FLAT
from ...training.loop import batches, derive_seed
from ...training.oom import Backoff, put_back, remember
from ...workspace import Workspace
from .experience import (
    Experience,
    Micro,
    answer_hidden,
    answer_logp,
    answers_of,
    cut,
    padded,
    place,
    spread,
    token_value,
)
from .feedback import Feedback, RewardModelFeedback, Taken
from .log import check_first_step, step_metrics, summary
from .outside import OutsideFeedback
from .ranking import RankingFeedback
from .resample import resampled
from .rlif import InterventionFeedback
from .rules import RuleFeedback

READS = (
    *("seed", "model", "reward.prompt", "reward.pool", "reward.pool_tokens", "reward.floor", "ppo", "data.rl"),
    *("preference.judge", "preference.batch_size", "preference.claims", "preference.pairwise", "preference.outside"),
    *TRUTH,
)
NEEDS = ("features", "sft", "context", "reward")
BETAS = (0.9, 0.99)
FEEDBACK = {
    "reward_model": RewardModelFeedback,
    "interventions": InterventionFeedback,
    "ranking": RankingFeedback,
    "rules": RuleFeedback,
    "outside": OutsideFeedback,
}


class Update(NamedTuple):
    """What one rank saw of one update."""

    parts: list[tuple[dict[str, Tensor], PolicyStats]]  # of its micro-batches: the loss's terms, statistics
    losses: list[tuple[Tensor, Tensor]]  # of the critic: loss and clip fraction
    weight: Tensor  # of all tokens of the minibatch
    grad_norm: Tensor


def run(work: Workspace) -> dict:
    """Train the `policy` role; writes its adapter and the value adapter, and a `metrics.jsonl` line per step."""
    recipe, section = work.recipe, work.recipe.ppo
    feedback = FEEDBACK[section.feedback](work)
    optimizers = prepare(work, feedback)
    folder = work.stage("ppo") / "checkpoint"
    backoff = Backoff("ppo", section.micro_batch or section.minibatch, work.folder)
    kl_coef = section.kl_coef
    deviation = None if section.task_std is None else TaskDeviation(section.task_std)
    start, state = restore(work.roles, optimizers, folder)
    if start:
        kl_coef = state["kl_coef"]
        if deviation is not None:
            deviation.load_state_dict(state["deviation"])
        feedback.load_state(state["feedback"])
        backoff.micro = state["micro_batch"]
    else:
        feedback.begin()
    work.log.resume("ppo", start, state.get("metrics"))
    records = work.records("rl")
    prompts_of_step = batches(len(records), section.rollouts // section.group_size, section.steps, recipe.seed, "ppo")
    with progress(section.steps, "ppo", unit="step") as bar:
        bar.advance(start)
        for step in range(start, section.steps):
            step_begins()
            torch.manual_seed(derive_seed(recipe.seed, "ppo", step))
            for role, optimizer in optimizers.items():
                highest = section.lr if role == "policy" else section.value_lr or section.lr
                for group in optimizer.param_groups:
                    group["lr"] = highest * lr_share(section, step)
            chosen = [records[i] for i in prompts_of_step[step] for _ in range(section.group_size)]
            metrics, times = one_step(work, feedback, optimizers, backoff, chosen, step, kl_coef, deviation)
            kl_coef = adapted(kl_coef, metrics["objective/kl"], len(chosen), section.kl_target, section.kl_horizon)
            work.log.append("ppo", step, metrics, times)
            if (step + 1) % section.checkpoint_every == 0 or step + 1 == section.steps:
                extra = {"kl_coef": kl_coef, "feedback": feedback.state()}
                extra |= {"deviation": deviation.state_dict()} if deviation is not None else {}
                extra |= {"micro_batch": backoff.micro, "metrics": work.log.digest_of("ppo")}
                keep(work.roles, optimizers, folder, step + 1, extra)
            bar.advance(1, reward=metrics["objective/scores"], kl=metrics["objective/kl"])
    for role in optimizers:
        work.roles.trainable(role, False)
        work.roles.save(role, work.adapter(role))
    return summary(work, feedback.beside)


def one_step(
    work: Workspace,
    feedback: Feedback,
    optimizers: dict[str, torch.optim.Optimizer],
    backoff: Backoff,
    records: list[Record],
    step: int,
    kl_coef: float,
    deviation: TaskDeviation | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """A step on one answer per record -> (its metrics, its times). Where memory runs out, the update is undone and
    repeated in smaller micro-batches."""
    recipe, roles = work.recipe, work.roles
    began = time.perf_counter()
    answers = rollout(work, records, step)
    taken = feedback.take(records, answers, step)
    if recipe.ppo.resample:
        taken = resampled(work, taken, step, lambda r, turn: feedback.take(r, rollout(work, r, step, turn), step))
        records, answers = taken.records, taken.answers
    tasks = [record.task or "" for record in taken.records]
    deviation_of = None if deviation is None else partial(deviation.of, step, tasks)
    sampled = time.perf_counter() - began
    with phase("copy to undo"):
        before = remember(roles, optimizers)

    def attempt(size: int) -> tuple[Experience, list[dict[str, Tensor]]]:
        minibatches = cut(work, feedback.critic_prompt, taken.records, taken.answers, step, size)
        experience = score(roles, recipe.ppo, feedback, minibatches, taken, kl_coef, deviation_of)
        return experience, update(roles, recipe, minibatches, experience, optimizers, step, kl_coef)

    experience, history = backoff.run(step, attempt, undo=lambda: put_back(roles, optimizers, before))
    if step == 0:
        check_first_step(experience, history)
    if not experience.learn_BT.any():
        why = "were cut at ppo.max_new_tokens or score as the others of their group"
        if experience.score_B.amax() - experience.score_B.amin() <= FLAT:
            why = f"have the same score, {experience.score_B[0].item():.3g}"
        say(
            f"WARNING ppo: step {step} has no answer to learn from. All {len(answers)} {why}. "
            "All roles stay as they are."
        )
    metrics = step_metrics(work, records, answers, experience, history, kl_coef) | taken.metrics
    seconds, tokens = time.perf_counter() - began, sum(len(a.ids) for a in answers)
    return metrics, {"seconds": seconds, "rollout_seconds": sampled, "tokens_per_second": tokens / seconds}


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
        parameters = roles.parameters(role)
        optimizers[role] = torch.optim.AdamW(parameters, weight_decay=0.0, betas=BETAS, fused=True)
    return optimizers


def rollout(work: Workspace, records: list[Record], step: int, turn: int = 0) -> list[Trajectory]:
    """1. One answer per record from the policy; answers to the same prompt stand next to each other. A later `turn` of
    a step has random numbers of its own."""
    section, base = work.recipe.ppo, work.base()
    asked = records[:: section.group_size]
    stream = ("ppo", step) if turn == 0 else ("ppo", "resample", step, turn)
    seeds = [work.seed(*stream, i) for i in range(len(records))]
    prompt_of = lambda i: encode_prompt(base, asked[i].prompt, work.features(asked[i]))
    return answers_of(work, "policy", len(asked), prompt_of, seeds, section.group_size)


@torch.no_grad()
def score(
    roles: Roles,
    section: Ppo,
    feedback: Feedback,
    minibatches: list[list[Micro]],
    taken: Taken,
    kl_coef: float,
    deviation_of: Callable[[Tensor], Tensor] | None = None,
) -> Experience:
    """2. and 3. All roles read the answers; then KL, rewards and advantages. Of several ranks each reads its share.
    From there on all have all numbers, so that moments, KL and advantages are the same everywhere. `deviation_of`:
    total rewards (B,) -> the running deviation of each answer's task (B,)."""
    base, critic = roles.base, section.value == "adapter"
    exact, in_loss = section.kl_estimator == "exact", section.kl_in == "loss"
    length_B = torch.tensor([len(a.ids) for a in taken.answers], device=base.device)
    mask_BT = torch.arange(int(length_B.max()), device=base.device)[None] < length_B[:, None]
    own_BT = spread(taken.own, mask_BT).bool()
    found_5BT = torch.zeros(5, *mask_BT.shape, device=base.device)
    logp_BT, entropy_BT, ref_logp_BT, kl_BT, value_BT = found_5BT
    for micro in (m for minibatch in minibatches for m in minibatch):
        rows, tokens = micro.index_b, micro.policy.batch.ids_BS.numel()
        with roles.use("reference") as reference, phase("score reference", tokens):
            ref_hidden_ND = answer_hidden(reference, micro)
            place(ref_logp_BT, rows, mask_BT, answer_logp(base, ref_hidden_ND, micro, section.temperature).logp_N)
        with roles.use("policy") as policy, phase("score policy", tokens):
            hidden_ND = answer_hidden(policy, micro)
            # as the update reads them, with the reference or without: a kernel may round either way
            found = answer_logp(
                base, hidden_ND, micro, section.temperature, ref_hidden_ND if exact and in_loss else None
            )
            place(logp_BT, rows, mask_BT, found.logp_N)
            place(entropy_BT, rows, mask_BT, found.entropy_N)
            if exact:
                if not in_loss:
                    found = answer_logp(base, hidden_ND, micro, section.temperature, ref_hidden_ND)
                place(kl_BT, rows, mask_BT, found.kl_N)
        if critic:
            with roles.use("value") as value, phase("score value", micro.value.batch.ids_BS.numel()):
                place(value_BT, rows, mask_BT, token_value(value, micro))
    ranks.total(found_5BT)  # each answer was read by one rank
    said = feedback.score(taken, minibatches, logp_BT, mask_BT)
    score_B = with_penalties(base, section, taken, said.score_B)
    with phase("advantages", mask_BT.numel()):
        kl_BT = (kl_BT if exact else kl_penalty(logp_BT, ref_logp_BT, section.kl_estimator)) * own_BT
        reward_BT = shaped_reward(score_B, kl_BT, mask_BT, 0.0 if in_loss else kl_coef) + said.token_reward_BT
        advantage_BT, return_BT = advantages(section, reward_BT, value_BT, mask_BT, own_BT, deviation_of)
    raw_B, score_B = (each_B + said.token_reward_BT.sum(1) for each_B in (said.score_B, score_B))
    learn_BT = own_BT & learnable(section, taken, raw_B)[:, None]
    if section.feedback in ("rules", "outside"):
        learn_BT &= score_B.amax() - score_B.amin() > FLAT
    return Experience(
        mask_BT, learn_BT, logp_BT, ref_logp_BT, entropy_BT, kl_BT, value_BT, raw_B, score_B, advantage_BT, return_BT
    )


def with_penalties(base: Base, section: Ppo, taken: Taken, score_B: Tensor) -> Tensor:
    """The feedback's scores with what is known of an answer without a judge: did it stop, how long is it, and is it the
    option that its record names."""
    records, answers = taken.records, taken.answers
    stopped_B = torch.tensor([a.stopped for a in answers], device=base.device)
    length_B = torch.tensor([len(a.ids) for a in answers], device=base.device)
    weight_B = torch.ones_like(score_B)
    if section.length_weights:
        weight_B = torch.tensor([1.0 if r.length_bonus is None else r.length_bonus for r in records]).to(weight_B)
    score_B = sequence_score(
        score_B,
        stopped_B,
        length_B,
        section.max_new_tokens,
        section.stop_penalty,
        section.length_penalty * weight_B,
        section.stop_buffer,
    )
    if section.symbolic_bonus:
        texts = [decode_answer(base, a.ids) for a in answers]
        bonus = [symbolic_bonus(text, r.caption_type) for text, r in zip(texts, records, strict=True)]
        score_B = score_B + section.symbolic_bonus * torch.tensor(bonus).to(score_B)
    return score_B


def learnable(section: Ppo, taken: Taken, raw_B: Tensor) -> Tensor:
    """bool (B,), the answers that the policy's loss is over. `mask_unstopped` leaves out those cut at the length limit,
    `skip_equal_groups` those of groups whose scores before penalties are all equal."""
    learn_B = torch.ones_like(raw_B, dtype=torch.bool)
    if section.mask_unstopped:
        whole = [a.stopped or len(a.ids) < section.max_new_tokens for a in taken.answers]
        learn_B &= torch.tensor(whole, device=raw_B.device)
    if section.skip_equal_groups:
        raw_GK = raw_B.view(-1, section.group_size)
        learn_B &= (raw_GK.amax(1) > raw_GK.amin(1)).repeat_interleave(section.group_size)
    return learn_B


def advantages(
    section: Ppo,
    reward_BT: Tensor,
    value_BT: Tensor,
    mask_BT: Tensor,
    own_BT: Tensor,
    deviation_of: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantage_BT, return_BT). With a critic GAE on the shaped rewards. Without one, whole answers beside those of
    their prompt (RLOO, GRPO), a KL in the rewards counting in; or each token's rewards to come, to be whitened over the
    step (REINFORCE++)."""
    critic = section.value == "adapter"
    if not critic and section.baseline != "batch":
        total_B = reward_BT.sum(1)
        if section.baseline == "group":
            deviation_B = None if deviation_of is None else deviation_of(total_B)
            gain_B = group_relative(total_B, section.group_size, section.group_std, deviation_B)
        else:
            gain_B = rloo(total_B, section.group_size)
        advantage_BT, return_BT = gain_B[:, None] * own_BT, total_B[:, None] * mask_BT
    else:
        if section.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift_mean=False)
        lam = section.lam if critic else 1.0
        advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, gamma=section.gamma, lam=lam)
        advantage_BT = advantage_BT * own_BT
    if section.whiten_advantages:
        advantage_BT = whiten(advantage_BT, own_BT)
    return advantage_BT, return_BT


def update(
    roles: Roles,
    recipe: Recipe,
    minibatches: list[list[Micro]],
    experience: Experience,
    optimizers: dict[str, torch.optim.Optimizer],
    step: int,
    kl_coef: float,
) -> list[dict[str, Tensor]]:
    """4. Every epoch goes over all minibatches in a new order; one optimiser step of each trained role per
    minibatch. Weights and denominators are the whole minibatch's, so the ranks' gradients and terms add up."""
    section, e = recipe.ppo, experience
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "ppo", "epochs", step))
    none = torch.zeros(0, dtype=torch.int64)
    own = [torch.cat([micro.index_b for micro in m]) if m else none for m in minibatches]
    # which answers of the step each minibatch has, those of all ranks
    rows_of = [torch.cat(of_ranks).to(e.mask_BT.device) for of_ranks in zip(*ranks.gather(own), strict=True)]
    updates, learns = [], bool(e.learn_BT.any())
    for _ in range(section.epochs):
        for m in torch.randperm(len(minibatches), generator=generator).tolist():
            rows, micros = rows_of[m], minibatches[m]
            weight_mT = token_weights(e.learn_BT[rows], section.loss_mean, section.max_new_tokens)
            weight_BT = torch.zeros(e.mask_BT.shape, device=weight_mT.device).index_copy(0, rows, weight_mT)
            parts = []
            for micro in micros:
                ref_hidden_ND = reference_hidden(roles, section, micro)
                with roles.use("policy") as policy:
                    weight_bT = weight_BT[micro.index_b]
                    parts.append(policy_backward(section, policy, micro, e, weight_bT, ref_hidden_ND, kl_coef))
            where, norm = f"ppo, step {step}", 0.0
            if weight_mT.any():  # else nothing to learn from, and Adam's momentum would move the policy all the same
                ranks.sum_gradients(roles.parameters("policy"))
                norm = clip_and_step(roles.parameters("policy"), optimizers["policy"], section.max_grad_norm, where)
            losses = []
            if section.value == "adapter" and learns:
                real = e.mask_BT[rows].sum()
                with roles.use("value") as value:
                    losses = [value_backward(section, value, micro, e, real) for micro in micros]
                ranks.sum_gradients(roles.parameters("value"))
                clip_and_step(roles.parameters("value"), optimizers["value"], section.max_grad_norm, where)
            updates.append(Update(parts, losses, weight_mT.sum(), torch.tensor(norm)))
    return [merged(of_ranks) for of_ranks in zip(*ranks.gather(updates), strict=True)]


def merged(of_ranks: Sequence[Update]) -> dict[str, Tensor]:
    """The statistics of one update, from what every rank saw of it."""
    parts = [part for update in of_ranks for part in update.parts]
    losses = [loss for update in of_ranks for loss in update.losses]
    stats = merge_stats([stats for _, stats in parts])
    stats |= {name: sum(terms[name] for terms, _ in parts) for name in parts[0][0]}
    stats["entropy"] = stats["entropy"] / of_ranks[0].weight.clamp(min=1e-9)  # a mean, whatever the weights add up to
    stats["grad_norm"] = of_ranks[0].grad_norm
    if losses:
        stats |= {"value_loss": sum(loss for loss, _ in losses), "value_clipfrac": sum(c for _, c in losses)}
    return stats


@torch.no_grad()
def reference_hidden(roles: Roles, section: Ppo, micro: Micro) -> Tensor | None:
    """ref_hidden_ND of a micro-batch where the loss holds the exact KL, else None."""
    if section.kl_in != "loss" or section.kl_estimator != "exact":
        return None
    with roles.use("reference") as reference, phase("update reference", micro.policy.batch.ids_BS.numel()):
        return answer_hidden(reference, micro)


def policy_backward(
    section: Ppo,
    policy: ActiveRole,
    micro: Micro,
    e: Experience,
    weight_bT: Tensor,
    ref_hidden_ND: Tensor | None,
    kl_coef: float,
) -> tuple[dict[str, Tensor], PolicyStats]:
    """Forward and backward of the policy's loss on one micro-batch -> (the loss's terms, statistics). The weights are
    those of `token_weights` over the minibatch."""
    rows = micro.index_b
    differentiable = "all" if section.entropy_coef or ref_hidden_ND is not None else "logp"
    with phase("update policy forward", micro.policy.batch.ids_BS.numel()):
        hidden_ND = answer_hidden(policy, micro)
        found = answer_logp(policy.roles.base, hidden_ND, micro, section.temperature, ref_hidden_ND, differentiable)
        logp_bT, entropy_bT = (padded(x_N, e.mask_BT[rows]) for x_N in (found.logp_N, found.entropy_N))
        loss, stats = policy_loss(
            logp_bT,
            e.logp_BT[rows],
            e.advantage_BT[rows],
            weight_bT,
            section.clip,
            kind=section.policy_loss,
            clip_high=section.clip_high,
            dual_clip=section.dual_clip,
        )
        terms = {"policy_loss": loss, "entropy": weighted_sum(entropy_bT, weight_bT)}
        loss = loss - section.entropy_coef * terms["entropy"]
        if section.kl_in == "loss":
            if ref_hidden_ND is None:
                kl_bT = kl_penalty(logp_bT, e.ref_logp_BT[rows], section.kl_estimator)
            else:
                kl_bT = padded(found.kl_N, e.mask_BT[rows])
            terms["kl"] = weighted_sum(kl_bT, weight_bT)
            loss = loss + kl_coef * terms["kl"]
    with phase("update policy backward", micro.policy.batch.ids_BS.numel()):
        loss.backward()
    return {name: term.detach() for name, term in terms.items()}, stats


def value_backward(
    section: Ppo, value: ActiveRole, micro: Micro, experience: Experience, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the value loss on one micro-batch -> (loss, clip fraction); the `real` tokens of the
    minibatch are its denominator."""
    rows = micro.index_b
    with phase("update value forward", micro.value.batch.ids_BS.numel()):
        value_bT = padded(token_value(value, micro), experience.mask_BT[rows])
        loss, stats = value_loss(
            value_bT,
            experience.value_BT[rows],
            experience.return_BT[rows],
            experience.mask_BT[rows],
            section.value_clip,
            real,
        )
    with phase("update value backward", micro.value.batch.ids_BS.numel()):
        (section.value_coef * loss).backward()
    return loss.detach(), stats.clipfrac


def lr_share(section: Ppo, step: int) -> float:
    """Share of the full rate at a step: a linear rise, then a linear fall to `lr_end`."""
    rise = min(1.0, (step + 1) / (section.warmup_steps + 1))
    return rise * max(section.lr_end, 1.0 - step / section.steps)
