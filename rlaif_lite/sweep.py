"""A grid of runs, with what they have in common done once.

    rlaif-lite sweep recipes/tiny.yaml --over "preference.context=[true,false]" --over "seed=[0,1,2]"

Every point of the grid is a run folder below `out`, as `rlaif-lite run` writes it: a stage that another point has done
from the same inputs is taken from there, the synthetic world and the cached features lie beside the points, once. A
sweep that was killed goes on when it is started again; points that are added to it find what is there.

Each point runs in a process of its own, so that the memory of one does not count against the next, and one that dies
(out of memory, a floor not reached) is written down with its reason while the others go on.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import RecipeError
from .files import digest_of
from .launchers import Job, levels_of, on_a_cluster, on_this_machine, read_cluster
from .progress import say
from .recipe import Recipe, check_files, load_recipe
from .recipe.marked_yaml import parse
from .report import grid as tables

DRAWS = ("seed", "data.world.seed")  # another value of these is another draw of the same setting
LONGEST = 120  # characters of a point's folder name


class Setting(NamedTuple):
    """One value of an axis."""

    words: str  # as tables and folders name it
    keys: dict[str, Any]  # recipe key -> value


class Point(NamedTuple):
    """One run of the grid."""

    setting: str  # what tells it from the other settings, in words
    draw: str  # its seeds; "" where no seed is swept
    recipe: Recipe


def sweep(
    paths: list[str],
    over: list[str],
    overrides: list[str],
    out: Path,
    launcher: Literal["local", "submitit"] = "local",
    jobs: int = 1,
    cluster: Path | None = None,
) -> bool:
    """Run the grid of `paths` (recipes) times `over` (see `axis`) and write `sweep.md`, `.json`, `.svg` and `.png`
    into `out`, again after each point. Returns whether every point finished. `jobs`: processes side by side on this
    machine; `cluster`: the file with what a job asks a scheduler for. Raises RecipeError, before anything runs, for a
    point that is no valid recipe."""
    points = grid(paths, [axis(text) for text in over], overrides, out)
    for point in points:
        check_files(point.recipe)
    out.mkdir(parents=True, exist_ok=True)
    recipes = [point.recipe for point in points]
    if launcher == "submitit":
        ended = on_a_cluster(levels_of(recipes), out, out / "jobs", read_cluster(cluster))
    elif jobs > 1:
        ended = on_this_machine(levels_of(recipes), out, jobs)
    else:  # one after the other, each takes what is there when it begins
        ended = on_this_machine([[Job(number, recipe, None)] for number, recipe in enumerate(recipes)], out, 1)
    say(f"sweep: {len(points)} points into {out}")
    ran: dict[int, tables.Ran] = {}
    for job, reason in ended:
        point, folder = points[job.point], Path(job.recipe.output)
        done = f"{folder.name}{'' if job.until is None else f', up to {job.until}'}"
        say(f"sweep: {done} {'is done' if reason is None else f'failed: {reason}'}")
        if job.until is None:
            ran[job.point] = tables.Ran(point.setting, point.draw, folder, reason)
            tables.write(out, [ran[number] for number in sorted(ran)], of=len(points))
    say(f"{out / 'sweep.md'}")
    return all(each.reason is None for each in ran.values())


# ---------------------------------------------------------------------------------------------------------- the grid


def axis(text: str) -> list[Setting]:
    """What one `--over` says: "key=[1, 2]"; "key,key=[1, 2]" for keys that take the same value; or settings with names,
    "{short: {a.key: 1, b.key: 2}, long: {a.key: 9}}"."""
    if text.startswith("{"):
        named = parse(text, f"--over {text}").data
        if not all(isinstance(keys, dict) for keys in named.values()):
            raise RecipeError(f"`--over {text}`: each name takes keys with values, such as {{one: {{ppo.steps: 1}}}}.")
        return [Setting(words, keys) for words, keys in named.items()]
    keys, equals, values = text.partition("=")
    parsed = parse(values, f"--over {text}").data if equals else None
    if not isinstance(parsed, list) or not parsed:
        raise RecipeError(f"`--over {text}` is not of the form key=[value, ...], such as ppo.kl_coef=[0.05,0.1].")
    names = [key.strip() for key in keys.split(",")]
    said = [value if isinstance(value, str) else json.dumps(value) for value in parsed]
    return [
        Setting(f"{','.join(names)}={text}", dict.fromkeys(names, value))
        for text, value in zip(said, parsed, strict=True)
    ]


def grid(paths: list[str], axes: list[list[Setting]], overrides: list[str], out: Path) -> list[Point]:
    """Every point, recipe by recipe; the last axis changes fastest. `name=...` among the overrides names the points, so
    that a recipe with other keys gets folders of its own."""
    named = dict(text.split("=", 1) for text in overrides if "=" in text).get("name")
    names = [named or Path(path).stem for path in paths]
    swept = [key for choices in axes for key in {key for choice in choices for key in choice.keys}]
    if twice := {name for name in (*names, *swept) if (*names, *swept).count(name) > 1}:
        raise RecipeError(f"{', '.join(sorted(twice))} stands twice in the sweep. Say each recipe and key once.")
    if "output" in (*swept, *(text.partition("=")[0].strip() for text in overrides)):
        raise RecipeError("A sweep's folder is --out, and each point has its own in it. Leave `output` away.")
    points: list[Point] = []
    for path, name in zip(paths, names, strict=True):
        for chosen in itertools.product(*axes):
            draws = [choice for choice in chosen if choice.keys and set(choice.keys) <= set(DRAWS)]
            setting = [name] * (len(paths) > 1) + [choice.words for choice in chosen if choice not in draws]
            folder = out / folder_name(" ".join([name, *(choice.words for choice in chosen)]))
            if folder in [Path(point.recipe.output) for point in points]:
                raise RecipeError(f"{folder} would hold two points of the sweep. Say each value once.")
            changes = [*overrides, f"output={json.dumps(str(folder))}"]
            changes += [f"{key}={json.dumps(value)}" for choice in chosen for key, value in choice.keys.items()]
            draw = "/".join(choice.words.partition("=")[2] or choice.words for choice in draws)
            points.append(Point(" ".join(setting) or name, draw, shared(load_recipe(path, changes), out)))
    return points


def folder_name(words: str) -> str:
    """`words` as a folder's name: other characters become _, and a long name ends in a digest."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", words)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{digest_of(words, 8)}"


def shared(recipe: Recipe, out: Path) -> Recipe:
    """The recipe, its world and its feature cache where all points look for theirs, unless it says where."""
    features, data = recipe.features, recipe.data
    if features.cache is None:
        features = features.model_copy(update={"cache": str(out / "features")})
    if data.world is not None and data.folder is None:
        folder = out / "worlds" / digest_of(data.world.model_dump(mode="json", exclude={"workers"}), 12)
        data = data.model_copy(update={"folder": str(folder)})
    return recipe.model_copy(update={"features": features, "data": data})
