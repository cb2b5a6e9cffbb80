"""Made-up inputs of a recipe's shapes: videos of noise that moves, prompts and answers of a given length.

A profile is taken on these also where the recipe's own data are at hand: so it needs none, and two of them compare.
What a stage needs of the stages before it is made up too, so that each can be profiled alone.
"""

import math
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import ranks
from ..data.world import encode
from ..files import write_json, write_jsonl
from ..model.random_base import checkpoint_of
from ..planner.shapes import FRAME
from ..recipe import SPLITS, Recipe
from ..workspace import Workspace

PROMPT_TOKENS = 128  # of the question; the base's chat template adds its own
VIDEOS = (2, 12)  # fewest and most; in between as many as the context stage has in flight
TRAINED = ("easy", "hard", "policy_init")


def reduced(recipe: Recipe, folder: Path, steps: int) -> Recipe:
    """The recipe with its sizes as they are, `steps` steps of each phase (and one to warm up), and data in `folder`.

    What happens once in a run and not in every step is left out: standardising the rewards, and the bootstrap."""
    plain = recipe.model_dump(mode="json")
    plain["output"] = str(folder / "run")
    plain["data"] = {name: [str(folder / f"{name}.jsonl")] for name in SPLITS}
    plain["sft"]["adapter"] = plain["reward"]["adapter"] = None  # every phase is profiled, on made-up roles
    plain["features"] |= {"workers": 1, "cache": None}
    for phase in TRAINED:
        if plain["sft"][phase] is not None:
            plain["sft"][phase]["steps"] = steps + 1
    plain["reward"] |= {"steps": steps + 1, "floor": 0.0, "pairs": None}
    plain["ppo"] |= {"steps": steps + 1, "normalize_reward": False, "checkpoint_every": steps + 1}
    plain["dpo"] |= {"rounds": 1, "steps": steps + 1, "prompts": None}
    plain["evaluate"] |= {"bootstrap": 1, "examples": 0, "truth": None, "synonyms": None}  # made-up answers have none
    return Recipe.model_validate(plain)


def made_up(recipe: Recipe, folder: Path, small: bool) -> Recipe:
    """The recipe on bases without weights (see `model.random_base`), in `folder`."""
    judge = recipe.preference
    single = (judge.claims.yes, judge.claims.no, *judge.pairwise.choices, *recipe.reward.pool_tokens)
    bases = [recipe.model] if recipe.model.reward_base is None else [recipe.model, recipe.model.reward_base]
    paths = [checkpoint_of(each.base, folder / f"base{i}", single, small) for i, each in enumerate(bases)]
    own = None if len(paths) == 1 else recipe.model.reward_base.model_copy(update={"base": paths[1], "revision": None})
    model = recipe.model.model_copy(update={"base": paths[0], "reward_base": own})
    return recipe.model_copy(update={"model": model})


def write_inputs(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Videos and record files, with as many records of each split as one batch of its stage takes."""
    need = math.ceil(recipe.context.batch_size / recipe.features.clips)
    videos = [str(folder / f"{i}.mp4") for i in range(min(max(need, VIDEOS[0]), VIDEOS[1]))]
    frames = 2 * max(recipe.features.frames, recipe.features.clips * recipe.features.clip_frames)
    ranks.first(lambda: [write_video(path, frames, seed) for seed, path in enumerate(videos)])
    phases = [section for section in (getattr(recipe.sft, name) for name in TRAINED) if section is not None]
    supervised = max((section.batch_size for section in phases), default=1)
    counts = {
        "sft_easy": supervised,
        "sft_hard": supervised,
        "policy_init": supervised,
        "preference": _prompts(recipe),
        "rl": recipe.ppo.rollouts // recipe.ppo.group_size,
        "test": recipe.evaluate.batch_size,
    }
    question = words(tokenizer, PROMPT_TOKENS)
    answer = words(tokenizer, recipe.ppo.max_new_tokens - 1)  # EOS is the last
    for split, count in counts.items():
        turns = [{"role": "user", "content": f"<video>\n{question}"}, {"role": "assistant", "content": answer}]
        write_jsonl(
            folder / f"{split}.jsonl",
            [{"id": f"{split}{i}", "video": videos[i % len(videos)], "messages": turns} for i in range(count)],
        )


def _prompts(recipe: Recipe) -> int:
    """As many as fill the slots with answers, the judge's forward with pairs, and the narrator's with clips; in DPO
    also those held out."""
    size, samples = recipe.preference.batch_size, recipe.preference.samples
    need = math.ceil(size / max(1, samples // 2) if recipe.method == "ppo" else size / samples)
    if recipe.narrated:
        need = max(need, math.ceil(recipe.context.batch_size / recipe.features.clips))
    return max(2, need) if recipe.method == "ppo" else 1 + math.ceil(need / (1 - recipe.dpo.heldout))


def write_video(path: str, frames: int, seed: int) -> None:
    """Noise that shifts by a few pixels a frame: as hard to decode as filmed video, different for every seed."""
    height, width = FRAME
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = coarse.repeat(8, 0).repeat(8, 1)
    encode(path, np.stack([np.roll(image, 3 * i, 1) for i in range(frames)]))


def words(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Text of so many tokens."""
    word = "video"
    one, two = (len(tokenizer.encode(text, add_special_tokens=False)) for text in (word, f"{word} {word}"))
    each = two - one
    return " ".join([word] * max(1, round(tokens / each)))


def stand_ins(work: Workspace) -> None:
    """What the stages before would have left: adapters, narratives, pairs of answers of full length."""
    narratives = work.folder / "context" / "narratives.json"
    if not narratives.exists():
        text = words(work.base().tokenizer, work.recipe.context.max_new_tokens * work.recipe.features.clips)
        records = work.records("preference") + work.records("rl")
        write_json(narratives, {work.name_of(record): text for record in records})
    write_json(work.stage("reward") / "heldout.json", {"heldout_accuracy": 1.0})
    answers = [words(work.base().tokenizer, work.recipe.preference.max_new_tokens - n) for n in (1, 2)]
    pairs = [
        {"key": record.key, "chosen": answers[0], "rejected": answers[1], "margin": 1.0}
        for record in work.records("preference")
    ]
    write_jsonl(work.stage("preference") / "pairs.jsonl", pairs)
    for on, role in ((work, "sft"), (work, "reference"), (work.for_reward, "reward"), (work, "policy")):
        if not work.adapter(role).exists():
            on.roles.add(role)
            if role == "reward":
                on.roles.add_head(role, zero=False)
            on.roles.save(role, work.adapter(role))
            on.roles.remove(role)
