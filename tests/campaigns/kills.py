"""SIGKILL at random moments and before random file operations; a run that was killed several times and resumed must end
with the same bits as one that was never killed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

from campaigns.runs import at_writes, differences, recipe_of, reference, run, start, wait
from rlaif_lite.files import remove


class Killed(NamedTuple):
    """One run that was killed `kills` times and then finished."""

    method: str
    kind: str
    kills: int
    faults: list[str]


def chain(method: str, kind: str, kills: int, checkpoint: Path, folder: Path, rng: random.Random) -> Killed:
    """One run, killed up to `kills` times ("random" or "write"), then finished and compared."""
    recipe = recipe_of(method, checkpoint, folder)
    output, log = Path(recipe.output), folder / "end.json"
    kept, seconds, writes = reference(recipe)
    remove(output)
    done = 0
    while done < kills:
        if kind == "write":
            last = rng.randint(1, max(2, round(2 * writes / kills)))

            def dying(number: int, last: int = last) -> None:
                if number == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            ended = run(recipe, lambda dying=dying: at_writes(output, dying))
        else:
            pid = start(recipe, log)
            stop = time.monotonic() + rng.uniform(0.3, 0.5 + 2 * seconds / kills)
            while time.monotonic() < stop and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            ended = wait(pid, log)
        if ended.status >= 0:
            break
        done += 1
    if done == kills:
        ended = run(recipe)
    if ended.status:
        return Killed(method, kind, done, [f"status {ended.status}: {ended.said[-400:]}"])
    left = [p.name for p in output.rglob("*") if p.name.endswith((".tmp", ".part")) or p.name == "checkpoint"]
    return Killed(method, kind, done, differences(kept, output) + [f"left: {name}" for name in left])


def campaign(
    count: int, kind: str, checkpoint: Path, folder: Path, methods: tuple[str, ...], say, each: int = 5
) -> list[Killed]:
    """`count` kills spread over the methods, `each` of them in one run."""
    rng, found, turn = random.Random(f"{kind}{count}"), [], 0
    while (made := sum(one.kills for one in found)) < count:
        method = methods[turn % len(methods)]
        found.append(chain(method, kind, min(each, count - made), checkpoint, folder / method, rng))
        say(f"{kind} kills: {found[-1]}")
        turn += 1
    return found
