"""Pretrains the embedded base from scratch: `python -m lab.embedded_base.pretrain --out DIR --minutes M
[--weak-video]`.

One clean schedule on CPU cores, data-parallel over processes of one thread each:
  1. videos are made, encoded to mp4 and decoded;
  2. the vision tower alone learns to read single frames, with heads that are thrown away; then it stays frozen;
  3. projector and language model learn the sheets of `tasks.py`; pairs join later, wide margins first.

The result is a function of the seed, the number of steps and the number of processes (`--minutes` only chooses the
number of steps, from the measured speed, and prints it). `--weak-video` leaves out what must be read from the whole
video: a base that reads clips well and whole videos badly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from lab.embedded_base.architecture import build_model, save
from lab.embedded_base.card import write_card
from lab.embedded_base.network import Hidden, forward, pooled_features, tower_features, use_bf16_products
from lab.embedded_base.sheet import NUMBER, Batch, collate
from lab.embedded_base.skills import measure
from lab.embedded_base.tasks import BEFORE_PAIRS, SHEET, WITH_PAIRS, draw
from lab.embedded_base.videos import VideoSet, make_videos
from rlaif_lite.data.world_text import COLOURS

PAIRS_FROM = 0.40  # share of the steps before pairs join
MARGINS = ((0.50, 3), (0.62, 2), (2.0, 0))  # until this share of the steps, pairs have at least this margin


class Options(NamedTuple):
    """What a run is a function of."""

    out: Path
    videos: int
    vision_steps: int
    steps: int  # 0: as many as `minutes` allow
    minutes: float
    processes: int
    rows: int  # sheets per step and process
    rate: float  # peak learning rate of the matrices
    seed: int
    weak: bool
    cache: Path  # decoded videos are kept here, for the other processes and the next run
    every: int  # steps between measurements
    card_videos: int  # fresh videos for the skill table of the card
    held_out: int  # videos that are never trained on; the log measures on the first 100 of them


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    """One all-reduce over all gradients, flattened."""
    if processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= processes
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def train_tower(model, videos: VideoSet, options: Options, rank: int) -> None:
    """Step 2: colour, shape, place and star of single frames, read by heads that are thrown away."""
    width = model.config.vision_config.hidden_size
    torch.manual_seed(options.seed)
    trunk, head = nn.Linear(4 * width, 4 * width), nn.Linear(4 * width, 7 + 5 + 3 + 7)
    parameters = [*model.model.vision_tower.parameters(), *trunk.parameters(), *head.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    labels_ML = torch.from_numpy(videos.labels_NFL).flatten(0, 1)
    frames_MHWC = torch.from_numpy(videos.frames_NFHWC).flatten(0, 1)
    usable = (len(videos.facts) - options.held_out) * videos.frames_NFHWC.shape[1]
    picker = torch.Generator().manual_seed(1000 * options.seed + rank)

    def losses(pick: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        truth_BL = labels_ML[pick]
        out_BO = head(F.gelu(trunk(tower_features(model, frames_MHWC[pick]).flatten(1))))
        colour, shape, place, star = out_BO.split([7, 5, 3, 7], 1)
        visible = truth_BL[:, 0] < len(COLOURS)
        loss = F.cross_entropy(colour, truth_BL[:, 0].long()) + F.cross_entropy(shape, truth_BL[:, 1].long())
        loss = (
            loss
            + 2 * (place - (truth_BL[:, 2:5] - 0.5) * 4)[visible].square().mean()
            + F.cross_entropy(star, truth_BL[:, 5].long())
        )
        right = torch.stack(
            [(o.argmax(1) == truth_BL[:, c]).float().mean() for o, c in ((colour, 0), (shape, 1), (star, 5))]
        )
        return loss, right

    for step in range(options.vision_steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / options.vision_steps)
        loss, right = losses(torch.randint(0, usable, (128,), generator=picker))
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        average_gradients(parameters, options.processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if rank == 0 and step % 200 == 199:
            print(f"tower step {step + 1}: loss {loss.item():.3f}, colour/shape/star {right.tolist()}", flush=True)
    if rank == 0:
        with torch.no_grad():
            loss, right = losses(torch.arange(usable, min(usable + 2400, len(frames_MHWC))))
        print(f"tower held out: loss {loss.item():.3f}, colour/shape/star {right.tolist()}", flush=True)


def loss_of(model, batch: Batch, hidden: Hidden) -> tuple[torch.Tensor, dict[str, float]]:
    """Everything a batch of sheets teaches, as one number; and its parts."""
    head = model.lm_head.weight
    norm = model.model.language_model.norm
    picked = batch.weight_BL > 0
    weight_P = batch.weight_BL[picked]
    ce_P = F.cross_entropy(hidden.last_BLD[picked] @ head.t(), batch.target_BL[picked], reduction="none")
    loss = (ce_P * weight_P).sum() / weight_P.sum()
    parts = {"tasks": loss.item()}
    if batch.letters:
        rows = torch.tensor([letter.row for letter in batch.letters])
        columns = torch.tensor([letter.column for letter in batch.letters])
        margin_P = torch.tensor([float(letter.margin) for letter in batch.letters])
        logits_PV = hidden.last_BLD[rows, columns] @ head.t()
        gap_P = logits_PV[:, NUMBER["A"]] - logits_PV[:, NUMBER["B"]]
        letter = F.binary_cross_entropy_with_logits(gap_P, torch.sigmoid(1.5 * margin_P))
        mass = -torch.logsumexp(logits_PV.log_softmax(1)[:, [NUMBER["A"], NUMBER["B"]]], 1).mean()
        order = (gap_P[0::2] + gap_P[1::2]).square().mean()
        told = batch.verdict_BL >= 0
        direction = head[NUMBER["yes"]] - head[NUMBER["no"]]
        verdict = F.binary_cross_entropy_with_logits(
            norm(hidden.verdict_BLD[told]) @ direction, batch.verdict_BL[told].float()
        )
        direction = head[NUMBER["A"]] - head[NUMBER["B"]]
        vote = F.binary_cross_entropy_with_logits(norm(hidden.vote_BLD[told]) @ direction, batch.vote_BL[told])
        loss = loss + letter + 0.2 * mass + 0.05 * order + 0.7 * verdict + 0.5 * vote
        decided = margin_P != 0
        right = ((gap_P > 0) == (margin_P > 0))[decided].float().mean().item()
        parts |= {"letter": letter.item(), "verdict": verdict.item(), "vote": vote.item(), "right": right}
    return loss, parts


def optimisers(model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder, AdamW for the rest."""
    matrices = [p for p in model.model.language_model.layers.parameters() if p.dim() == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_language(
    model, pooled_NFKD: torch.Tensor, facts: list, options: Options, rank: int, log: Path, started: float
) -> int:
    """Step 3. Returns the number of steps."""
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and n != "model.image_newline"]
    model.model.image_newline.requires_grad_(False)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    both = optimisers(model, options.rate)
    peaks = [group["lr"] for optimiser in both for group in optimiser.param_groups]
    trainable, steps, begun = len(facts) - options.held_out, options.steps, time.time()
    recent: list[dict] = []
    step = 0
    while not steps or step < steps:
        share = step / steps if steps else 0.0
        rng = random.Random(f"{options.seed}/{rank}/{step}")
        mix = WITH_PAIRS if share >= PAIRS_FROM else BEFORE_PAIRS
        margin = next(least for until, least in MARGINS if share < until)
        picks = [rng.randrange(trainable) for _ in range(options.rows)]
        batch = collate([draw(mix, video, facts[video], rng, options.weak, margin) for video in picks])
        factor = min(1.0, (step + 1) / 100) * max(0.02, min(1.0, (1 - share) / 0.7))
        for peak, group in zip(peaks, (g for optimiser in both for g in optimiser.param_groups), strict=True):
            group["lr"] = peak * factor
        loss, parts = loss_of(model, batch, forward(model, batch, pooled_NFKD))
        for parameter in parameters:
            parameter.grad.zero_()
        loss.backward()
        average_gradients(parameters, options.processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in both:
            optimiser.step()
        step += 1
        recent.append(parts)
        if not steps and step == 150:  # speed is known: fix the number of steps for all processes
            speed = torch.tensor([step / (time.time() - begun)])
            if options.processes > 1:
                dist.broadcast(speed, 0)
            steps = int(speed.item() * options.minutes * 60)
            if rank == 0:
                print(f"{speed.item():.2f} steps/s: {steps} steps (repeat with --steps {steps})", flush=True)
        if rank == 0 and step % options.every == 0:
            mean = {
                key: sum(p[key] for p in recent if key in p) / max(1, sum(key in p for p in recent))
                for key in recent[-1]
            }
            recent.clear()
            line = {
                "step": step,
                "of": steps,
                "seconds": round(time.time() - started),
                "train_seconds": round(time.time() - begun),
                "rate": factor,
            }
            line |= {
                k: round(v, 4)
                for k, v in (mean | measure(model, pooled_NFKD, facts, trainable, min(100, options.held_out))).items()
            }
            print(json.dumps(line), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            save(model, options.out / "latest")
    return steps


def work(rank: int, options: Options) -> None:
    """One process of the data-parallel run."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.processes > 1:
        store = f"file://{options.out.resolve()}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.processes)
    started = time.time()
    count = options.videos + options.held_out
    if rank == 0:
        make_videos(count, options.processes, options.cache)
        print(f"{count} videos after {time.time() - started:.0f} s", flush=True)
    if options.processes > 1:
        dist.barrier()
    videos = make_videos(count, 1, options.cache)
    model = build_model(options.seed)
    train_tower(model, videos, options, rank)
    model.eval()  # nothing here has dropout; the same arithmetic as in use
    half = [len(videos.facts) * r // options.processes for r in range(options.processes + 1)]
    mine = pooled_features(model, videos.frames_NFHWC[half[rank] : half[rank + 1]])
    pooled = torch.empty((count, *mine.shape[1:]), dtype=torch.bfloat16)
    for r in range(options.processes):
        part = pooled[half[r] : half[r + 1]]
        if r == rank:
            part.copy_(mine)
        if options.processes > 1:
            as_float = part.float()
            dist.broadcast(as_float, r)
            part.copy_(as_float)
    if rank == 0:
        print(f"features after {time.time() - started:.0f} s", flush=True)
    use_bf16_products(model)
    begun = time.time()
    steps = train_language(model, pooled, videos.facts, options, rank, options.out / "log.jsonl", started)
    if rank == 0:
        save(model, options.out)
        made = {
            "parameters": sum(p.numel() for p in model.parameters()),
            **{
                key: value
                for key, value in options._asdict().items()
                if key not in ("out", "cache", "minutes", "every")
            },
            "steps": steps,
            "columns": SHEET,
            "pairs_from": PAIRS_FROM,
            "seconds": round(time.time() - started),
            "train_seconds": round(time.time() - begun),
            "hardware": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}",
            "command": f"python -m lab.embedded_base.pretrain --out DIR --steps {steps}"
            + (" --weak-video" if options.weak else ""),
        }
        write_card(options.out, made, options.card_videos)
        print(f"done after {time.time() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=35.0, help="of language training, if --steps is not given")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--videos", type=int, default=8000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--card-videos", type=int, default=400)
    parser.add_argument(
        "--cache", type=Path, default=None, help="decoded videos, kept for the next run (default: OUT/videos)"
    )
    parser.add_argument("--weak-video", dest="weak", action="store_true")
    options = Options(**vars(parser.parse_args()))
    options = options._replace(cache=options.cache or options.out / "videos")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rendezvous").unlink(missing_ok=True)
    if options.processes == 1:
        work(0, options)
    else:
        mp.spawn(work, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
