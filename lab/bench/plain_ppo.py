"""One PPO step of ours beside a plain implementation of the same step, in the same process, on the same weights.

    python -m lab.bench.plain_ppo RECIPE [KEY=VALUE ...] [--random-weights] [--small] [--rounds 2] [--out FILE]

Plain is what TRL's and LLaMA-Factory's trainers do: `generate` of transformers, the vision tower in every forward,
logits of every position materialised, one forward per role after switching the adapter. All else is as ours, so that
only these differ: the 4-bit base and LoRA, gradient checkpointing, prompts, video tokens after pruning, answers of the
same length, micro-batches, four roles, losses and optimisers. Where the two frameworks differ, plain gets the cheaper:
frames are decoded once and held; a forward encodes all its videos in one pass; log-softmax runs on the answers' rows
only, in float32; no entropy; no logits for the value and the reward role. No answer may end early, in either, so that
both decode as many tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from lab import commit
from rlaif_lite import profiler
from rlaif_lite.data.records import Record
from rlaif_lite.files import chunks
from rlaif_lite.model import answers as answers_module
from rlaif_lite.model.answers import Group
from rlaif_lite.model.inputs import Batch, Sequence, collate, encode_prompt, rope_positions
from rlaif_lite.planner.plan import size_in_bytes
from rlaif_lite.profiler.inputs import stand_ins
from rlaif_lite.recipe import load_recipe
from rlaif_lite.rl.losses import policy_loss, token_weights, value_loss
from rlaif_lite.rollout import Trajectory
from rlaif_lite.stages import features
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.experience import Experience, Micro, cut, padded, place, token_value
from rlaif_lite.stages.ppo.feedback import RewardModelFeedback
from rlaif_lite.training.meter import Meter, describe_machine, versions
from rlaif_lite.video.decode import Frames, View, decode_views
from rlaif_lite.workspace import WHOLE, Workspace


class Step(NamedTuple):
    """What both implementations are given."""

    work: Workspace
    feedback: RewardModelFeedback
    records: list[Record]  # one per answer
    frames: dict[str, Frames]  # by video
    optimizers: dict[str, torch.optim.Optimizer]


def ours(given: Step, number: int) -> int:
    """One step -> tokens of its answers."""
    work, feedback, records, _, optimizers = given
    answers = ppo.rollout(work, records, number)
    micros = cut(work, feedback.critic_prompt, records, answers, number, micro_size(work))
    taken = feedback.take(records, answers, number)
    kl_coef = work.recipe.ppo.kl_coef
    experience = ppo.score(work.roles, work.recipe.ppo, feedback, micros, taken, kl_coef)
    ppo.update(work.roles, work.recipe, micros, experience, optimizers, number, kl_coef)
    return sum(len(answer.ids) for answer in answers)


def plain(given: Step, number: int) -> None:
    work, feedback, records, _, _ = given
    torch.manual_seed(number)
    answers = plain_rollout(given)
    with rows_apart():
        micros = cut(work, feedback.critic_prompt, records, answers, number, micro_size(work))
    plain_update(given, micros, plain_score(given, micros, answers))


@contextmanager
def rows_apart() -> Iterator[None]:
    """Inside, every answer is laid out in a row of its own."""
    with patch.object(answers_module, "sharing_pays", lambda width, groups: False):
        yield


def micro_size(work: Workspace) -> int:
    return work.recipe.ppo.micro_batch or work.recipe.ppo.minibatch


def through_tower(given: Step, records: list[Record]) -> list[Tensor]:
    """features_KD of each record's video, from its frames."""
    work = given.work
    chain = [step.model_dump() for step in work.recipe.features.prune]
    views = features.encode(work.base(), {str(i): given.frames[r.video] for i, r in enumerate(records)}, chain)
    return [view.features_KD for view in views.values()]


def refreshed(given: Step, batch: Batch, index_b: Tensor) -> Batch:
    """The batch with its videos encoded anew."""
    return batch._replace(features=through_tower(given, [given.records[i] for i in index_b.tolist()]))


@torch.no_grad()
def plain_rollout(given: Step) -> list[Trajectory]:
    """`generate`, as many answers at a time as ours has in flight; prompts padded on the left."""
    work, section, base = given.work, given.work.recipe.ppo, given.work.base()
    out: list[Trajectory] = []
    for part in chunks(given.records, int(section.slots or section.rollouts)):
        rows = [encode_prompt(base, r.prompt, work.features(r)) for r in part]
        rows = [row._replace(features_KD=new) for row, new in zip(rows, through_tower(given, part), strict=True)]
        with work.roles.use("policy"):
            found = base.model.generate(
                inputs_embeds=left([collate(base, [row]).embed(base)[0] for row in rows]),
                attention_mask=left([torch.ones(len(row.ids_S), dtype=torch.long, device=base.device) for row in rows]),
                position_ids=left_positions(rows).to(base.device),
                do_sample=True,
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
                max_new_tokens=section.max_new_tokens,
                eos_token_id=base.eos_id,
                suppress_tokens=base.ban_bias_V.nonzero()[:, 0].tolist(),
                pad_token_id=base.eos_id if base.tokenizer.pad_token_id is None else base.tokenizer.pad_token_id,
            ).tolist()
        for ids in found:
            stopped = base.eos_id in ids
            out.append(Trajectory(len(out), ids[: ids.index(base.eos_id) + 1] if stopped else ids, stopped, []))
    return out


def left(rows: list[Tensor]) -> Tensor:
    return pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)


def left_positions(rows: list[Sequence]) -> Tensor:
    """As `generate` takes them: (B,S), or (C,B,S) where the rope has several channels."""
    position_BSC = left([row.position_CS.T for row in rows])
    return rope_positions(position_BSC.permute(2, 0, 1))


def plain_logp(given: Step, role, micro: Micro) -> Tensor:
    """logp_N of the answers, through logits of every position."""
    base = given.work.base()
    logits_bSV = linear(role.hidden(refreshed(given, micro.policy.batch, micro.index_b)), base.head_weight_VD)
    logits_NV = logits_bSV.flatten(0, 1)[micro.policy.before_N].float() + base.ban_bias_V
    logp_NV = (logits_NV / given.work.recipe.ppo.temperature).log_softmax(-1)
    return logp_NV.gather(1, micro.policy.token_N[:, None])[:, 0]


@torch.no_grad()
def plain_score(given: Step, minibatches: list[list[Micro]], answers: list[Trajectory]) -> Experience:
    """One forward per role and micro-batch; then the same rewards and advantages as ours."""
    work, layout, section = given.work, given.feedback.layout, given.work.recipe.ppo
    length_B = torch.tensor([len(a.ids) for a in answers], device=work.device)
    mask_BT = torch.arange(int(length_B.max()), device=work.device)[None] < length_B[:, None]
    logp_BT, ref_BT, value_BT = (torch.zeros(mask_BT.shape, device=work.device) for _ in range(3))
    rm_B = torch.zeros(len(answers), device=work.device)
    for micro in (m for minibatch in minibatches for m in minibatch):
        rows = micro.index_b
        with work.roles.use("policy") as policy:
            place(logp_BT, rows, mask_BT, plain_logp(given, policy, micro))
        with work.roles.use("reference") as reference:
            place(ref_BT, rows, mask_BT, plain_logp(given, reference, micro))
        with layout.work.roles.use("reward") as reward:
            read = [given.records[i] for i in rows.tolist()]
            prompts = [
                layout.prompt(r)._replace(features_KD=f) for r, f in zip(read, through_tower(given, read), strict=True)
            ]
            ids = [layout.answer(p, answers[i].ids, work.base()) for p, i in zip(prompts, rows.tolist(), strict=True)]
            rm_B[rows] = layout.score(reward, [Group(p, [answer]) for p, answer in zip(prompts, ids, strict=True)])
        with work.roles.use("value") as value:
            batch = refreshed(given, micro.value.batch, rows)
            fresh = micro._replace(value=micro.value._replace(batch=batch))
            place(value_BT, rows, mask_BT, token_value(value, fresh))
    stopped_B = torch.tensor([a.stopped for a in answers], device=work.device)
    score_B = ppo.sequence_score(
        rm_B, stopped_B, length_B, section.max_new_tokens, section.stop_penalty, section.length_penalty
    )
    kl_BT = ppo.kl_penalty(logp_BT, ref_BT, section.kl_estimator) * mask_BT
    reward_BT = ppo.shaped_reward(score_B, kl_BT, mask_BT, section.kl_coef)
    advantage_BT, return_BT = ppo.advantages(section, reward_BT, value_BT, mask_BT, mask_BT)
    none_BT = torch.zeros_like(logp_BT)
    return Experience(
        mask_BT, mask_BT, logp_BT, ref_BT, none_BT, kl_BT, value_BT, rm_B, score_B, advantage_BT, return_BT
    )


def plain_update(given: Step, minibatches: list[list[Micro]], e: Experience) -> None:
    """Clipped policy loss and value loss by autograd through the logits."""
    section, roles = given.work.recipe.ppo, given.work.roles
    for minibatch in minibatches * section.epochs:
        rows = torch.cat([micro.index_b for micro in minibatch])
        weights = token_weights(e.mask_BT[rows]).split([len(micro.index_b) for micro in minibatch])
        with roles.use("policy") as policy:
            for micro, weight_bT in zip(minibatch, weights, strict=True):
                old_bT, advantage_bT, mask_bT = (x_BT[micro.index_b] for x_BT in (e.logp_BT, e.advantage_BT, e.mask_BT))
                logp_bT = padded(plain_logp(given, policy, micro), mask_bT)
                policy_loss(logp_bT, old_bT, advantage_bT, weight_bT, section.clip)[0].backward()
        ppo.clip_and_step(roles.parameters("policy"), given.optimizers["policy"], section.max_grad_norm, "plain")
        with roles.use("value") as value:
            for micro in minibatch:
                batch = refreshed(given, micro.value.batch, micro.index_b)
                fresh = micro._replace(value=micro.value._replace(batch=batch))
                old_bT, return_bT, mask_bT = (x_BT[micro.index_b] for x_BT in (e.value_BT, e.return_BT, e.mask_BT))
                value_bT, real = padded(token_value(value, fresh), mask_bT), e.mask_BT[rows].sum()
                loss, _ = value_loss(value_bT, old_bT, return_bT, mask_bT, section.value_clip, real)
                (section.value_coef * loss).backward()
        ppo.clip_and_step(roles.parameters("value"), given.optimizers["value"], section.max_grad_norm, "plain")


def prepare(work: Workspace) -> Step:
    """All four roles on a base that keeps its tower, the frames decoded, the features cached."""
    features.run(work)
    base = work.base(tower=True)
    base.limit_pixels(work.recipe.features.max_pixels)
    base.ban_bias_V[base.eos_id] = -1e30
    stand_ins(work)
    work.load_role("reference")
    feedback = RewardModelFeedback(work)
    work.roles.add("policy", copy_of="reference")
    work.roles.add("value", copy_of=feedback.critic_from)
    work.roles.add_head("value", zero=True)
    optimizers = {}
    for role in ("policy", "value"):
        work.roles.trainable(role)
        parameters = work.roles.parameters(role)
        optimizers[role] = torch.optim.AdamW(parameters, lr=work.recipe.ppo.lr, betas=ppo.BETAS, fused=True)
    records = [r for r in work.records("rl") for _ in range(work.recipe.ppo.group_size)]
    count = work.recipe.features.frames
    size = base.images.size.of(count)
    videos = {r.video for r in records}
    frames = {video: decode_views(video, {WHOLE: View(count)}, size=size)[WHOLE] for video in videos}
    return Step(work, feedback, records, frames, optimizers)


def logp_gap(given: Step) -> float:
    """Largest difference between the log-probs that the two give the same answers, in nats."""
    work, feedback, records = given.work, given.feedback, given.records
    answers = ppo.rollout(work, records, 0)
    with rows_apart():
        micros = cut(work, feedback.critic_prompt, records, answers, 0, micro_size(work))
    taken = feedback.take(records, answers, 0)
    a = ppo.score(work.roles, work.recipe.ppo, feedback, micros, taken, work.recipe.ppo.kl_coef)
    return float((a.logp_BT - plain_score(given, micros, answers).logp_BT).abs().max())


def measure(given: Step, rounds: int) -> dict:
    """Seconds (median of the rounds) and peak memory of each, in turns after a warm-up."""
    gap = logp_gap(given)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    peaks = {"ours": 0, "plain": 0}
    for number in range(rounds + 1):
        for name, step in (("ours", ours), ("plain", plain)):
            with Meter(given.work.device) as meter:
                began = clock(given.work.device)
                step(given, number)
                taken = clock(given.work.device) - began
            if number:  # the first warms up
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], meter.peak_memory_bytes)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "seconds": middle,
        "seconds_by_round": seconds,
        "times_faster": middle["plain"] / middle["ours"],
        "times_faster_least_and_most": [min(ratios), max(ratios)],
        "peak_memory_bytes": peaks,
        "largest_logp_gap": gap,
        "rounds": rounds,
    }


def clock(device: torch.device) -> float:
    """Seconds; on a CPU those that this process has computed for, which other work on the machine does not lengthen."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def arguments_of_a_step(description: str | None) -> argparse.ArgumentParser:
    """What every bench of one recipe's step takes."""
    ask = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("recipe")
    ask.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    ask.add_argument("--random-weights", action="store_true")
    ask.add_argument("--small", action="store_true", help="two narrow layers, to rehearse: such figures mean nothing")
    ask.add_argument("--memory-cap", type=size_in_bytes)
    return ask


def main(arguments: list[str] | None = None) -> dict:
    ask = arguments_of_a_step(__doc__)
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--out", type=Path)
    options = ask.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.model.reward_base is not None or recipe.ppo.value != "adapter":
        ask.error("the comparison is of four roles on one base: leave out model.reward_base, set ppo.value: adapter")
    random = profiler.Random(options.small) if options.random_weights else None
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    with profiler.opened(recipe, 1, options.memory_cap, random) as (work, _):
        profiler.cap(options.memory_cap, work.device)
        found = measure(prepare(work), options.rounds)
    found |= {"recipe": recipe.name, "overrides": options.overrides, "commit": commit()}
    found |= {"small": options.small, "machine": describe_machine(), "versions": versions()}
    least, most = found["times_faster_least_and_most"]
    print(
        f"{recipe.name}: ours {found['seconds']['ours']:.2f} s, plain {found['seconds']['plain']:.2f} s a step: "
        f"{found['times_faster']:.2f} x ({least:.2f} to {most:.2f}); "
        f"log-probs differ by {found['largest_logp_gap']:.1e} at most"
    )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
