"""What each technique is worth: one PPO step with one of them switched off at a time -> peak memory and tokens/s.

    python -m lab.bench.techniques RECIPE [KEY=VALUE ...] [--random-weights] [--small] [--only NAME ...] [--out F]

Every line is the project's own step (`plain_ppo.ours`) with a recipe key changed or one function replaced by what
stands there without the technique. Answers to the same prompt come in groups of four, so that a shared prefill shows.
Each line is a process of its own. Peak memory is that of the step less what the process held before the base was
loaded; on a CPU the seconds are those that the process computed for. Writes F.md and F.json, docs/results/techniques by
default; on a CPU the page says so.
"""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from lab import commit
from lab.bench import ROOT, plain_ppo
from lab.bench.plain_ppo import Step
from rlaif_kernels import LinearLogprob
from rlaif_lite import profiler
from rlaif_lite.formats import markdown_table
from rlaif_lite.model import roles
from rlaif_lite.model.inputs import decode
from rlaif_lite.recipe import Recipe, load_recipe
from rlaif_lite.rollout import loop, sample
from rlaif_lite.stages import features
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.training.meter import Meter, describe_machine, peak_bytes, settle, versions
from rlaif_lite.workspace import WHOLE, pick_device

Without = Callable[[Step], contextlib.AbstractContextManager]


class Technique(NamedTuple):
    name: str
    instead: str  # what stands there without it
    keys: tuple[str, ...] = ()  # of the recipe
    without: Without | None = None  # a replaced function
    on_gpu: bool = False  # there is nothing to switch off on a CPU


@contextlib.contextmanager
def tower_in_every_forward(given: Step) -> Iterator[None]:
    frames = next(iter(given.frames.values()))
    chain = [step.model_dump() for step in given.work.recipe.features.prune]

    def with_tower(base, batch, cache=None):
        if batch.features:
            features.encode(base, {f"{WHOLE}{i}": frames for i in range(len(batch.features))}, chain)
        return decode(base, batch, cache)

    with patch.object(roles, "decode", with_tower), patch.object(loop, "decode", with_tower):
        yield


@contextlib.contextmanager
def whole_logits(given: Step) -> Iterator[None]:
    """Logits of every position of a scoring forward, kept for autograd, and the loss from those of the answers."""
    section = given.work.recipe.ppo
    last: list[Tensor] = []  # logp_NV of the forward that ran last

    def hidden(role, micro):
        base, rows = role.roles.base, micro.policy
        hidden_bSD = role.hidden(rows.batch)
        logits_bSV = linear(hidden_bSD, base.head_weight_VD).float() + base.ban_bias_V
        last[:] = [(logits_bSV / section.temperature).log_softmax(-1).flatten(0, 1)[rows.before_N]]
        return hidden_bSD.flatten(0, 1)[rows.before_N]

    def logp(base, hidden_ND, micro, temperature, reference_hidden_ND=None, differentiable="logp"):
        (logp_NV,) = last
        entropy_N = -(logp_NV.exp() * logp_NV).sum(1).detach()
        return LinearLogprob(
            logp_NV.gather(1, micro.policy.token_N[:, None])[:, 0], torch.zeros_like(entropy_N), entropy_N, None
        )

    with patch.object(ppo, "answer_hidden", hidden), patch.object(ppo, "answer_logp", logp):
        yield


@contextlib.contextmanager
def one_prefill_an_answer(given: Step) -> Iterator[None]:
    def apart(role, prompts, sampling, *, seeds, per_prompt, batch_size):
        prompts = [p for p in prompts for _ in range(per_prompt)]
        return sample(role, prompts, sampling, seeds=seeds, batch_size=batch_size)

    with patch.object(loop, "sample", apart):
        yield


@contextlib.contextmanager
def one_prompt_an_answer(given: Step) -> Iterator[None]:
    with plain_ppo.rows_apart():
        yield


@contextlib.contextmanager
def eager_decode(given: Step) -> Iterator[None]:
    def eager(*arguments, **more):
        return sample(*arguments, graph=False, **more)

    with patch.object(loop, "sample", eager):
        yield


TECHNIQUES = (
    Technique("all of them", ""),
    Technique("shared base", "the reward role on a base of its own", ("model.reward_base={base: BASE}",)),
    Technique("4-bit base", "its weights in full", ("model.quantization=none",)),
    Technique("cached features", "the tower in every forward", without=tower_in_every_forward),
    Technique("pruned tokens", "every token of the tower", ("features.prune=[]",)),
    Technique("logits-free loss", "logits of every position, kept for autograd", without=whole_logits),
    Technique("checkpointing", "all activations kept", ("model.gradient_checkpointing=false",)),
    Technique("shared prefill", "a prefill for every answer", without=one_prefill_an_answer),
    Technique("shared prompts", "a row for every answer in score and update", without=one_prompt_an_answer),
    Technique("graph decode", "launched kernel by kernel", without=eager_decode, on_gpu=True),
)


def switched_off(technique: Technique, given: Step) -> contextlib.AbstractContextManager:
    return technique.without(given) if technique.without else contextlib.nullcontext()


def on_gpu(recipe: Recipe) -> bool:
    return pick_device(recipe.device) == "cuda"


def measured(recipe: Recipe, name: str, random: profiler.Random | None, rounds: int) -> dict:
    """The line of one technique, or why there is none: that it does not fit without it is a finding."""
    technique = next(each for each in TECHNIQUES if each.name == name)
    if technique.on_gpu and not on_gpu(recipe):
        return {"why": "needs a GPU"}
    try:
        return measure(recipe, technique, random, rounds)
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}


def measure(recipe: Recipe, technique: Technique, random: profiler.Random | None, rounds: int) -> dict:
    """Peak memory, and tokens of answers per second of whole steps, after one to warm up."""
    device = torch.device("cuda" if on_gpu(recipe) else "cpu")
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    settle(device)
    before = peak_bytes(device)
    with profiler.opened(recipe, 1, None, random) as (work, _):
        given = plain_ppo.prepare(work)
        keeps_tower = technique.without is tower_in_every_forward
        if not keeps_tower:
            work.base().drop_tower()
        with switched_off(technique, given):
            plain_ppo.ours(given, 0)
            with Meter(device) as meter:
                began = plain_ppo.clock(device)
                tokens = sum(plain_ppo.ours(given, number) for number in range(1, rounds + 1))
                seconds = plain_ppo.clock(device) - began
    return {
        "peak_memory_bytes": meter.peak_memory_bytes - before,
        "tokens_per_second": tokens / seconds,
        "seconds_a_step": seconds / rounds,
    }


def as_markdown(result: dict) -> str:
    full = result["techniques"].get("all of them", {})  # what the ratios are to
    where = result["machine"]["device"]
    lines = [
        "# What each technique is worth",
        "",
        f"`{result['recipe']}`, PPO step, one technique off at a time. "
        f"Device: {where}. Commit {result['commit']}. Written by `{result['command']}`.",
    ]
    if where == "cpu":
        made = "a base of two narrow layers" if result["small"] else "a small base"
        lines += [
            "",
            f"**CPU figures of {made}: they are no forecast of a GPU's.** There is no graph to decode with on "
            "a CPU, rollouts run on a dense copy of the weights, and the peak is the process's.",
        ]
    rows = []
    for name, found in result["techniques"].items():
        if "why" in found:
            rows.append((name, found["instead"], found["why"], "", "", ""))
            continue
        cells = []
        for key, unit in (("peak_memory_bytes", 2**20), ("tokens_per_second", 1)):
            cells += [f"{found[key] / unit:.1f}", f"{found[key] / full[key]:.2f}" if key in full else ""]
        rows.append(("none" if found is full else name, found["instead"], *cells))
    columns = ("switched off", "instead", "peak, MiB", "ratio", "answer tokens/s", "ratio")
    return "\n".join([*lines, "", markdown_table(columns, rows)]) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("recipe")
    ask.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    ask.add_argument("--random-weights", action="store_true")
    ask.add_argument("--small", action="store_true")
    ask.add_argument("--only", nargs="*", default=[technique.name for technique in TECHNIQUES])
    ask.add_argument("--rounds", type=int, default=1)
    ask.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "techniques")
    options = ask.parse_args(arguments)
    random = profiler.Random(options.small) if options.random_weights else None
    groups = ["ppo.group_size=4", "model.gradient_checkpointing=true"]
    result: dict = {"schema": 1, "small": options.small, "machine": describe_machine(), "versions": versions()}
    given = sys.argv[1:] if arguments is None else arguments
    result |= {"commit": commit(), "techniques": {}}
    result["command"] = f"python -m lab.bench.techniques {shlex.join(given)}"
    for technique in (each for each in TECHNIQUES if each.name in options.only):
        base = load_recipe(options.recipe).model.base
        keys = [key.replace("BASE", base) for key in technique.keys]
        recipe = load_recipe(options.recipe, [*groups, *options.overrides, *keys])
        result["recipe"] = recipe.name
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            found = alone.submit(measured, recipe, technique.name, random, options.rounds).result()
        result["techniques"][technique.name] = found | {"instead": technique.instead}
        print(technique.name, found, flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(as_markdown(result))
    return result


if __name__ == "__main__":
    main()
