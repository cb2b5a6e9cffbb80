"""`make gpu`: what only a GPU can show, in one command, within fifteen minutes, without a network.

What says most comes first: the invariants of PPO's first step, with and without cuDNN's attention; the tests marked
`gpu`, the kernels' exactness among them; a short bench of the kernels; PPO of three shipped recipes on random weights,
with the CUDA allocator capped at 24 GB and all four roles live, next to what a dry run predicts; and one PPO step next
to a plain implementation of it. Each part is a process with a time limit of its own. One that lacks a package, fails or
takes too long is named, and the rest continues. Writes docs/results/gpu.json and gpu.md. Without a GPU it rehearses:
the same parts on the CPU with bases of two narrow layers, into ./gpu_rehearsal; those figures mean nothing.

    python -m lab.bench.gpu --predict h200     # writes docs/results/gpu_predicted.json, by dry runs
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lab import commit
from lab.bench import ROOT
from rlaif_lite.formats import markdown_table

PREDICTED = ROOT / "docs" / "results" / "gpu_predicted.json"

SECONDS = 880.0  # for all parts together
CAP = "24GB"
MODEL = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "av", "triton")
# The published layout (50 temporal + 576 spatial tokens), and one round of answers in flight in each step.
LLAVA = (
    "features.frames=50",
    "features.prune=[{st_mean: true}]",
    "ppo.rollouts=12",
    "ppo.minibatch=12",
    "ppo.epochs=1",
)
# The recipes take what the card has. These sizes take the least that the bounds below were set for.
FRUGAL = ("model.gradient_checkpointing=true", "ppo.slots=12", "ppo.micro_batch=2")
SMALL = (
    "device=cpu",
    "threads=1",
    "ppo.rollouts=4",
    "ppo.minibatch=4",
    "ppo.micro_batch=2",
    "ppo.max_new_tokens=6",
    "ppo.epochs=1",
    "features.frames=4",
    "features.clip_frames=2",
    "preference.batch_size=4",
    "context.batch_size=2",
)


class Part(NamedTuple):
    name: str
    needs: tuple[str, ...]  # packages
    limit: float  # seconds
    command: Callable[[Path], list[str]]  # the file for its figures -> what is run


class Target(NamedTuple):
    part: str
    what: str
    bound: float
    value: Callable[[dict], float]  # of the part's figures
    at_most: bool


def ppo_gb(figures: dict) -> float:
    return figures["stages"]["ppo"]["peak_memory_bytes"] / 1e9


def gap(name: str) -> Callable[[dict], float]:
    return lambda figures: max(figures[name].values())


TARGETS = (
    Target("step 0", "largest |KL| and |ratio - 1|", 0, gap("without cuDNN"), True),
    Target("step 0", "the same with cuDNN's attention", 0, gap("with cuDNN"), True),
    Target("ppo vlm_rlaif_7b_24gb", "peak of PPO, GB", 20, ppo_gb, True),
    Target("ppo qwen2_5_vl_7b_24gb", "peak of PPO, GB", 16, ppo_gb, True),
    Target("ppo qwen2_5_vl_3b_24gb", "peak of PPO, GB", 10, ppo_gb, True),
    Target("ppo vlm_rlaif_7b_rm13b_48gb", "peak of PPO, GB", 40, ppo_gb, True),
    Target("plain step", "times faster than plain", 3, lambda figures: figures["times_faster"], False),
)


KEYS = {
    "vlm_rlaif_7b_24gb": (*FRUGAL, *LLAVA),
    "qwen2_5_vl_3b_24gb": (*FRUGAL, "ppo.epochs=1"),
    "qwen2_5_vl_7b_24gb": (*FRUGAL, "ppo.epochs=1"),
    "vlm_rlaif_7b_rm13b_48gb": (*FRUGAL, *LLAVA),
}


def parts(rehearsal: bool) -> list[Part]:
    def bounds(cap: str) -> list[str]:
        return ["--random-weights", *(["--small"] if rehearsal else ["--memory-cap", cap])]

    def profiled(recipe: str, cap: str = CAP) -> Part:
        keys = SMALL if rehearsal else KEYS[recipe]
        command = lambda out: [
            "-m",
            "rlaif_lite.cli",
            "profile",
            f"recipes/{recipe}.yaml",
            *keys,
            *bounds(cap),
            "--steps",
            "1",
            "--stage",
            "features",
            "--stage",
            "ppo",
            "--json",
            str(out),
        ]
        return Part(f"ppo {recipe}", MODEL, 120, command)

    def stepped(name: str, module: str, limit: float, *more: str) -> Part:
        keys = SMALL if rehearsal else KEYS["vlm_rlaif_7b_24gb"]
        head = ["-m", f"lab.bench.{module}", "recipes/vlm_rlaif_7b_24gb.yaml", *keys, *bounds(CAP), *more, "--out"]
        return Part(name, MODEL, limit, lambda out: [*head, str(out)])

    bench = ["--rounds", "1"] if rehearsal else ["--rounds", "10", "--shapes", "8192x3584x152064"]
    collect = ["--collect-only"] if rehearsal else []
    return [
        stepped("step 0", "step_zero", 120),
        Part("tests", ("torch", "pytest"), 120, lambda out: ["-m", "pytest", "-q", "-m", "gpu", *collect, "tests"]),
        Part(
            "kernels", ("torch", "triton"), 90, lambda out: ["kernels/bench/run.py", *bench, "--out", str(out.parent)]
        ),
        profiled("vlm_rlaif_7b_24gb"),
        profiled("qwen2_5_vl_3b_24gb"),
        profiled("qwen2_5_vl_7b_24gb"),
        stepped("plain step", "plain_ppo", 150, "--rounds", "1"),
        profiled("vlm_rlaif_7b_rm13b_48gb", cap="40GB"),
    ]


def predict(card: str) -> None:
    """Dry runs of the profiled parts, with their keys, at two small depths."""
    from lab.dry_run import DEPTHS, layers_of, of_depth, profile

    found = {}
    for recipe, keys in KEYS.items():
        runs, depth = [profile(recipe, card, layers, keys, ["features", "ppo"]) for layers in DEPTHS], layers_of(recipe)
        found[recipe] = {
            stage: {
                name: {
                    key: of_depth(depth, *(run["stages"][stage]["phases"][name][key] for run in runs))
                    for key in ("peak_memory_bytes", "seconds")
                }
                for name in runs[0]["stages"][stage]["phases"]
            }
            for stage in ("features", "ppo")
        }
        PREDICTED.write_text(json.dumps({"card": card, "recipes": found}, indent=1) + "\n", encoding="utf-8")


def run(part: Part, folder: Path, left: float) -> dict:
    """One part in a process of its own -> status, seconds, and its figures or why there are none."""
    if missing := [name for name in part.needs if find_spec(name) is None]:
        return {"status": "skipped", "seconds": 0.0, "why": f"needs the package {', '.join(missing)}"}
    if left < 20:
        return {"status": "skipped", "seconds": 0.0, "why": "no time was left"}
    out = folder / f"{part.name.replace(' ', '_')}.json"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    limit, began = min(part.limit, left), time.monotonic()
    with open(folder / "log", "w+b") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command(out)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    found = {"seconds": time.monotonic() - began, "said": said[-3:]}
    if code != 0:
        why = f"stopped after {limit:.0f} s" if code is None else f"exit code {code}"
        return found | {"status": "failed", "why": f"{why}: {' / '.join(said[-3:])[-500:]}"}
    figures = json.loads(out.read_text()) if out.exists() else None
    return found | {"status": "ok", "figures": figures}


def as_markdown(result: dict) -> str:
    lines = ["# GPU proof", "", "Written by `make gpu`."]
    if result["rehearsal"]:
        lines += ["", "**A rehearsal on a CPU with bases of two narrow layers: no figure below means anything.**"]
    lines += [
        "",
        f"Commit {result['commit']}, {result['machine'].get('device', 'unknown')}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + ".",
    ]
    rows = []
    for part, what, bound, value, at_most in TARGETS:
        figures = result["parts"][part].get("figures")
        got = "not measured" if figures is None else f"{value(figures):.2f}" if bound else f"{value(figures):.2g}"
        rows.append((f"{part}: {what}", f"{'at most' if at_most else 'at least'} {bound}", got))
    lines += ["", markdown_table(("target", "wanted", "measured"), rows)]
    rows = [
        (name, found["status"], f"{found['seconds']:.0f}", found.get("why", "").replace("\n", " "))
        for name, found in result["parts"].items()
    ]
    lines += ["", markdown_table(("part", "status", "seconds", ""), rows)]
    expected = json.loads(PREDICTED.read_text(encoding="utf-8")) if PREDICTED.exists() else {"card": "", "recipes": {}}
    head = ("recipe", "stage", "peak, GB", "planned, GB", "dry, GB")
    head += ("phase", "ms a step", "dry, ms", "tokens/s", "of matmul")
    rows = []
    for name, found in result["parts"].items():
        stages = (found.get("figures") or {}).get("stages", {}) if name.startswith("ppo ") else {}
        for stage, cost in stages.items():
            dry = {} if result["rehearsal"] else expected["recipes"].get(name[4:], {}).get(stage, {})
            peak, planned = cost["peak_memory_bytes"] / 1e9, cost["planned_memory_bytes"] / 1e9
            most = f"{max(phase['peak_memory_bytes'] for phase in dry.values()) / 1e9:.2f}" if dry else ""
            first = (name[4:], stage, f"{peak:.2f}", f"{planned:.2f}", most)
            for phase, spent in cost["phases"].items():
                rate = "" if spent["per_second"] is None else f"{spent['per_second']:.0f}"
                share = "" if spent["of_matmul"] is None else f"{spent['of_matmul']:.1%}"
                taken = 1e3 * spent["seconds"] / max(1, cost["steps"])
                roofline = f"{1e3 * dry[phase]['seconds']:.1f}" if phase in dry else ""
                rows.append((*first, phase, f"{taken:.1f}", roofline, rate, share))
                first = ("",) * len(first)
    lines += ["", f"`dry` is a dry run's prediction for {expected['card'] or 'no card: there is none'}.", ""]
    return "\n".join([*lines, markdown_table(head, rows)]) + "\n"


def describe() -> tuple[bool, dict, dict]:
    """(whether there is a GPU, the machine, the versions), where torch is there to say it."""
    if find_spec("torch") is None:
        return False, {}, {}
    import torch

    from rlaif_lite.training.meter import describe_machine, versions

    return torch.cuda.is_available(), describe_machine(), versions()


def main(only: list[Part] | None = None, out: Path | None = None, patience: float = 1.0) -> dict:
    """Run all parts (or `only` these), with `patience` times their limits; returns what gpu.json holds."""
    began = time.monotonic()
    on_gpu, machine, found_versions = describe()
    out = out or (ROOT / "docs" / "results" if on_gpu else Path("gpu_rehearsal"))
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "schema": 1,
        "rehearsal": not on_gpu,
        "commit": commit(),
        "machine": machine,
        "versions": found_versions,
        "parts": {},
    }
    chosen = parts(rehearsal=not on_gpu) if only is None else only
    result["parts"] = {target.part: {"status": "skipped", "seconds": 0.0, "why": "not run"} for target in TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            part = part._replace(limit=patience * part.limit)
            found = run(part, Path(folder), patience * SECONDS - (time.monotonic() - began))
            print(f"{part.name}: {found['status']} in {found['seconds']:.0f} s {found.get('why', '')}", flush=True)
            result["parts"][part.name] = found
            (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")  # so that a kill loses one part at most
            (out / "gpu.md").write_text(as_markdown(result))
    print(f"-> {out / 'gpu.md'}")
    return result


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--patience", type=float, default=1.0, help="times the limits, for a slow or busy machine")
    ask.add_argument("--only", nargs="*", help="names of parts, such as tests; all others are left out")
    ask.add_argument("--predict", metavar="CARD", help="dry runs of the recipes for this card, and nothing else")
    options = ask.parse_args()
    if options.predict:
        predict(options.predict)
        raise SystemExit
    wanted = [p for p in parts(not describe()[0]) if options.only is None or p.name in options.only]
    main(wanted, patience=options.patience)
