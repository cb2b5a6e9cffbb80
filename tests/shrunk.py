"""The shipped tiny recipes, shrunk to sizes that a test can afford."""

from pathlib import Path

import yaml

from rlaif_lite.recipe import Recipe, load_recipe

# Sizes that a test can afford; what a recipe does otherwise stays as shipped.
SMALL = {
    "threads": 1,
    "device": "cpu",
    "data.world.sft": 6,
    "data.world.preference": 8,
    "data.world.rl": 6,
    "data.world.test": 4,
    "data.world.workers": 1,
    "features.workers": 1,
    "preference.samples": 2,
    "preference.max_new_tokens": 12,
    "reward.floor": 0.0,
    "ppo.steps": 1,
    "ppo.max_new_tokens": 6,
    "ppo.epochs": 1,
    "dpo.rounds": 1,
    "dpo.prompts": 4,
    "dpo.heldout": 0.3,
    "evaluate.max_new_tokens": 6,
    "evaluate.bootstrap": 20,
    "evaluate.samples": 1,
    "evaluate.examples": 1,
    "health": "warn",
}


def shrunk(path: Path, folder: Path, checkpoint: Path, *overrides: str) -> Recipe:
    """A tiny recipe of `recipes/` at sizes that take seconds; its run folder is `folder`/run."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = yaml.safe_load((path.parent / given["base_recipe"]).read_text()) if "base_recipe" in given else {}
    training = [f"{key}.{name}={value}" for key in ("sft.easy", "sft.hard", "sft.policy_init", "reward", "dpo",
                "dpo.divide.train") for name, value in (("steps", 1), ("batch_size", 4), ("micro_batch", "null"))
                if not any(part is None for part in _path(base | given, key))]  # fmt: skip
    group = 2 if {**base.get("ppo", {}), **given.get("ppo", {})}.get("group_size", 1) > 1 else 1
    sizes = ["ppo.rollouts=4", f"ppo.group_size={group}", "ppo.minibatch=4", "ppo.micro_batch=null"]
    if any("dpo.divide." in size for size in training):  # a divider of one step divides nothing
        training = [size for size in training if "dpo.divide." not in size]
        sizes += ["dpo.divide=null", "preference.samples=4"]
    small = [f"{key}={value}" for key, value in SMALL.items()] + training + sizes
    return load_recipe(path, [*small, f"model.base={checkpoint}", f"output={folder / 'run'}", *overrides])


def _path(given: dict, key: str) -> list:
    out = []
    for word in key.split("."):
        given = given.get(word, None if word in ("divide", "train") else {}) if isinstance(given, dict) else None
        out.append(given)
    return out
