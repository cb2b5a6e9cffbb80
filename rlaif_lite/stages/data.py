"""The data of the run: the synthetic world is made here when the recipe asks for one; files that are there are read
and counted.

Nothing is trained yet, so whatever is wrong with a file or a path is found now and not after an hour.
"""

import os

from ..data.world import WorldConfig, WorldSplits, write_world
from ..progress import progress
from ..workspace import Workspace

READS = ("data",)
NEEDS = ()


def run(work: Workspace) -> dict:
    """Make the world's videos and files (once), read every split, and count records, videos and what is missing."""
    world = work.recipe.data.world
    if world is not None:
        splits = WorldSplits(sft=world.sft, preference=world.preference, rl=world.rl, test=world.test)
        with progress(world.sft + world.preference + world.rl + world.test, "world", unit="video") as bar:
            write_world(
                work.data_folder,
                splits,
                world.seed,
                WorldConfig(dropout=world.dropout, weak_video=world.weak_video),
                workers=world.workers or os.cpu_count() or 1,
                progress=lambda done, total: bar.advance(done - bar.done),
            )
    counts = {name: len(work.records(name)) for name in work.split_names()}
    return {"records": counts, "missing_videos": len(work.missing_videos)}
