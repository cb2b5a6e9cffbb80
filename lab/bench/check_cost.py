"""What the checks of a PPO step cost: processor seconds inside them, against those of the whole stage, in one run.

    python -m lab.bench.check_cost RECIPE [KEY=VALUE ...]

All stages before PPO run first, where they are not done. Counted are, in the PPO stage: the search for values
that are not finite (metrics, adapters, optimisers), the health signs, the digests of metrics and checkpoints, syncs.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

from rlaif_lite import files, pipeline
from rlaif_lite.files import remove
from rlaif_lite.model import roles
from rlaif_lite.recipe import load_recipe
from rlaif_lite.stages import ppo
from rlaif_lite.training import checkpoint, fit, health, loop
from rlaif_lite.workspace import Workspace

CHECKS = [
    (fit, "refuse_non_finite"),
    (roles, "refuse_non_finite"),
    (health.Watch, "see"),
    (checkpoint, "digest"),
    (loop.MetricsLog, "digest_of"),
    (loop.MetricsLog, "append"),
    (files, "fsync"),
    (files, "write_sums"),
]


def timed(owner: object, name: str, spent: Counter) -> None:
    """Count the processor seconds in a function, those of the checks that it calls once."""
    plain = getattr(owner, name)

    def measured(*arguments, **keys):
        began, before = time.process_time(), spent.total()
        try:
            return plain(*arguments, **keys)
        finally:
            spent[name] += time.process_time() - began - (spent.total() - before)

    setattr(owner, name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("keys", nargs="*")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.keys)
    pipeline.run(recipe, until="reward")
    remove(Path(recipe.output) / "ppo" / "checkpoint")
    spent: Counter = Counter()
    for owner, name in CHECKS:
        timed(owner, name, spent)
    began = time.process_time()
    ppo.run(Workspace(recipe))
    whole = time.process_time() - began
    for name, seconds in spent.most_common():
        print(f"{name:<20}{seconds:8.3f} s")
    print(f"checks take {spent.total():.3f} of {whole:.1f} processor seconds: {spent.total() / whole:.2%}")


if __name__ == "__main__":
    main()
