"""A disk that fills up in every stage: one clear message, and the run resumes to the same bits once there is space.

The disk is a small tmpfs where this process may mount one. Elsewhere, writes from the middle of a stage on fail.
"""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from campaigns.runs import REFUSED, at_writes, differences, from_reference, recipe_of, reference, run
from rlaif_lite import pipeline
from rlaif_lite.files import remove

PAGE = 4096


class Full(NamedTuple):
    """One stage on a full disk."""

    method: str
    stage: str
    how: str
    faults: list[str]


def size_of(folder: Path) -> int:
    """Bytes that the files of a folder take on a tmpfs."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def can_mount(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    return mounted.returncode == 0 and subprocess.run(["umount", str(folder)]).returncode == 0


def campaign(checkpoint: Path, folder: Path, methods: tuple[str, ...], say) -> Iterator[Full]:
    """Every stage of the methods once."""
    rng, real = random.Random(0), can_mount(folder / "mount")
    for method in methods:
        recipe = recipe_of(method, checkpoint, folder / method)
        kept = reference(recipe)[0]
        for stage in recipe.stages:
            how = on_tmpfs if real else by_injection
            yield (found := Full(method, stage, *how(recipe, kept, stage, rng)))
            say(f"full disk: {found}")


def judged(recipe, kept: Path, stage: str, ended) -> list[str]:
    """Faults of a run that met a full disk, and of the one that resumes it."""
    said = ended.said
    faults = [] if ended.status == REFUSED else [f"status {ended.status}: {said[-600:]}"]
    if not faults and not (said.startswith(f"{stage}: ") and "no space is left" in said and "\n" not in said):
        faults.append(f"not one clear message: {said}")
    again = run(recipe, until=stage)
    if again.status:
        return [*faults, f"resumed: {again.said[-600:]}"]
    own = {f"adapters/{role}/" for role in pipeline.LEAVES.get(stage, ())}
    found = differences(kept, Path(recipe.output), (stage, "adapters"))
    return faults + [one for one in found if "adapters/" not in one or any(role in one for role in own)]


def without(recipe, kept: Path, stage: str) -> list[str]:
    """Put the run folder where the stage begins -> the stages that are not done."""
    later = list(recipe.stages[recipe.stages.index(stage) :])
    from_reference(recipe, kept, later)
    return later


def on_tmpfs(recipe, kept: Path, stage: str, rng: random.Random) -> tuple[str, list[str]]:
    output = Path(recipe.output)
    written = size_of(kept / stage) + (size_of(kept / "adapters") if stage in ("sft", "ppo", "dpo", "reward") else 0)
    # recipe.yaml and the marks of the stages before take a few pages while they are written again
    for pages in (5 + rng.randint(0, written // PAGE), 5 + written // PAGE // 4, 6, 5, 4, 3, 2, 1):
        without(recipe, kept, stage)
        before = output.with_name("before")
        remove(before)
        os.rename(output, before)
        output.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(output)], check=True)
        try:
            shutil.copytree(before, output, dirs_exist_ok=True)
            size = shutil.disk_usage(output).used + pages * PAGE
            subprocess.run(["mount", "-o", f"remount,size={size}", str(output)], check=True)
            ended = run(recipe, until=stage)
            if ended.status == 0:
                continue  # there was room enough
            subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
            return f"tmpfs with {pages} free pages", judged(recipe, kept, stage, ended)
        finally:
            subprocess.run(["umount", str(output)], check=True)
    return "tmpfs", ["the disk never filled up"]


def by_injection(recipe, kept: Path, stage: str, rng: random.Random) -> tuple[str, list[str]]:
    output = Path(recipe.output)
    without(recipe, kept, stage)
    count = run(recipe, lambda: at_writes(output / stage, lambda number: None), until=stage).value
    last = rng.randint(2, max(2, count - 1))

    def full(number: int) -> None:
        if number >= last:
            raise OSError(errno.ENOSPC, "No space left on device")

    without(recipe, kept, stage)
    ended = run(recipe, lambda: at_writes(output / stage, full), until=stage)
    return f"ENOSPC from write {last} of {count} on", judged(recipe, kept, stage, ended)
