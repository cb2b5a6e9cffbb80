"""From files and overrides to the data of a recipe, and from what pydantic found wrong to a sentence to act on."""

from __future__ import annotations

import difflib
import json
import os
import re
import site
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RecipeError
from .marked_yaml import Marked, dotted, dump, merge, parse, read

LONGEST = 1000  # characters of a path or a key that hints are looked for


class FieldInfo(NamedTuple):
    """One key of the schema."""

    type: str  # in words: "number, at least 0"
    default: str  # as YAML; "required" where there is none; "" for a section
    help: str
    section: bool


# ------------------------------------------------------------------------------------------------------------- reading


def read_recipe(path: str | Path, overrides: Iterable[str]) -> Marked:
    """The recipe at `path` over its `base_recipe`, under `overrides`. A bare name means a shipped recipe."""
    path = find_recipe(path)
    marked = _section(read(path, str(path)), str(path))
    base = marked.data.pop("base_recipe", None)
    if base is not None:
        where = marked.marks[("base_recipe",)]
        if not isinstance(base, str):
            raise RecipeError(f"`base_recipe` is {found(base)}, expected the path of another recipe ({where}).")
        below_path = path.parent / base
        if not is_file(below_path):
            raise RecipeError(f"`base_recipe` names {base}, which is not a file ({where}). {files_near(below_path)}")
        below = _section(read(below_path, str(below_path)), str(below_path))
        if "base_recipe" in below.data:
            raise RecipeError(
                f"{below_path} has a `base_recipe` itself ({below.marks[('base_recipe',)]}), and is one ({where}). "
                "One level is all there is: name the lowest one, or copy the keys."
            )
        marked = merge(below, marked)
    for override in overrides:
        marked = merge(marked, _override(override, marked))
    return marked


def _section(marked: Marked, name: str) -> Marked:
    if marked.data is None:
        raise RecipeError(f"{name} is empty. It needs at least `name: ...`; `rlaif-lite recipes show` lists the keys.")
    if not isinstance(marked.data, dict):
        raise RecipeError(f"{name} holds {found(marked.data)}, expected keys and values such as `name: my_run`.")
    return marked


def _override(text: str, marked: Marked) -> Marked:
    """ "a.b=1" as a recipe that says only that."""
    key, equals, value = text.partition("=")
    words = tuple(key.strip().split("."))
    if not equals or not all(words):
        raise RecipeError(f"The override `{text}` is not of the form key=value, such as ppo.kl_coef=0.05.")
    where = f"override `{text}`"
    parsed = parse(value, where, where)
    below: object = marked.data
    for depth, word in enumerate(words[:-1]):
        below = below.get(word) if isinstance(below, dict) else None
        if below is not None and not isinstance(below, dict):
            whole = dotted(words[: depth + 1])
            raise RecipeError(f"`{whole}` is {found(below)} and has no keys ({where}). Set it whole: {whole}=...")
    data: object = parsed.data
    for word in reversed(words):
        data = {word: data}
    return Marked(data, {(*words, *inner): mark for inner, mark in parsed.marks.items()})


def recipe_folders() -> list[Path]:
    """Where recipes are looked for by name: the working directory, this package's checkout, the installation."""
    root = Path(__file__).resolve().parents[2]  # the checkout, or the folder that pip installed into
    checkout = [root / "recipes"] if (root / "pyproject.toml").is_file() else []
    prefixes = (sys.prefix, site.getuserbase(), root)  # of an environment, of --user, of --target
    installed = [Path(prefix) / "share" / "rlaif-lite" / "recipes" for prefix in prefixes]
    seen: dict[Path, Path] = {}
    for folder in (Path("recipes"), *checkout, *installed):
        if folder.is_dir():
            seen.setdefault(folder.resolve(), folder)
    return list(seen.values())


def is_file(path: str | Path) -> bool:
    """Whether a regular file is there; `~` is the home folder. False, without an error, for what cannot be a path."""
    return os.path.isfile(os.path.expanduser(path))


def is_folder(path: str | Path) -> bool:
    """`is_file` for folders."""
    return os.path.isdir(os.path.expanduser(path))


def find_recipe(path: str | Path) -> Path:
    """`path` itself, or the shipped recipe of that name ("tiny"). Raises RecipeError with the names at hand."""
    path = Path(os.path.expanduser(path))
    if is_file(path):
        return path
    if str(path) == "-" or os.path.exists(path) and not is_folder(path):
        raise RecipeError(
            f"{path} is not a regular file. Recipes are not read from standard input or pipes, because errors and the "
            "run folder name the file. Save it as a file first."
        )
    if len(str(path)) > LONGEST:
        raise RecipeError(f"{str(path)[:LONGEST]}... is not there, expected a recipe file.")
    if path.parent == Path("."):
        for folder in recipe_folders():
            for candidate in (folder / path.name, folder / f"{path.name}.yaml"):
                if is_file(candidate):
                    return candidate
    folder = path if is_folder(path) else path.parent
    at_hand = [str(file) for here in (folder, *recipe_folders()) for file in sorted(here.glob("*.yaml"))]
    near = difflib.get_close_matches(str(path), at_hand, n=3) or list(dict.fromkeys(at_hand))[:8]
    hint = f"Recipes at hand: {', '.join(near)}." if near else f"Paths start at {Path.cwd()}."
    raise RecipeError(f"{path} is {'a folder' if is_folder(path) else 'not there'}, expected a recipe file. {hint}")


def files_near(path: Path) -> str:
    """A sentence on what stands where `path` was looked for."""
    folder = path.parent
    if len(str(path)) > LONGEST:
        return f"No path is longer than {LONGEST} characters."
    if not is_folder(folder):
        return f"The folder {folder} does not exist; paths start at {Path.cwd()}."
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.5)
    near = near or [name for name in names if name.endswith(path.suffix)][:8]
    shown = folder if folder != Path(".") else Path.cwd()
    return f"In {shown} there is {', '.join(near)}." if near else f"In {shown} is no {path.suffix or 'such'} file."


# -------------------------------------------------------------------------------------------------------------- errors


def explain(error: dict[str, Any], marks: dict[str, str], fields: dict[str, FieldInfo]) -> str:
    """One of pydantic's errors as a sentence: what was found, where, what was expected, what to do."""
    key = dotted(error["loc"])
    above = fields.get(re.sub(r"\[\d+\]", "[]", key.rpartition(".")[0]))
    if above is not None and not above.section:  # pydantic names the branch of a union that it tried
        key = key.rpartition(".")[0]
    where = nearest_mark(marks, key)
    if error["type"] == "extra_forbidden":
        return f"`{key}` is not a recipe key ({where}). {_suggest(key, fields)}"
    general = re.sub(r"\[\d+\]", "[]", key)
    info = fields.get(general) or fields.get(general.removesuffix("[]"))  # an item of a list is explained by its list
    expected = f"expected {_article(info.type)}{info.type}: {info.help}" if info else error["msg"]
    if error["type"] == "missing":
        return f"`{key}` is missing ({where}), {expected}."
    if info and info.section:
        expected = f"expected a section, keys indented below it: {info.help}"
    return f"`{key}` is {found(error['input'])} ({where}), {expected}."


def _article(type_words: str) -> str:
    return "a " if type_words.startswith(("whole", "number", "list", "section")) else ""


def _suggest(key: str, fields: dict[str, FieldInfo]) -> str:
    """The key that was probably meant: near it in its section, or of (nearly) its name in another."""
    if len(key) > LONGEST:
        return "It is too long for one."
    general = re.sub(r"\[\d+\]", "[]", key)
    parent, _, leaf = general.rpartition(".")
    if general in fields:  # written with dots, which only overrides have
        return f"Write `{leaf}` below `{parent}`, indented."
    siblings = {name.rpartition(".")[2]: name for name in fields if name.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
        return f"Did you mean `{siblings[near[0]].replace('[]', '')}`?"
    if near := difflib.get_close_matches(leaf, {name.rpartition(".")[2] for name in fields}, n=1, cutoff=0.75):
        elsewhere = [f"`{name.replace('[]', '')}`" for name in fields if name.rpartition(".")[2] == near[0]]
        return f"Did you mean {' or '.join(elsewhere[:3])}?"
    return f"The keys there are: {', '.join(siblings)}."


def did_you_mean(word: str, words: Iterable[str], prefix: str = "") -> str:
    """ "Did you mean `...`?", or nothing where no word comes near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"Did you mean `{prefix}{near[0]}`?" if near else ""


def found(value: object) -> str:
    """A value as a sentence has it, with its kind where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"a section ({shortened(', '.join(map(str, value))) or 'empty'})"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true/false)"
    if isinstance(value, str):
        return f"{value[:60]!r} (text)"
    return shortened(str(value))


def shortened(text: str, longest: int = 200) -> str:
    """The text, or its beginning and "..."."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def nearest_mark(marks: dict[str, str], key: str) -> str:
    """The mark of `key`, or of the nearest section around it that was written; "" is the file as a whole."""
    while key not in marks:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return marks[key]


# ----------------------------------------------------------------------------------------------------- schema as words


def fields_of(schema: dict[str, Any]) -> dict[str, FieldInfo]:
    """Walks a JSON schema of nested sections. List items that are sections get keys like `features.prune[].pool`."""
    result: dict[str, FieldInfo] = {}

    def resolve(part: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part

    def walk(section: dict[str, Any], prefix: str) -> None:
        for name, part in section["properties"].items():
            options = [resolve(option) for option in part.get("anyOf", [part])]
            inner = [(option, ".") for option in options if "properties" in option]
            items = [resolve(option["items"]) for option in options if "items" in option]
            inner += [(item, "[].") for item in items if "properties" in item]
            is_section = bool(inner) and inner[0][1] == "."
            default = _value_words(part["default"]) if "default" in part else "required"
            help = part.get("description") or options[0].get("description", "").rstrip(".")
            *most, last = map(_type_words, options)
            joint = ", or " if "," in "".join(most) else " or "
            types = f"{', '.join(most)}{joint}{last}" if most else last
            result[prefix + name] = FieldInfo(types, default, help, is_section)
            for option, joint in inner:
                walk(option, prefix + name + joint)

    walk(schema, "")
    return result


def _value_words(value: object) -> str:
    """A default as one would write it on one line; "" for a section that is there by default."""
    if isinstance(value, dict):
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return dump(value).removesuffix("...\n").strip()


def _type_words(part: dict[str, Any]) -> str:
    if "enum" in part:
        return "one of " + " | ".join(map(str, part["enum"]))
    if "const" in part:
        return str(part["const"]).lower()
    if "properties" in part:
        return "section"
    if "prefixItems" in part:
        return f"list of {len(part['prefixItems'])}"
    if part["type"] == "array":
        item = "section" if "$ref" in part["items"] else _type_words(part["items"])
        return f"list, each {_article(item)}{item}" + (", not empty" if part.get("minItems") else "")
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    ranges = [f"{text} {part[key]:g}" for key, text in limits.items() if key in part]
    if part.get("minLength"):
        ranges.append("not empty")
    if "pattern" in part:
        ranges.append("of letters, digits and . _ -")
    return word[part["type"]] + (", " + " and ".join(ranges) if ranges else "")


def fields_text(fields: dict[str, FieldInfo], prefix: str = "") -> str:
    """One line per key: indented name, default, help, type. Raises RecipeError when nothing stands under `prefix`."""
    below = (f"{prefix}.", f"{prefix}[")
    chosen = {key: info for key, info in fields.items() if not prefix or key == prefix or key.startswith(below)}
    if not chosen:
        raise RecipeError(f"`{prefix}` is not a recipe key. {_suggest(prefix, fields)}")
    lines = []
    for key, info in chosen.items():
        depth = key.count(".")
        name = "  " * depth + key.rpartition(".")[2] + ":"
        lines += [""] if info.section and depth == 0 else []
        kind = "" if info.section else f" ({info.type})"
        lines.append(f"{f'{name} {info.default}'.rstrip():<34}  # {info.help}{kind}")
    return "\n".join(lines).strip("\n")
