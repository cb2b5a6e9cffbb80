"""YAML that remembers the line of every key, so that an error can point at it.

Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: `1e-4` is a number (1.1 reads a string), and `yes`, `no`
and `on` are the words that they look like (1.1 reads booleans, and `no: no` becomes `{False: False}`). A key that
stands twice is an error, not a silent overwrite.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from ..errors import RecipeError

FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
# Bounds on the whole, so that any file is read or refused within two seconds. The largest shipped recipe has 4 KB.
MAX_BYTES = 64 << 10
MAX_DEPTH = 20  # an alias that contains itself would nest for ever
MAX_VALUES = 5000  # aliases counted each time: nine lines of them can stand for billions

Key = tuple[str | int, ...]  # the way to a value: ("features", "prune", 0, "pool")


class Marked(NamedTuple):
    """Plain data, and where each part of it was written."""

    data: object  # dicts, lists and scalars
    marks: dict[Key, str]  # key -> "file.yaml:41"; the empty key stands for the whole


class _Loader(yaml.SafeLoader):
    """Composes no deeper than MAX_DEPTH: PyYAML calls itself once per level."""

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Keeps the YAML 1.1 resolvers: `no` and `1e-4` as text come out quoted, and every parser reads them alike."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
for _resolver in (_Loader, _Dumper):
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text; in double quotes where it holds a line break that PyYAML would write as it is and read back as a space."""
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

_SCALARS = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": lambda text: float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower())),
    "tag:yaml.org,2002:str": str,
}


def parse(text: str, name: str, where: str | None = None) -> Marked:
    """Reads one YAML document. `name` is the file's name in messages; `where`, when given, replaces "name:line".

    Raises RecipeError for text that is not YAML, for a key that is given twice, for a key that is not text, and for
    what is too large, too deep, or expands to too many values.
    """

    def place(mark: yaml.Mark) -> str:
        return where or f"{name}:{mark.line + 1}"

    if len(text) > MAX_BYTES:
        raise RecipeError(
            f"{where or name} has {len(text)} characters; a recipe has at most {MAX_BYTES}. Is it another file?"
        )
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        here = place(error.problem_mark or error.context_mark)
        raise RecipeError(f"Not readable as YAML: {what} ({here}).") from error
    except yaml.reader.ReaderError as error:
        here = where or f"{name}:{text[: error.position].count(chr(10)) + 1}"
        raise RecipeError(
            f"Not readable as YAML: the character {chr(error.character)!r} is not allowed ({here}). Remove it."
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"Not readable as YAML: {' '.join(str(error).split())} ({where or name}).") from error

    marks: dict[Key, str] = {(): where or name}
    twice: list[str] = []
    built = itertools.count(1)

    def build(node: yaml.Node, key: Key) -> object:
        here = place(node.start_mark)
        if len(key) > MAX_DEPTH:
            raise RecipeError(f"Nested more than {MAX_DEPTH} deep ({here}). Does an alias contain itself?")
        if next(built) > MAX_VALUES:
            raise RecipeError(f"More than {MAX_VALUES} values ({here}). Do aliases repeat each other?")
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            _check_text(node.value, here)
            try:
                return _SCALARS[node.tag](node.value)
            except ValueError as error:  # only a tag written by hand gets here, such as `!!int ten`
                raise RecipeError(f"{node.value[:60]!r} is not what its tag {node.tag} says ({here}).") from error
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            for index, item in enumerate(node.value):
                marks[(*key, index)] = place(item.start_mark)
            return [build(item, (*key, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            result: dict[str, object] = {}
            for key_node, value_node in node.value:
                word, here = key_node.value, place(key_node.start_mark)
                if not isinstance(key_node, yaml.ScalarNode):
                    raise RecipeError(f"A key must be one word, found a list or section as key ({here}).")
                _check_text(word, here)
                if word in result:
                    first = marks[(*key, word)]
                    twice.append(f"`{dotted((*key, word))}` stands twice: {first} and {here}. Keep one of them.")
                    continue
                marks[(*key, word)] = here
                result[word] = build(value_node, (*key, word))
            return result
        raise RecipeError(f"The tag {node.tag} has no meaning in a recipe ({here}). Write a plain value.")

    data = None if node is None else build(node, ())
    if twice:
        raise RecipeError("\n".join(twice))
    return Marked(data, marks)


def _check_text(text: str, here: str) -> None:
    """Raises RecipeError for what no path and no UTF-8 file can hold. Escapes such as "\\0" write it."""
    if bad := re.search("[\0\ud800-\udfff]", text):
        raise RecipeError(f"The character {bad[0]!r} cannot be used in a recipe ({here}). Remove it.")


def read(path: Path, name: str) -> Marked:
    """`parse` of a file. Raises RecipeError also when the file cannot be read as text."""
    try:
        with open(path, "rb") as file:
            data = file.read(4 * MAX_BYTES + 1)  # four bytes are the longest character
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        if len(data) > 4 * MAX_BYTES:  # cut here, perhaps within a character
            raise RecipeError(
                f"{name} is larger than any recipe ({MAX_BYTES} characters). Is it another file?"
            ) from error
        here = f"{name}:{data[: error.start].count(10) + 1}"
        raise RecipeError(
            f"{here} cannot be read as a text file: byte 0x{data[error.start]:02x} is not UTF-8. Save the file as "
            f"UTF-8."
        ) from error
    return parse(text.replace("\r\n", "\n"), name)


def dump(data: object) -> str:
    """Data as YAML that `parse` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100_000)


def merge(below: Marked, above: Marked) -> Marked:
    """`above` laid over `below`: sections merge key by key, everything else is replaced; marks go with the values."""

    def lay(low: object, high: object) -> object:
        if isinstance(low, dict) and isinstance(high, dict):
            return {**low, **{word: lay(low.get(word), value) for word, value in high.items()}}
        return high

    return Marked(lay(below.data, above.data), below.marks | above.marks)


def dotted(key: Key) -> str:
    """("features", "prune", 0, "pool") -> "features.prune[0].pool"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")
