"""LLaMA-Factory's `dataset_info.json`: which columns and tags of a data file mean what.

It lies in the folder of the data files or in the one above. A file that it describes is read by its maps: columns and
tags get the names that the alpaca and ShareGPT readers know.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError

# LLaMA-Factory's name of a column -> (its default, the name that the readers here know)
COLUMNS = {
    "alpaca": {
        "prompt": ("instruction", "instruction"),
        "query": ("input", "input"),
        "response": ("output", "output"),
        "history": (None, "history"),
    },
    "sharegpt": {"messages": ("conversations", "conversations")},
}
SHARED = {
    key: (None, key) for key in ("system", "images", "videos", "chosen", "rejected", "kto_tag", "tools", "audios")
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}


class Described(NamedTuple):
    """How one data file is to be read."""

    place: str  # the file and entry that describe it
    formatting: str  # alpaca or sharegpt
    columns: dict[str, str]  # column of the file -> the readers' name
    tags: dict[str, str]
    ranking: bool

    def rename(self, found: dict) -> dict:
        """One object with the names that the readers know. Raises DataError for two columns of one name."""
        renamed: dict = {}
        for key, value in found.items():
            name = self.columns.get(key, key)
            if name in renamed and value is not None:
                raise DataError(f"`{key}` is `{name}` by {self.place}, but the record has a `{name}` as well.")
            renamed[name] = value
        needed = ("chosen", "rejected") if self.ranking else ()
        if missing := [key for key in needed if renamed.get(key) is None]:
            raise DataError(f"`{missing[0]}` is missing, but {self.place} says `ranking`: true.")
        if self.formatting == "sharegpt":
            for key in ("conversations", "chosen", "rejected"):
                if isinstance(renamed.get(key), list):
                    renamed[key] = [self._turn(turn) for turn in renamed[key]]
                elif isinstance(renamed.get(key), dict):
                    renamed[key] = self._turn(renamed[key])
        return renamed

    def _turn(self, turn):
        if not isinstance(turn, dict):
            return turn
        role, content = turn.get(self.tags["role_tag"]), turn.get(self.tags["content_tag"])
        spelled = {self.tags[tag]: name for tag, name in ROLES.items()}
        rest = {k: v for k, v in turn.items() if k not in (self.tags["role_tag"], self.tags["content_tag"])}
        return rest | {"from": spelled.get(role, role) if isinstance(role, str) else role, "value": content}


def description_of(path: Path) -> Described | None:
    """What a `dataset_info.json` says about the data file, or None. Raises DataError for what cannot be understood."""
    for folder in (path.parent, path.parent.parent):
        info = folder / "dataset_info.json"
        if not info.is_file() or info.resolve() == path.resolve():
            continue
        try:
            entries = json.loads(info.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{info}: it cannot be read as JSON ({error}).") from None
        if not isinstance(entries, dict):
            continue
        named = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, dict)
            and isinstance(entry.get("file_name"), str)
            and (folder / entry["file_name"]).resolve() == path.resolve()
        }
        if named:
            read = {name: _described(entry, f"{info}, `{name}`") for name, entry in named.items()}
            first, *others = (described._replace(place="") for described in read.values())
            if any(other != first for other in others):
                raise DataError(f"{info}: {', '.join(named)} describe {path.name} in different ways. Keep one of them.")
            return next(iter(read.values()))
    return None


def _described(entry: dict, place: str) -> Described:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise DataError(f"{place}: `formatting` is {formatting!r}, expected alpaca or sharegpt.")
    known = COLUMNS[formatting] | SHARED
    given, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for what, found, names in (("columns", given, known), ("tags", tags, TAGS)):
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise DataError(f"{place}: `{what}` is {found!r}, expected an object of texts.")
        if strange := found.keys() - names.keys():
            raise DataError(f"{place}: `{what}` has `{sorted(strange)[0]}`; known are {', '.join(names)}.")
    columns = {given.get(key, default): name for key, (default, name) in known.items() if given.get(key, default)}
    return Described(place, formatting, columns, TAGS | tags, bool(entry.get("ranking", False)))
