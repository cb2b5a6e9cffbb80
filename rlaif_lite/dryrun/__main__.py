"""The process of a dry run: the shim first, then torch. `launch.dry_run` starts it with one JSON argument."""

import json
import sys
from pathlib import Path

from ..errors import RlaifError
from . import shim


def main() -> None:
    """Run what the first argument asks for, as JSON, and write its figures to the file that it names."""
    asked = json.loads(sys.argv[1])
    if asked["shim"] is not None:
        shim.install(Path(asked["shim"]))
    from ..recipe import load_recipe

    try:
        recipe = load_recipe(asked["recipe"], asked["overrides"])
        from . import run
        from .cards import card_of

        found = run.dry_profile(recipe, card_of(asked["gpu"]), asked["stages"], asked["layers"], asked["trace"])
    except RlaifError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(run.as_text(found))
    if asked["out"] is not None:
        Path(asked["out"]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


main()
