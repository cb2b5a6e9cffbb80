"""Config files of the shipped recipes' bases, so that a plan, and a profile on random weights, need no network.

`bases/OWNER--NAME/` holds sizes and counts, and no weights. `source` is the file that they describe. `confirmed_by`
names where each was checked, since that file itself was not read: copies of it, and the script that converted it.
`note` says what follows from what, and what could not be confirmed.
"""

import os
from pathlib import Path

from ..recipe import Model
from .base import in_cache, resolve_base

FOLDER = Path(__file__).parent / "bases"


def known_base(name: str) -> Path | None:
    """The folder of the config files of hub base `name`; None where the package has none."""
    folder = FOLDER / name.replace("/", "--")
    return folder if folder.is_dir() else None


def shipped_facts(section: Model) -> Path | None:
    """`known_base` where nothing better is at hand: None where the base itself is on this disk, or where the recipe
    names a revision."""
    if section.revision is not None or os.path.isdir(resolve_base(section.base)) or in_cache(section.base):
        return None
    return known_base(section.base)
