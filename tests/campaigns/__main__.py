"""All campaigns by one command: what is injected, how often, and what each injection brought about.

    python -m tests.campaigns --kills 100 --write-kills 100 --flips 60 --oom 60 --full-disk \
        --recipes --records 3000 --videos --judges

Figures of the last run are in docs/reliability.md. Runs are of the random base of the tests. What is said on the way is
in `progress.txt` of the work folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402

from campaigns import flips, full_disk, hostile_judges, kills, memory  # noqa: E402
from campaigns.runs import METHODS  # noqa: E402
from core import random_base  # noqa: E402


def tests(*arguments: str, **environment: str) -> list[str]:
    """Faults that pytest finds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "slow or not slow", *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=os.environ | environment, capture_output=True, text=True)
    return [] if done.returncode == 0 else [done.stdout[-2000:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("kills", "write-kills", "flips", "oom", "records"):
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N")
    for name in ("full-disk", "recipes", "videos", "judges"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--work", type=Path, help="folder for the runs; a temporary one otherwise")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="campaign"))
    work.mkdir(parents=True, exist_ok=True)
    methods = tuple(given.methods)
    torch.set_num_threads(1)

    def say(text: str) -> None:
        with open(work / "progress.txt", "a") as progress:
            print(text, file=progress)

    checkpoint = random_base(work / "base") if not (work / "base").exists() else work / "base"
    bad = 0

    def report(name: str, found: list, figures: str = "") -> None:
        nonlocal bad
        wrong = [one for one in found if one.faults]
        bad += len(wrong)
        print(
            f"{name}: {len(found)} runs, {len(wrong)} with a fault{figures}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for one in wrong:
            print(f"  {one}")

    for kind, count in (("random", given.kills), ("write", given.write_kills)):
        if count:
            began = time.monotonic()
            found = kills.campaign(count, kind, checkpoint, work, methods, say)
            report(f"{kind} kills", found, f", {sum(one.kills for one in found)} kills")
    if given.flips:
        began = time.monotonic()
        found = list(flips.campaign(given.flips, checkpoint, work, say))
        ends = [one.end for one in found]
        report("flips", found, "".join(f", {ends.count(end)} {end}" for end in sorted(set(ends))))
    if given.oom:
        began = time.monotonic()
        found = list(memory.campaign(given.oom, checkpoint, work, methods, say))
        report("out of memory", found, f", largest change of a weight {max(one.change for one in found):.1g}")
    if given.full_disk:
        began = time.monotonic()
        report("full disk", list(full_disk.campaign(checkpoint, work, methods, say)))
    if given.judges:
        bad += hostile_judges.main()
    mutations = (
        (given.recipes, "recipes: 3000", ("tests/test_recipe_bounds.py", "-k", "mutated and 3000"), {}),
        (
            given.records,
            f"records: {given.records}",
            ("tests/test_mutated_records.py",),
            {"CAMPAIGN": str(given.records)},
        ),
        (given.videos, "videos: 3000", ("tests/test_video_files.py", "-k", "mutated and 3000"), {}),
    )
    for wanted, name, arguments, environment in mutations:
        if wanted:
            began = time.monotonic()
            faults = tests(*arguments, **environment)
            bad += len(faults)
            print(f"{name} mutated, {'; '.join(faults) or 'no fault'}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{bad} faults; runs and progress are in {work}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
