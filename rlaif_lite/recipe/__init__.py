"""The recipe: one strict YAML file that says everything about a run.

The sections stand in `sections.py`, `feedback.py`, `ppo.py` and `dpo.py`, what no single key can say about itself in
`checks.py`. Here are the Recipe, the way from a file to a checked one (`load_recipe`), and views of it. Errors name
file and line, or the override that they came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, Strict, ValidationError

from ..errors import RecipeError
from . import file
from .checks import cross_checks, file_checks
from .dpo import Describe, Divide, Dpo
from .feedback import Claims, Outside, Pairwise, Preference, Reward
from .ppo import Ppo
from .rlif import Checklist, Interventions
from .rules import Rule, Rules
from .sections import (
    NEUTRAL,
    SPLITS,
    Context,
    Count,
    Data,
    Evaluate,
    Features,
    FilePath,
    Lora,
    Model,
    Prune,
    RewardBase,
    Section,
    Sft,
    Training,
    World,
)

__all__ = ["SPLITS", "Checklist", "Claims", "Context", "Data", "Describe", "Divide", "Dpo", "Evaluate", "Features"]
__all__ += ["Interventions", "Lora", "Model", "Outside", "Pairwise", "Ppo", "Preference", "Prune", "Recipe", "Reward"]
__all__ += ["RewardBase", "Rule", "Rules", "Section", "Sft", "Training", "World", "check_files", "dump_yaml"]
__all__ += ["fields", "flatten", "json_schema", "load_recipe", "neutral_keys", "raise_all", "recipe_hash"]
__all__ += ["show_fields"]


MOST_ERRORS = 30  # shown at a time


class Recipe(Section):
    """A recipe of rlaif-lite."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the recipe; names the run folder",
        json_schema_extra=NEUTRAL,
    )
    method: Literal["ppo", "dpo"] = Field("ppo", description="how the policy learns from preferences")
    seed: int = Field(0, ge=0, description="seed of everything random but the world")
    output: FilePath = Field(
        "runs/{name}",
        min_length=1,
        description="run folder; {name} and {seed} are filled in",
        json_schema_extra=NEUTRAL,
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the GPU where there is one", json_schema_extra=NEUTRAL
    )
    threads: Count | None = Field(
        None, description="CPU threads; null: one per physical core", json_schema_extra=NEUTRAL
    )
    track: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Strict(False)] = Field(
        (),
        description="trackers that get every line of metrics.jsonl; each is an extra: pip install 'rlaif-lite[wandb]'",
        json_schema_extra=NEUTRAL,
    )
    health: Literal["warn", "stop"] = Field(
        "stop",
        description="where the metrics show that nothing can be learnt: warn once and go on, or stop",
        json_schema_extra=NEUTRAL,
    )
    data: Data = Data()
    model: Model = Model()
    features: Features = Features()
    sft: Sft = Sft()
    context: Context = Context()
    preference: Preference = Preference()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    evaluate: Evaluate = Evaluate()

    _marks: dict[str, str] = PrivateAttr(default_factory=lambda: {"": "not from a file"})

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a run, in their order."""
        rewarded = ("preference", "reward") if self.ppo.feedback == "reward_model" else ()
        learn = {"ppo": (*rewarded, "ppo"), "dpo": ("dpo",)}[self.method]
        return ("data", "features", "sft", "context", *learn, "evaluate")

    @property
    def narrated(self) -> tuple[str, ...]:
        """The splits whose videos the context stage describes: where somebody reads the narrative."""
        if self.method == "dpo":
            return ("preference",) if self.preference.context and not self.dpo.altered else ()
        if self.ppo.feedback == "rules":  # they read no narrative
            return ()
        if self.ppo.feedback != "reward_model":  # answers are judged as they come
            listed = self.ppo.feedback == "interventions" and self.ppo.interventions.omission > 0
            return ("rl",) if self.ppo.judge_context or listed else ()
        in_reward = self.reward.context  # given pairs need no judge
        pairs = ("preference",) if self.data.preference or (self.data.pairs and in_reward) else ()
        return (*pairs, "rl") if in_reward else pairs

    @property
    def altered(self) -> dict[str, tuple[str, ...]]:
        """{split: how its videos are altered as well}: for the order-sensitivity of the evaluation, T-GRPO and VDPO."""
        found: dict[str, tuple[str, ...]] = {}
        if self.evaluate.shuffled and self.evaluate.roles:
            found["test"] = ("shuffled",)
        if self.method == "ppo" and self.ppo.order_bonus:
            found["rl"] = ("shuffled",)
        if self.method == "dpo" and self.dpo.altered:
            found["preference"] = tuple(kind for kind in self.dpo.altered if kind != "other")
        return found

    def where(self, key: str) -> str:
        """Where `key` was written ("recipes/x.yaml:41", "override `a.b=1`"), or the section that leaves it out."""
        return file.nearest_mark(self._marks, key)


# ------------------------------------------------------------------------------------------------- from file to Recipe


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads, merges (`base_recipe`, then `overrides` such as "ppo.kl_coef=0.05", values as YAML) and checks a recipe.

    Raises RecipeError with every error found, each with file and line or the override that it came from.
    """
    marked = file.read_recipe(path, overrides)
    marks = {file.dotted(key): mark for key, mark in marked.marks.items()}
    try:
        recipe = Recipe.model_validate(marked.data)
    except ValidationError as errors:
        lines = [file.explain(error, marks, fields()) for error in errors.errors()[:MOST_ERRORS]]
        more = len(errors.errors()) - MOST_ERRORS
        lines += [f"{more} more errors are not shown. Correct these first."] if more > 0 else []
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None
    recipe._marks = marks
    raise_all(recipe, cross_checks(recipe))
    return recipe.model_copy(update={"output": recipe.output.format(name=recipe.name, seed=recipe.seed)})


def raise_all(recipe: Recipe, problems: Iterable[tuple[str, str]]) -> None:
    """Raises RecipeError with one line per (key, message), or nothing where there are none."""
    lines = [f"`{key}` ({recipe.where(key)}) {file.shortened(message, 1000)}" for key, message in problems]
    if lines:
        raise RecipeError("\n".join(lines))


def check_files(recipe: Recipe) -> None:
    """Looks whether the files that the recipe names are there, and whether every stage has data. Reads none of them."""
    missing = (name for name in recipe.track if find_spec(name) is None)  # none of the others is loaded
    why = "has {0}, whose package is not installed: pip install 'rlaif-lite[{0}]'"
    raise_all(recipe, [*(("track", why.format(name)) for name in missing), *file_checks(recipe)])


# --------------------------------------------------------------------------------------------------------- views of it


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every key with dots, and its value as JSON has it: {"ppo.kl_coef": 0.1, "data.rl": ["world:rl"], ...}."""

    def walk(value: dict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, item in value.items():
            if isinstance(item, dict):
                yield from walk(item, f"{prefix}{name}.")
            else:
                yield prefix + name, item

    return dict(walk(recipe.model_dump(mode="json"), ""))


@cache
def neutral_keys() -> frozenset[str]:
    """The keys that say where and how fast, not what; they are marked where they are declared."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            if field.json_schema_extra == NEUTRAL:
                yield prefix + name
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    yield from walk(kind, f"{prefix}{name}.")

    return frozenset(walk(Recipe, ""))


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits of sha256 over the keys that can change a result (all that are not neutral)."""
    neutral = neutral_keys()
    science = {key: value for key, value in flatten(recipe).items() if key not in neutral}
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:12]


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included; `load_recipe` reads it back to the same values."""
    return file.dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, for editors that complete and check as one types."""
    schema = Recipe.model_json_schema()
    schema["properties"]["base_recipe"] = {"type": "string", "description": "another recipe that this one is laid over"}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


@cache
def fields() -> dict[str, file.FieldInfo]:
    """Every key of the schema, in order, with type, default and help."""
    return file.fields_of(Recipe.model_json_schema())


def show_fields(prefix: str = "") -> str:
    """The keys (those under `prefix`) with defaults and help, as text for a terminal."""
    return file.fields_text(fields(), prefix)
