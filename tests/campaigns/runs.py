"""Runs in processes forked from this one, so that a start is cheap, and the comparison of two run folders."""

import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from core import RECIPE
from rlaif_lite import pipeline
from rlaif_lite.errors import RlaifError
from rlaif_lite.files import remove
from rlaif_lite.recipe import Recipe, load_recipe
from rlaif_lite.training.loop import MetricsLog
from shrunk import shrunk

SHIPPED = Path(__file__).parents[2] / "recipes"
# Four methods that share few stages: PPO with a reward model, DPO from claims, groups of answers, marked interventions.
METHODS = ("ppo", "rlaif_v", "grpo", "rlif")
LONGER = {
    "rlaif_v": ("dpo.rounds=2", "dpo.steps=2", "sft.easy.steps=2"),
    "grpo": ("ppo.steps=3", "ppo.checkpoint_every=1"),
    "rlif": ("ppo.steps=3", "ppo.checkpoint_every=1"),
}
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")
REFUSED, BROKEN = 3, 4  # exit statuses: the run ended with a message; with another exception
COSTS = {"cost", "seconds", "sha256", "files", "status", "time", "stages", "metrics"}


def recipe_of(method: str, checkpoint: Path, folder: Path) -> Recipe:
    """A recipe that takes seconds; its run folder is `folder`/run."""
    folder.mkdir(parents=True, exist_ok=True)
    if method != "ppo":
        return shrunk(SHIPPED / f"tiny_{method}.yaml", folder, checkpoint, *LONGER[method])
    (folder / "ppo.yaml").write_text(yaml.safe_dump(RECIPE | {"health": "warn"}))
    return load_recipe(folder / "ppo.yaml", [f"model.base={checkpoint}", f"output={folder / 'run'}"])


class Ended(NamedTuple):
    """How a run ended."""

    status: int
    "0, REFUSED, BROKEN, or minus the signal"
    said: str
    "the exception's text"
    value: Any
    "what `inside` returned"


def start(recipe: Recipe, log: Path, inside: Callable[[], Callable[[], Any]] | None = None, **keys) -> int:
    """Fork a process that runs the recipe -> its id. `inside` runs in it first, and returns what gives its value."""
    pid = os.fork()
    if pid:
        return pid
    status, said, value = BROKEN, "", None
    try:
        with open(log.with_suffix(".out"), "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        torch.set_num_threads(1)
        measure = inside() if inside is not None else lambda: None
        try:
            pipeline.run(recipe, force=True, **keys)
            status = 0
        except RlaifError as error:
            status, said = REFUSED, str(error)
        except BaseException:
            said = traceback.format_exc()
        value = measure()
        log.write_text(json.dumps([said, value]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid: int, log: Path) -> Ended:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said, value = json.loads(log.read_text()) if status >= 0 and log.exists() else ("", None)
    log.unlink(missing_ok=True)
    return Ended(status, said, value)


def run(recipe: Recipe, inside: Callable[[], Callable[[], Any]] | None = None, **keys) -> Ended:
    """Run the recipe in a process and wait for it."""
    log = Path(recipe.output).parent / "end.json"
    return wait(start(recipe, log, inside, **keys), log)


def at_writes(folder: Path, act: Callable[[int], None]) -> Callable[[], int]:
    """Call `act(number)` before every operation that changes a file of `folder`, and before every sync -> a function
    that gives their number so far. It cannot be undone: for a process of its own."""
    seen, root, sync = [0], str(folder), os.fsync

    def next_one() -> None:
        seen[0] += 1
        act(seen[0])

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | Path) and str(path).startswith(root) and flags & (os.O_WRONLY | os.O_RDWR):
                next_one()
        elif event in WRITES and str(arguments[0]).startswith(root):
            next_one()

    def synced(descriptor: int) -> None:
        next_one()
        sync(descriptor)

    sys.addaudithook(hook)
    os.fsync = synced
    return lambda: seen[0]


def reference(recipe: Recipe) -> tuple[Path, float, int]:
    """The folder of an undisturbed run of the recipe, its seconds and its file operations. `output` is free again."""
    output = Path(recipe.output)
    kept, measured = output.with_name("reference"), output.with_name("measured.json")
    if not kept.exists():
        began = time.monotonic()
        ended = run(recipe, lambda: at_writes(output, lambda number: None))
        if ended.status:
            raise RuntimeError(f"{recipe.name}: the undisturbed run failed: {ended.said}")
        measured.write_text(json.dumps([time.monotonic() - began, ended.value]))
        os.rename(output, kept)
    return kept, *json.loads(measured.read_text())


def from_reference(recipe: Recipe, kept: Path, without: list[str]) -> None:
    """Make the run folder a copy of the finished one, without some stages and what they left."""
    folder = Path(recipe.output)
    remove(folder)
    shutil.copytree(kept, folder)
    log = MetricsLog(folder / "metrics.jsonl")
    for name in without:
        log.drop(name)
        remove(folder / name)
        for role in pipeline.LEAVES.get(name, ()):
            remove(folder / "adapters" / role)


def differences(want: Path, got: Path, stages: tuple[str, ...] | None = None) -> list[str]:
    """Files of two run folders that differ, but for what wall-clock times decide. `stages`: only these folders."""
    names = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.name != ".lock")
             for root in (want, got)]  # fmt: skip
    if stages is not None:
        names = [[name for name in found if name.parts[0] in stages] for found in names]
    out = [f"only in one: {name}" for name in sorted(set(names[0]) ^ set(names[1]))]
    return out + [str(name) for name in names[0] if name in names[1] and _plain(want / name) != _plain(got / name)]


def _plain(path: Path) -> Any:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return sorted(json.dumps(_timeless(json.loads(line)), sort_keys=True) for line in path.read_text().splitlines())
    if path.name == "report.html":
        return None  # written from the rest, with times in it
    if path.name == "files.sha256":
        return re.sub(r"[0-9a-f]{64}", "", path.read_text())  # of files that are compared themselves
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in COSTS}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
