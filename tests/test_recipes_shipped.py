"""The recipes that ship: each is read, says what it needs and what was measured, is named as its file, and is
planned."""

import re
from pathlib import Path

import pytest

from rlaif_lite.model.known_bases import known_base
from rlaif_lite.model.random_base import checkpoint_of
from rlaif_lite.planner.plan import make_plan
from rlaif_lite.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_says_what_it_needs(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Needs" in head
    if path.stem.endswith("gb"):
        assert "Measured:" in head and f"{path.stem.rsplit('_', 1)[1].removesuffix('gb')} GB" in head


def test_the_published_recipe_has_the_published_numbers():
    """The release's scripts (train_rl_model.sh, train_reward_model.sh): global batches, rates, penalties."""
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "vlm_rlaif_7b_80gb"))
    ppo, reward = recipe.ppo, recipe.reward
    assert (ppo.rollouts, ppo.minibatch, ppo.epochs, ppo.lr, ppo.warmup_steps) == (256, 128, 2, 3e-5, 5)
    assert (ppo.kl_coef, ppo.clip, ppo.value_clip, ppo.value_coef, ppo.gamma, ppo.lam) == (0.1, 0.2, 0.2, 0.1, 1, 1)
    assert (ppo.stop_penalty, ppo.length_penalty, ppo.max_new_tokens) == (8, 10, 896)
    assert (reward.lr, reward.batch_size, reward.schedule, reward.centering) == (2e-5, 16, "constant", 1e-3)
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (64, 16)
    assert (recipe.features.frames, recipe.features.clips, recipe.features.clip_frames) == (50, 3, 20)
    assert 386 * ppo.rollouts == pytest.approx(99_000, rel=0.01)  # one pass over the prompts


def test_the_recipes_of_dpo_have_the_numbers_that_are_published():
    """RLAIF-V's scripts (LoRA) and its choice of pairs; of i-SRT its rounds, and LLaVA-Hound's numbers."""
    found = {path.stem: load_recipe(path) for path in RECIPES if path.stem in ("rlaif_v_7b_24gb", "isr_dpo_7b_24gb")}
    rlaif_v, isr = found["rlaif_v_7b_24gb"], found["isr_dpo_7b_24gb"]
    dpo = rlaif_v.dpo
    assert (dpo.rounds, dpo.prompts, dpo.beta, dpo.lr, dpo.epochs, dpo.batch_size) == (4, 4000, 0.1, 1e-5, 4, 8)
    assert (dpo.pairs, dpo.balance_lengths, rlaif_v.preference.samples) == (2, True, 10)
    assert (rlaif_v.model.lora.rank, rlaif_v.model.lora.alpha, rlaif_v.preference.temperature) == (64, 16, 0.7)
    assert (isr.dpo.rounds, isr.dpo.beta, isr.dpo.epochs, isr.dpo.batch_size, isr.features.frames) == (
        9,
        0.1,
        3,
        128,
        8,
    )
    assert isr.dpo.judge_role == "policy" and isr.preference.samples == 2 and not isr.dpo.balance_lengths


# ---- each card recipe fits its card by plan; the bases' config files with their published sizes, no weights


def config_of(name: str, folder: Path) -> str:
    made = checkpoint_of(name, folder, ("yes", "no", "A", "B"))
    return made if made != name else str(known_base(name))


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.endswith("gb")], ids=lambda path: path.stem)
def test_a_card_recipe_fits_its_card_by_plan(path, tmp_path):
    recipe, card = load_recipe(path), path.stem.rsplit("_", 1)[1].upper()
    overrides = [f"model.base={config_of(recipe.model.base, tmp_path / 'base')}"]
    if recipe.model.reward_base is not None:
        overrides += [f"model.reward_base.base={config_of(recipe.model.reward_base.base, tmp_path / 'reward_base')}"]
    plan = make_plan(load_recipe(path, overrides), card)
    assert set(recipe.stages) == set(plan.stages)
    for name, stage in plan.stages.items():
        assert stage.fits, (name, stage)
    weights = plan.stages[recipe.method].terms["weights"]
    size, unit = re.search(r"-(\d+(?:\.\d+)?)([bm])-", recipe.model.base.lower()).groups()
    parameters = float(size) * {"b": 1e9, "m": 1e6}[unit]
    assert 0.4 * parameters < weights < 12 * 2**30 and plan.stages[recipe.method].peak > weights


@pytest.mark.parametrize("page", ["README.md", "docs/reproduce.md"])
def test_the_planned_peaks_of_the_tables_are_the_planners(page):
    """A change of the planner or of a recipe changes these tables, too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[?`(\w+_(\d+)gb)`.*?\| (\d+\.\d)(?: GiB)?(?: \(planned\)|, )", text, re.MULTILINE)
    assert len(rows) >= 7
    for name, size, shown in rows:
        plan = make_plan(load_recipe(ROOT / "recipes" / f"{name}.yaml"), f"{size}GB")
        assert f"{max(stage.peak for stage in plan.stages.values()) / 2**30:.1f}" == shown, (page, name)
