"""Tokens per second of our rollouts beside transformers' `generate`: same 4-bit base, LoRA and prompts, same run.

    python -m lab.bench.rollout [--out docs/results/rollout] [--base FOLDER --adapter FOLDER --device cuda ...]

Run by hand, not collected by pytest. Every way of sampling is timed in turn, round after round, and the medians are
compared. On a CPU one thread is used and its CPU seconds are counted, which other programs disturb little; on a GPU it
is the wall clock. Without `--base` the model is the embedded one's architecture with random weights: it costs the same
per token, and its answers are as long as a trained policy's, while the embedded one says little to made-up videos.
`--out` writes OUT.md and OUT.json, with hardware, versions and commit.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from lab import commit
from lab.bench import ROOT
from lab.bench.plain_ppo import clock, left
from lab.embedded_base import architecture
from rlaif_lite.data.records import Message
from rlaif_lite.formats import markdown_table
from rlaif_lite.model.base import Base, load_base
from rlaif_lite.model.inputs import Sequence, collate, encode_prompt
from rlaif_lite.model.roles import ActiveRole, Roles
from rlaif_lite.recipe import Lora, Model
from rlaif_lite.rollout import Sampling, sample, slot_bytes, slot_length
from rlaif_lite.training.meter import describe_machine

sys.path.insert(0, str(ROOT / "tests"))

from core import shake, video_of

QUESTIONS = ("describe the video", "what is the colour first ?", "what is true ?", "how many shape then ?")


def demo_base(folder: str, device: torch.device) -> Base:
    """The embedded base's architecture with random weights, large enough for a token to depend on those before it."""
    model = architecture.build_model(seed=0)
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(10)
    architecture.save(model, folder)
    return load_base(Model(base=folder, quantization="nf4"), device, tower=False)


def made_up_prompts(base: Base, count: int, video_tokens: int) -> list[Sequence]:
    """Videos of random features, of three lengths, with questions of different lengths."""
    tokens = [video_tokens // 4 * 4, video_tokens * 3 // 16 * 4, video_tokens // 8 * 4]
    return [
        encode_prompt(base, [Message("user", f"<video> {QUESTIONS[i % 4]}")], video_of(base, tokens[i % 3], seed=i))
        for i in range(count)
    ]


def generate(base: Base, prompts: list[Sequence], sampling: Sampling, per_prompt: int) -> list[list[int]]:
    """transformers' own loop on the same embeddings and positions, padded on the left as it wants them."""
    out = base.model.generate(
        inputs_embeds=left([collate(base, [p]).embed(base)[0] for p in prompts]),
        attention_mask=left([torch.ones(len(p.ids_S), dtype=torch.long) for p in prompts]).to(base.device),
        position_ids=left([p.position_CS[0] for p in prompts]).to(base.device),
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        num_return_sequences=per_prompt,
        max_new_tokens=sampling.max_new_tokens,
        suppress_tokens=base.ban_bias_V.nonzero()[:, 0].tolist(),
        pad_token_id=base.tokenizer.pad_token_id,
        eos_token_id=base.eos_id,
    ).tolist()
    return [row[: row.index(base.eos_id) + 1] if base.eos_id in row else row for row in out]


def ways(
    role: ActiveRole, prompts: list[Sequence], sampling: Sampling, per_prompt: int, slots: int
) -> dict[str, Callable]:
    """Name -> (seed -> answers as ids). All of them compute with the role's adapter."""
    count = len(prompts) * per_prompt

    def ours(seed: int, **options: bool) -> list[list[int]]:
        seeds = range(seed * count, (seed + 1) * count)
        found = sample(role, prompts, sampling, seeds=seeds, per_prompt=per_prompt, batch_size=slots, **options)
        return [t.ids for t in found]

    def theirs(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        step = max(1, slots // per_prompt)
        return [
            row
            for i in range(0, len(prompts), step)
            for row in generate(role.roles.base, prompts[i : i + step], sampling, per_prompt)
        ]

    found = {
        "transformers generate": theirs,
        "slots, 4-bit + LoRA, eager": lambda seed: ours(seed, dense=False, graph=False),
        "slots, dense copy, eager": lambda seed: ours(seed, dense=True, graph=False),
    }
    if role.roles.base.device.type == "cuda":
        found |= {
            "slots, 4-bit + LoRA, CUDA graph": lambda seed: ours(seed, dense=False, graph=True),
            "slots, dense copy, CUDA graph": lambda seed: ours(seed, dense=True, graph=True),
        }
    return found


@torch.no_grad()
def measure(run: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """One round of each way after the other, after a warm-up. Tokens are those of the answers, with EOS."""
    rates: dict[str, list[float]] = {name: [] for name in run}
    tokens: dict[str, list[int]] = {name: [] for name in run}
    for turn in range(-1, rounds):
        for name, call in run.items():
            start = clock(device)
            answers = call(turn + 1)
            seconds = clock(device) - start
            if turn >= 0:
                tokens[name].append(sum(map(len, answers)))
                rates[name].append(tokens[name][-1] / seconds)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {
        name: {
            "tokens_per_second": middle[name],
            "times_generate": middle[name] / middle["transformers generate"],
            "spread": (max(rates[name]) - min(rates[name])) / middle[name],
            "mean_tokens": statistics.mean(tokens[name]),
        }
        for name in run
    }


def sequences_in_memory(base: Base, text: int, new: int, before: int, after: int) -> float:
    """How many more sequences the same memory holds, when a video has `after` tokens instead of `before`."""
    config = base.decoder.config
    full, pruned = (slot_bytes(config, slot_length(video + text, new), base.dtype) for video in (before, after))
    return full / pruned


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--base", help="a checkpoint; left out: the embedded one's architecture with random weights")
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--adapter", type=Path, help="folder of a PEFT adapter; left out: a random one")
    ask.add_argument("--prompts", type=int, default=96)
    ask.add_argument("--slots", type=int, default=96, help="answers in flight, and the batch size of generate")
    ask.add_argument("--video-tokens", type=int, default=24)
    ask.add_argument("--new-tokens", type=int, default=40)
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--out", type=Path, help="path without its ending")
    args = ask.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if args.base:
        base = load_base(Model(base=args.base, quantization="nf4"), device, tower=False)
    else:
        with tempfile.TemporaryDirectory() as folder:
            base = demo_base(folder, device)
    roles = Roles(base, Lora(rank=16, alpha=32.0))
    if args.adapter:
        roles.load("policy", args.adapter)
    else:
        roles.add("policy")
        shake(roles, "policy", size=0.01)
    sampling = Sampling(args.new_tokens)
    prompts = made_up_prompts(base, args.prompts, args.video_tokens)
    settings = {
        "all at once": (prompts, 1, args.slots),
        "a queue of 4 batches": (prompts, 1, args.slots // 4),
        "4 answers per prompt": (prompts[: args.prompts // 4], 4, args.slots),
    }
    table = {}
    with roles.use("policy") as role:
        for name, (given, per_prompt, slots) in settings.items():
            table[name] = measure(ways(role, given, sampling, per_prompt, slots), device, args.rounds)
    facts = {
        "hardware": describe_machine()["device" if device.type == "cuda" else "cpu"],
        "clock": "wall" if device.type == "cuda" else "CPU seconds of one thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "sequences_in_memory": sequences_in_memory(base, text=128, new=256, before=626, after=157),
        "settings": table,
    }
    print(page(facts))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(page(facts))


def page(facts: dict) -> str:
    """The figures as Markdown."""
    given = facts["arguments"]
    lines = [
        "# Rollouts against transformers' `generate`",
        "",
        f"{facts['hardware']}, {facts['clock']}, torch {facts['versions']['torch']}, transformers "
        f"{facts['versions']['transformers']}, commit {facts['commit']}. Medians of {given['rounds']} interleaved "
        "rounds; nf4 base and LoRA of rank 16 in every row.",
        f"{given['prompts']} answers of at most {given['new_tokens']} tokens to prompts of three video lengths (up to "
        f"{given['video_tokens']} tokens), {given['slots']} in flight (a quarter of it in the queue). Written by "
        "`lab/bench/rollout.py`.",
    ]
    for name, rows in facts["settings"].items():
        head = (name, "tokens/s", "x generate", "spread", "tokens per round")
        forms = {"tokens_per_second": ".0f", "times_generate": ".2f", "spread": ".0%", "mean_tokens": ".0f"}
        cells = [(way, *(format(row[key], form) for key, form in forms.items())) for way, row in rows.items()]
        lines += ["", markdown_table(head, cells)]
    more = facts["sequences_in_memory"]
    lines += [
        "",
        "Sequences in the same memory, video pruned from 626 to 157 tokens (+ 128 of prompt + 256 of "
        f"answer): {more:.2f} x.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
