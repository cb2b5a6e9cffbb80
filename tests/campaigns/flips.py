"""One flipped bit at a time, in every file of a finished run folder and of one that was killed in a stage."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from campaigns.runs import REFUSED, differences, recipe_of, reference, run
from rlaif_lite.files import remove
from rlaif_lite.workspace import Workspace

REWRITTEN = ("recipe.yaml", "summary.json", "report.html", ".lock")  # every start writes them again


class Flip(NamedTuple):
    """What one flipped bit brought about."""

    file: str
    end: str
    "named, made again, written again, or found when read"
    faults: list[str]


def spread(files: list[Path], count: int, rng: random.Random) -> list[Path]:
    """All files where there are fewer than `count`; otherwise some, those of all folders in turn."""
    folders: dict[Path, list[Path]] = {}
    for path in rng.sample(files, len(files)):
        folders.setdefault(path.parent, []).append(path)
    turns = [path for turn in range(len(files)) for own in folders.values() for path in own[turn : turn + 1]]
    return turns[:count]


def campaign(count: int, checkpoint: Path, folder: Path, say) -> Iterator[Flip]:
    """`count` flips in files of a finished run, those of all stages in turn."""
    recipe, rng = recipe_of("ppo", checkpoint, folder / "ppo"), random.Random(count)
    kept, output = reference(recipe)[0], Path(recipe.output)
    remove(output)
    shutil.copytree(kept, output)
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.stat().st_size]
    store = Workspace(recipe).store
    for path in spread(files, count, rng):
        name = str(path.relative_to(output))
        sound = path.read_bytes()
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        if "cache" in path.parts:  # checked when they are read, and then made again
            found = store.get(path.stem) is None and not path.exists()
            path.write_bytes(sound)
            say(f"flip: {name}")
            yield Flip(name, "found when read", [] if found else ["the bit was not noticed"])
            continue
        ended = run(recipe)
        if ended.status == REFUSED:
            named = path.name in ended.said and ("run again" in ended.said or "delete" in ended.said.lower())
            flip = Flip(name, "named", [] if named else [f"not named: {ended.said}"])
            path.write_bytes(sound)
        elif ended.status:
            flip = Flip(name, "broken", [ended.said[-600:]])
        else:
            wrong = differences(kept, output)
            end = "written again" if path.name in REWRITTEN else "made again"
            same = path.name in REWRITTEN or path.read_bytes() == sound
            flip = Flip(name, end, wrong + ([] if same else ["the bit was not noticed"]))
        if flip.faults:
            remove(output)
            shutil.copytree(kept, output)
        say(f"flip: {flip}")
        yield flip
