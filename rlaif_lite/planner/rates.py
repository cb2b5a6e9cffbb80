"""How long stages take, from rates that were measured; what was not measured is not known.

The one table there is: the embedded base on two cores of an AMD EPYC (docs/results/tiny.md), mean of its runs.
"""

from ..recipe import Recipe
from ..training.fit import steps_of
from .lengths import Lengths

BASIS = "docs/results/tiny.md: the embedded base on two cores of an AMD EPYC"
UNKNOWN = "not measured for this base and device"
# Seconds for each: video made, video encoded, record trained on, clip captioned, answer sampled and judged, pair
# trained on, answer of PPO, answer of the evaluation.
RATES = {
    "data": 0.0098,
    "features": 0.0154,
    "sft": 0.0129,
    "context": 0.0041,
    "preference": 0.0199,
    "reward": 0.0189,
    "ppo": 0.055,
    "evaluate": 0.0058,
}
# Share of a stage's time that several ranks do not share, of the same base (docs/many_cards.md). `data` is rank 0's.
SERIAL = {
    "data": 1.0,
    "features": 0.05,
    "sft": 0.05,
    "context": 0.05,
    "preference": 0.05,
    "reward": 0.05,
    "ppo": 0.05,
    "evaluate": 0.05,
}


def pairs_of(recipe: Recipe, lengths: Lengths) -> int:
    """Pairs that the reward model has: given, or two neighbouring answers to a prompt each."""
    records = lengths.splits["preference"].records if "preference" in lengths.splits else 0
    return records * recipe.preference.samples // 2 if recipe.data.preference else records


def seconds(recipe: Recipe, lengths: Lengths, on_gpu: bool) -> dict[str, tuple[float | None, str]]:
    """{stage: (seconds, where that comes from)}"""
    if recipe.model.base != "embedded" or on_gpu or recipe.data.world is None:
        return {stage: (None, UNKNOWN) for stage in recipe.stages}
    world, splits, phases = recipe.data.world, lengths.splits, recipe.sft
    records = {name: texts.records for name, texts in splits.items()}
    trained = [(phases.easy, "sft_easy"), (phases.hard, "sft_hard"), (phases.policy_init, "policy_init")]
    asked = records.get("preference", 0) * bool(recipe.data.preference)  # not where pairs are given
    answers = asked * recipe.preference.samples
    evaluated = len(recipe.evaluate.roles) * (1 + recipe.evaluate.samples) + (
        len(recipe.evaluate.temperatures) * recipe.evaluate.samples if "sft" in recipe.evaluate.roles else 0
    )
    videos = world.sft + world.preference + world.rl + world.test
    counts = {
        "data": videos,
        "features": videos,
        "sft": sum(
            steps_of(s, records.get(split, 0), s.batch_size) * s.batch_size for s, split in trained if s is not None
        ),
        "context": sum(records.get(split, 0) for split in recipe.narrated) * recipe.features.clips,
        "preference": answers,
        "reward": steps_of(recipe.reward, pairs_of(recipe, lengths), recipe.reward.batch_size)
        * recipe.reward.batch_size,
        "ppo": recipe.ppo.steps * recipe.ppo.rollouts,
        "evaluate": records.get("test", 0) * evaluated,
    }
    return {
        stage: (RATES[stage] * counts[stage], BASIS) if stage in RATES else (None, UNKNOWN) for stage in recipe.stages
    }
