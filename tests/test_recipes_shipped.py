"""The recipes that ship: each is read, says what it needs and what was measured, and is named as its file."""

from pathlib import Path

import pytest

from rlaif_lite.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


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
