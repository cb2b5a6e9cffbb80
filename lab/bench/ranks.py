"""Two ranks against one process, of one thread each, stage by stage: run it alone on a machine with two cores or more.

    python -m lab.bench.ranks [--rounds 3] [--out docs/results/ranks] [--recipe recipes/tiny.yaml] [KEY=VALUE ...]

Every round runs the recipe once in each way: without a launcher on one core and on all, as one rank under torchrun, as
two ranks. The next round goes the other way round. A process of one thread has its videos decoded by others, so it
fills a second core where it may: one core for one rank is what two cores for two ranks double. The world's videos are
made once, before. The table has medians over the rounds: seconds of a stage, and of a step of PPO with its sampling.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from lab import commit
from rlaif_lite.files import read_json, read_jsonl
from rlaif_lite.training.meter import describe_machine, versions

ROOT = Path(__file__).resolve().parents[2]
ONE_CORE = "one core"
WAYS = {ONE_CORE: 0, "one process": 0, "one rank": 1, "two ranks": 2}  # ranks under torchrun; 0: without it
STAGES = ("features", "sft", "context", "preference", "reward", "ppo", "evaluate")
SHORT = [
    "data.world.sft=80",
    "data.world.preference=400",
    "data.world.rl=160",
    "data.world.test=300",
    "evaluate.temperatures=[]",
    "evaluate.batch_size=75",
    "sft.easy.steps=8",
    "sft.hard.steps=8",
    "sft.policy_init.steps=4",
    "reward.floor=0.0",
    "ppo.steps=5",
    "preference.compare_pairs=0",
]


def run_once(recipe: str, keys: list[str], folder: Path, way: str) -> dict[str, float]:
    """Seconds of each stage, and of a step of PPO (the median of all but the first)."""
    shutil.rmtree(folder, ignore_errors=True)
    count = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count else []
    command = [sys.executable, *launcher, "-m", "rlaif_lite", "run", recipe, *keys, f"output={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, usable[:1] if way == ONE_CORE else usable)  # the run inherits it
    try:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    finally:
        os.sched_setaffinity(0, usable)
    stages = read_json(folder / "summary.json")["stages"]
    found = {name: stages[name]["seconds"] for name in STAGES if name in stages}
    steps = [line["time"]["seconds"] for line in read_jsonl(folder / "metrics.jsonl") if line["stage"] == "ppo"]
    return found | ({"step of PPO": median(steps[1:])} if len(steps) > 1 else {})


def as_table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per stage."""
    lines = ["| | one core | one process | one rank, torchrun | two ranks | against one core | against one process |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in found["two ranks"]:
        core, one, alone, two = (found[way][name] for way in WAYS)
        lines.append(
            f"| {name} | {core:.2f} s | {one:.2f} s | {alone:.2f} s ({alone / one - 1:+.1%}) | {two:.2f} s "
            f"| {core / two:.2f} x | {one / two:.2f} x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipe", default="recipes/tiny.yaml")
    parser.add_argument("keys", nargs="*")
    given = parser.parse_args()
    every: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="rlaif-ranks-") as name:
        folder = Path(name)
        keys = [*SHORT, f"data.folder={folder / 'world'}", "device=cpu", "threads=1", *given.keys]
        made = [sys.executable, "-m", "rlaif_lite", "run", given.recipe, *keys, f"output={folder / 'made'}"]
        subprocess.run([*made, "--until", "data"], cwd=ROOT, check=True)
        for number in range(given.rounds):
            for way in list(WAYS) if number % 2 == 0 else reversed(WAYS):
                every[way].append(run_once(given.recipe, keys, folder / "run", way))
                print(f"round {number + 1}, {way}: {every[way][-1]}", file=sys.stderr, flush=True)
    found = {way: {stage: median(run[stage] for run in runs) for stage in runs[0]} for way, runs in every.items()}
    print(as_table(found))
    if given.out is not None:
        facts = {"command": " ".join(["python -m lab.bench.ranks", *sys.argv[1:]]), "commit": commit()}
        facts |= {"machine": describe_machine(), "versions": versions(), "keys": [*SHORT, *given.keys], "runs": every}
        given.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        head = f"# Two ranks against one process\n\n`{facts['command']}`, commit {commit()}, {given.rounds} rounds, "
        head += f"{facts['machine']['cores']} cores of {facts['machine']['cpu']}; medians.\n\n"
        given.out.with_suffix(".md").write_text(head + as_table(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
