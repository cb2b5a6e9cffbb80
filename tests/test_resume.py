"""Killed with SIGKILL in every stage, at random points, and run again: the run ends as if nothing had happened.

The killed runs are forks of one process that has imported everything, so that a start costs a fraction of a second. A
kill comes some random number of changes to the run folder after its stage began, and a random moment later.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import small_recipe
from rlaif_lite import pipeline
from rlaif_lite.files import read_jsonl
from rlaif_lite.recipe import dump_yaml

STAGES = ["data", "features", "sft", "context", "preference", "reward", "ppo", "evaluate"]
KILLS = [*STAGES, "ppo"]  # where to kill: once in each stage, and again in PPO (many more: `python -m tests.campaigns`)

# Forks a child that runs the recipe for every line on its standard input, and prints the child's id, then its exit
# status.
SERVER = """
import gc, os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from rlaif_lite import pipeline
from rlaif_lite.model.base import load_base
from rlaif_lite.recipe import load_recipe
recipe = load_recipe(sys.argv[1])
load_base(recipe.model, torch.device("cpu"))  # what is imported on the way is then there in every fork
gc.freeze()
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            pipeline.run(recipe)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def snapshot(folder: Path) -> int:
    """Changes whenever a file of the run appears, goes or grows."""
    found = []
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                stat = os.stat(os.path.join(root, name))
            except FileNotFoundError:
                continue
            found.append((root, name, stat.st_size, stat.st_mtime_ns))
    return hash(tuple(sorted(found)))


class Runner:
    """Starts runs of one recipe and kills them."""

    def __init__(self, recipe, path: Path):
        self.folder = Path(recipe.output)
        path.write_text(dump_yaml(recipe))
        self.errors = open(path.with_suffix(".log"), "w+")  # noqa: SIM115  the server writes it until it is killed
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def start(self) -> int:
        self.server.stdin.write("go\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def result(self) -> int:
        return int(self.server.stdout.readline())

    def kill_in(self, stage: str, rng: random.Random) -> bool:
        """Start a run and kill it in `stage`; whether it was indeed killed there, neither before nor after."""
        pid = self.start()
        stop = time.monotonic() + 120
        begun, done = self.folder / stage / "begun.json", self.folder / stage / "done.json"
        while not begun.exists() or (stage == "data" and not (self.folder / "data" / "videos").exists()):
            if time.monotonic() > stop:
                raise AssertionError(f"{stage} was not reached: {self.said()}")
            time.sleep(0.001)
        changes, last = rng.randint(0, 8), snapshot(self.folder)
        while changes and not done.exists() and time.monotonic() < stop:
            time.sleep(0.001)
            if (now := snapshot(self.folder)) != last:
                changes, last = changes - 1, now
        time.sleep(rng.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        assert self.result() == -signal.SIGKILL, self.said()
        return begun.exists() and not done.exists()

    def finish(self) -> None:
        self.start()
        assert self.result() == 0, self.said()

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-3000:]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.errors.close()


def metrics(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key != "time"} for line in read_jsonl(folder / "metrics.jsonl")
    ]


def test_a_run_killed_in_every_stage_ends_the_same(finished, checkpoint, tmp_path):
    seed = int(os.environ.get("RESUME_SEED", "0"))
    rng = random.Random(seed)
    recipe = small_recipe(checkpoint, tmp_path)
    runner = Runner(recipe, tmp_path / "resume.yaml")
    try:
        hit = {stage for stage in sorted(KILLS, key=STAGES.index) if runner.kill_in(stage, rng)}
        runner.finish()
    finally:
        runner.close()
    assert len(hit) >= 5, f"the kills came too late to test much: {hit}"

    want, got = Path(finished.output), Path(recipe.output)
    files = sorted(path.relative_to(want) for path in (want / "adapters").rglob("*.safetensors"))
    assert (
        files == sorted(path.relative_to(got) for path in (got / "adapters").rglob("*.safetensors")) and len(files) == 7
    )
    for file in files:
        assert (want / file).read_bytes() == (got / file).read_bytes(), (file, hit)
    assert metrics(want) == metrics(got)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (want, got)]
    for block in (
        "evaluation",
        "evaluation_intervals",
        "preference",
        "reward",
        "ppo",
        "features",
        "recipe_hash",
        "finished",
    ):
        assert summaries[0][block] == summaries[1][block], block
    for file in sorted((want / "evaluate").glob("*.jsonl")) + [
        want / "preference" / "answers.jsonl",
        want / "context" / "captions.jsonl",
    ]:
        other = got / file.relative_to(want)
        assert file.read_text().replace(str(want), "") == other.read_text().replace(str(got), ""), file
    left = [p for p in got.rglob("*") if p.name.endswith((".tmp", ".old", ".part")) or p.name == "checkpoint"]
    assert not left


def test_killed_between_the_mark_and_the_checkpoint(rerun, monkeypatch):
    """The stage is done but its checkpoint was not removed: the next start removes it."""
    recipe = rerun("reward.steps=2")
    write_sealed, checkpoint = pipeline.write_sealed, Path(recipe.output) / "reward" / "checkpoint"

    def dying(path, value):
        write_sealed(path, value)
        if path == checkpoint.with_name("done.json"):
            raise SystemExit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_sealed", dying)
        with pytest.raises(SystemExit):
            pipeline.run(recipe, until="reward")
    assert list(checkpoint.rglob("*.safetensors"))
    pipeline.run(recipe, until="reward")
    assert not checkpoint.exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_killed_between_the_adapter_and_the_mark(rerun, stage, monkeypatch):
    """The stage is over but its `done.json` was not written: it goes on from its last checkpoint, and nothing
    changes."""
    recipe = rerun()
    folder = Path(recipe.output)
    shutil.rmtree(folder / stage)
    write_sealed = pipeline.write_sealed

    def dying(path, value):
        if path == folder / stage / "done.json":
            raise SystemExit("killed")
        write_sealed(path, value)

    monkeypatch.setattr(pipeline, "write_sealed", dying)
    before = {path: path.read_bytes() for path in (folder / "adapters").rglob("*.safetensors")}
    lines = metrics(folder)
    with pytest.raises(SystemExit):
        pipeline.run(recipe, until=stage)
    monkeypatch.undo()
    steps = []
    backward = __import__("torch").Tensor.backward
    monkeypatch.setattr("torch.Tensor.backward", lambda *a, **k: steps.append(1) or backward(*a, **k))
    pipeline.run(recipe, until=stage)
    assert steps == []  # not a single step is done again
    assert all(path.read_bytes() == data for path, data in before.items())
    by_place = lambda line: (line["stage"], line["step"])  # noqa: E731
    assert sorted(metrics(folder), key=by_place) == sorted(lines, key=by_place)
