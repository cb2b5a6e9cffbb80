"""The recipe: one strict YAML file that says everything about a run.

The sections first: to add a key, add one line with its default, range and help. Then the way from a file to a checked
Recipe (`load_recipe`), and views of it. Errors name file and line, or the override that they came from.
"published" in a help text gives VLM-RLAIF's value (arXiv 2402.03746 and its released scripts) where ours differs.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Iterable, Iterator, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, Strict, ValidationError, model_serializer

from . import recipe_file
from .errors import RecipeError
from .recipe_checks import cross_checks, file_checks

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Rows = Count | Literal["auto"]  # auto: the planner's proposal, a number in the run folder's recipe
Share = Annotated[float, Field(ge=0, le=1)]
Words = Annotated[tuple[str, ...], Strict(False)]  # not strict about list or tuple; the items are text all the same

NARRATIVE = "Video description (may be incomplete): {context}\n"
SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Keys that say where and how fast, not what: two runs that differ only here have the same hash.
# Batch sizes of sampling are not among them: they change which random numbers an answer is drawn with.
NOT_SCIENCE = (
    "name", "output", "device", "threads", "data.folder", "data.world.workers", "model.gradient_checkpointing",
    "features.workers", "features.cache", "context.batch_size", "ppo.checkpoint_every",
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------------------ sections


class World(Section):
    """Synthetic videos with known facts."""

    seed: int = Field(0, ge=0, description="which draw of the world")
    sft: Count = Field(640, description="videos for supervised training")
    preference: Count = Field(600, description="videos for preferences")
    rl: Count = Field(600, description="videos for policy initialisation and PPO")
    test: Count = Field(300, description="videos for evaluation only")
    dropout: float = Field(0.33, ge=0, lt=1, description="share of frames in which an object is hidden")
    weak_video: bool = Field(False, description="leave tasks about whole videos out of the easy records")
    workers: Count | None = Field(None, description="processes that write videos; null: one per core")


class Data(Section):
    """Files of records, from the working directory; `world:rl` and the like name sets of the synthetic world."""

    world: World | None = Field(None, description="synthetic videos with known facts, made by the run; null: none")
    sft: Words = Field((), description="instruction files, split into easy and hard by answer length")
    sft_easy: Words = Field((), description="instruction files of the easy stage (instead of `sft`)")
    sft_hard: Words = Field((), description="instruction files of the hard stage (instead of `sft`)")
    max_easy_words: Count = Field(20, description="`sft` answers up to this many words are easy")
    policy_init: Words = Field((), description="instruction files of the RL domain, for policy initialisation")
    preference: Words = Field((), description="prompts that the model answers twice and judges")
    pairs: Words = Field((), description="preference pairs that are there, instead of `preference`: nothing is judged")
    rl: Words = Field((), description="prompts of PPO")
    test: Words = Field((), description="prompts of the evaluation, on videos used nowhere else")
    folder: str | None = Field(None, description="where the world is written; null: inside the run folder")
    video_root: str | None = Field(None, description="folder that video paths start from; null: the data file's folder")
    on_missing: Literal["error", "skip"] = Field("error", description="an unreadable video: stop, or skip and count")


class Lora(Section):
    """The adapters: every role has one of this shape."""

    rank: Count = Field(16, description="rank (published 64)")
    alpha: Positive = Field(32.0, description="scale; the update is multiplied by alpha / rank (published 16)")
    targets: Words = Field(SEVEN_LINEARS, min_length=1, description="linear layers that carry an adapter")


class RewardBase(Section):
    """A second base, for the reward role alone. It costs its own weights beside the policy's while rewards are learnt
    and during PPO (13B in 4 bits: 6.7 GiB), and every video's features once more on disk."""

    base: str = Field(description="embedded | a folder | a Hugging Face id; of any family, with any tokenizer")
    revision: str | None = Field(None, description="revision of a Hugging Face id")
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4-bit with double quantisation")


class Model(Section):
    """The frozen base that all roles share."""

    base: str = Field("embedded", description="embedded | embedded_weak | a folder | a Hugging Face id")
    revision: str | None = Field(None, description="revision of a Hugging Face id")
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4-bit with double quantisation")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on CPU, bfloat16 on GPU")
    loader: Literal["transformers", "unsloth"] = Field(
        "transformers", description="unsloth: its kernels, on NVIDIA GPUs (extra [unsloth], its own environment)"
    )
    gradient_checkpointing: bool = Field(False, description="recompute in the backward: less memory, more time")
    dense_rollouts: bool | None = Field(
        None, description="sample with a dense copy of the decoder, adapter merged in; null: on a CPU only"
    )
    lora: Lora = Lora()
    reward_base: RewardBase | None = Field(
        None, description="the reward role's own base; null: shared (published: 13B)"
    )

    def for_reward(self) -> Model:
        """The base that the reward role sits on."""
        own = {} if self.reward_base is None else self.reward_base.model_dump()
        return self.model_copy(update={**own, "reward_base": None})


class Prune(Section):
    """One step of pruning, as a mapping with one key."""

    pool: Count | None = Field(None, description="side length of a frame's token grid after average pooling")
    evs: float | None = Field(None, gt=0, le=1, description="share of tokens kept: those that changed most")
    st_mean: Literal[True] | None = Field(None, description="a token per frame and per place (published)")

    @model_serializer
    def _one_key(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}


Prunes = Annotated[tuple[Prune, ...], Strict(False)]


class Features(Section):
    """Frames to visual tokens, once per video."""

    frames: Count = Field(50, description="frames taken from a video, spread evenly")
    clips: Count = Field(3, description="clips that the context stage captions")
    clip_frames: Count = Field(20, description="frames taken from a clip")
    max_pixels: Count | None = Field(None, description="bound on a frame's area, where a base takes any size (Qwen-VL)")
    prune: Prunes = Field((), description="chain of steps, such as [{pool: 12}, {evs: 0.25}]")
    cache: str | None = Field(None, description="folder of the feature cache; null: inside the run folder")
    workers: int = Field(2, ge=0, description="processes that decode videos ahead; 0: none, decode here")


class Training(Section):
    """One phase of training an adapter."""

    steps: Count | None = Field(None, description="optimiser steps; null: as many as `epochs` takes")
    epochs: Positive = Field(1.0, description="passes over the data, when `steps` is null")
    lr: Positive = Field(1e-4, description="highest learning rate")
    batch_size: Count = Field(32, description="records per optimiser step (published 128)")
    micro_batch: Rows | None = Field(
        None, description="records per forward; auto: most that fit; null: the whole batch"
    )
    warmup_ratio: Share = Field(0.03, description="share of the steps in which the rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="the rate after the warm-up")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    lr_end: Share = Field(0.0, description="share of the rate that is left at the last step")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")


class Sft(Section):
    """Supervised training in two stages, short answers then long ones, then on the RL domain."""

    adapter: str | None = Field(None, description="folder of an adapter that training goes on from; null: a fresh one")
    easy: Training | None = Field(Training(), description="short answers; null leaves the phase out")
    hard: Training | None = Field(Training(), description="long answers; null leaves the phase out")
    policy_init: Training | None = Field(Training(), description="RL domain, seeds the policy; null leaves it out")
    replay: float = Field(0.0, ge=0, lt=1, description="share of every later batch drawn from the easy records")
    loss_per: Literal["token", "record"] = Field("token", description="what weighs alike: every token, or every record")


class Context(Section):
    """Clips captioned and joined to the narrative that the judge reads."""

    prompt: str = Field("Describe this video in detail.", description="what is asked about each clip (published)")
    markers: Words = Field((), description="word before each clip's caption: none, or one per clip")
    max_new_tokens: Count = Field(128, description="longest caption")
    batch_size: Count = Field(32, description="clips in flight")


class Claims(Section):
    """The judge that checks an answer claim by claim."""

    mode: Literal["ask", "inline"] = Field("ask", description="ask per sentence, or read verdicts inside the answer")
    prompt: str = Field(
        "{context}Is this statement about the video true? {claim} Answer yes or no.",
        description="the prompt; {context}: where the narrative goes, {claim}: the sentence; {question} may stand",
    )
    context_prefix: str = Field(NARRATIVE, description="how the narrative is put")
    yes: str = Field("yes", min_length=1, description="word for true")
    no: str = Field("no", min_length=1, description="word for false")


class Pairwise(Section):
    """The judge that compares two answers (the published form)."""

    prompt: str = Field(
        "{context}Question: {question}\nResponse A: {a}\nResponse B: {b}\nWhich response is more accurate to the "
        "video, helpful, natural and concise? Answer with A or B.",
        description="the prompt; the answers go to {a} and {b}, the rest as for claims; `<|>` before each answer and "
        "before the rest lays the answers side by side, neither seeing the other",
    )
    context_prefix: str = Field(NARRATIVE, description="how the narrative is put")
    choices: Annotated[tuple[str, str], Strict(False)] = Field(("A", "B"), description="words for first and second")


class Preference(Section):
    """The model answers each prompt several times and judges its own answers."""

    samples: int = Field(2, ge=2, description="answers per prompt; neighbours form a pair, so an even number")
    temperature: Positive = Field(1.0, description="temperature of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    top_k: int = Field(0, ge=0, description="sample among so many most likely tokens; 0: all")
    max_new_tokens: Count = Field(256, description="longest answer")
    batch_size: Count = Field(32, description="answers in flight")
    judge: Literal["claims", "pairwise"] = Field("claims", description="who labels the pairs (published: pairwise)")
    context: bool = Field(True, description="the narrative stands in the judge's prompt")
    compare_context: bool = Field(True, description="also judge the other way, to report what context is worth")
    compare_pairs: int = Field(0, ge=0, description="pairs that the other judge decides as well, to compare; 0: none")
    min_margin: float = Field(0.0, ge=0, description="drop pairs whose scores differ by no more than this")
    consistent_only: bool = Field(False, description="pairwise: drop pairs that the two orders decide differently")
    claims: Claims = Claims()
    pairwise: Pairwise = Pairwise()


class Reward(Training):
    """The reward model: an adapter and a scalar head, trained on the pairs (published: constant rate, norm 0.3)."""

    adapter: str | None = Field(None, description="folder of a trained reward role, used as it is; null: train one")
    lr: Positive = Field(2e-5, description="highest learning rate")
    batch_size: Count = Field(16, description="pairs per optimiser step")
    micro_batch: Rows | None = Field(None, description="pairs per forward; auto: most that fit; null: the whole batch")
    schedule: Literal["cosine", "linear", "constant"] = Field("constant", description="the rate after the warm-up")
    centering: float = Field(1e-3, ge=0, description="weight of the term that keeps the mean reward near 0")
    pool: Literal["last", "tokens"] = Field("last", description="the last token, or the sum over `pool_tokens` and it")
    pool_tokens: Words = Field((), description="words whose tokens `pool: tokens` reads")
    prompt: str | None = Field(None, description="template with {question}; null: the question as asked")
    context: bool = Field(
        False, description="the narrative stands in `prompt` at {context}, in PPO as well (LLaVA-RLHF's facts)"
    )
    heldout: float = Field(0.15, gt=0, lt=1, description="share of prompts whose pairs are held out")
    floor: Share = Field(0.6, description="held-out accuracy below which PPO does not start")
    pairs: Count | None = Field(None, description="use at most so many pairs")
    stumbles: Share = Field(
        0.0,
        description="share of extra pairs, the chosen answer against itself with words doubled, dropped or misplaced",
    )


class Ppo(Section):
    """Reinforcement learning against the reward model, held near the reference by the KL."""

    steps: Count = Field(20, description="rounds of rollout and update")
    rollouts: Count = Field(96, description="answers per step (published 256)")
    slots: Count | None = Field(None, description="answers in flight while sampling; null: all `rollouts`")
    group_size: Count = Field(1, description="answers per prompt; 2 or more for `value: none`")
    epochs: Count = Field(2, description="passes over each step's answers")
    minibatch: Count = Field(48, description="answers per optimiser step (published 128)")
    micro_batch: Rows | None = Field(None, description="answers per forward; auto: most that fit; null: the minibatch")
    lr: Positive = Field(3e-5, description="highest learning rate of the policy")
    value_lr: Positive | None = Field(None, description="the value role's rate; null: as `lr`")
    warmup_steps: int = Field(3, ge=0, description="steps in which the rate rises (published 5)")
    lr_end: Share = Field(0.1, description="share of the rate that is left at the last step, falling linearly")
    kl_coef: float = Field(0.1, ge=0, description="weight of the KL to the reference in the reward")
    kl_target: Positive | None = Field(None, description="KL per answer aimed at by adapting the weight; null: fixed")
    kl_horizon: Count = Field(10000, description="answers over which the adaptive weight moves")
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="log ratio, or Schulman's non-negative estimator")
    clip: float = Field(0.2, gt=0, lt=1, description="range of the policy's probability ratio")
    value_clip: Positive | None = Field(0.2, description="range of a value's change; null: not clipped")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, description="weight of an entropy bonus")
    gamma: Share = Field(1.0, description="discount")
    lam: Share = Field(0.95, description="GAE's lambda (published 1)")
    whiten_rewards: bool = Field(False, description="scale rewards to unit variance before GAE")
    whiten_advantages: bool = Field(True, description="scale advantages to mean 0, variance 1 over real tokens")
    normalize_reward: bool = Field(True, description="standardise on the reference's answers (published: no)")
    stop_penalty: float = Field(3.0, ge=0, description="taken off an answer without end (published 8)")
    length_penalty: float = Field(0.0, ge=0, description="times length / max_new_tokens, taken off (published 10)")
    temperature: Positive = Field(1.0, description="temperature of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    top_k: int = Field(0, ge=0, description="sample among so many most likely tokens; 0: all")
    max_new_tokens: Count = Field(64, description="longest answer (published 896)")
    value: Literal["adapter", "none"] = Field("adapter", description="an adapter of its own, or none: leave-one-out")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    checkpoint_every: Count = Field(5, description="steps between checkpoints")


class Evaluate(Section):
    """The held-out comparison."""

    roles: Annotated[tuple[Literal["base", "sft", "reference", "ppo"], ...], Strict(False)] = Field(
        ("base", "sft", "reference", "ppo"), description="who is compared; [] leaves the evaluation out"
    )
    samples: Count = Field(2, description="sampled answers per prompt, beside the greedy one")
    temperature: Positive = Field(1.0, description="temperature of sampling")
    temperatures: Annotated[tuple[Positive, ...], Strict(False)] = Field(
        (0.7, 0.5, 0.3), description="SFT's control: lower temperatures, so that sharpening is not taken for alignment"
    )
    max_new_tokens: Count = Field(64, description="longest answer")
    batch_size: Count = Field(64, description="answers in flight")
    bootstrap: Count = Field(2000, description="resamples for the intervals")
    examples: int = Field(10, ge=0, description="videos shown in the report")


class Recipe(Section):
    """A recipe of rlaif-lite."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the recipe; names the run folder")
    seed: int = Field(0, ge=0, description="seed of everything random but the world")
    output: str = Field("runs/{name}", min_length=1, description="run folder; {name} and {seed} are filled in")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    threads: Count | None = Field(None, description="CPU threads; null: one per physical core")
    data: Data = Data()
    model: Model = Model()
    features: Features = Features()
    sft: Sft = Sft()
    context: Context = Context()
    preference: Preference = Preference()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()

    _marks: dict[str, str] = PrivateAttr(default_factory=lambda: {"": "not from a file"})

    def where(self, key: str) -> str:
        """Where `key` was written ("recipes/x.yaml:41", "override `a.b=1`"), or the section that leaves it out."""
        return recipe_file.nearest_mark(self._marks, key)


# ------------------------------------------------------------------------------------------------- from file to Recipe


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads, merges (`base_recipe`, then `overrides` such as "ppo.kl_coef=0.05", values as YAML) and checks a recipe.

    Raises RecipeError with every error found, each with file and line or the override that it came from.
    """
    marked = recipe_file.read_recipe(path, overrides)
    marks = {recipe_file.dotted(key): mark for key, mark in marked.marks.items()}
    try:
        recipe = Recipe.model_validate(marked.data)
    except ValidationError as errors:
        lines = [recipe_file.explain(error, marks, fields()) for error in errors.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None
    recipe._marks = marks
    raise_all(recipe, cross_checks(recipe))
    return recipe.model_copy(update={"output": recipe.output.format(name=recipe.name, seed=recipe.seed)})


def raise_all(recipe: Recipe, problems: Iterable[tuple[str, str]]) -> None:
    """Raises RecipeError with one line per (key, message), or nothing where there are none."""
    if lines := [f"`{key}` ({recipe.where(key)}) {message}" for key, message in problems]:
        raise RecipeError("\n".join(lines))


def check_files(recipe: Recipe) -> None:
    """Looks whether the files that the recipe names are there, and whether every stage has data. Reads none of them."""
    raise_all(recipe, file_checks(recipe))


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


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits of sha256 over the keys that can change a result (all but NOT_SCIENCE)."""
    science = {key: value for key, value in flatten(recipe).items() if key not in NOT_SCIENCE}
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:12]


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included; `load_recipe` reads it back to the same values."""
    return recipe_file.dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, for editors that complete and check as one types."""
    schema = Recipe.model_json_schema()
    schema["properties"]["base_recipe"] = {"type": "string", "description": "another recipe that this one is laid over"}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


@cache
def fields() -> dict[str, recipe_file.FieldInfo]:
    """Every key of the schema, in order, with type, default and help."""
    return recipe_file.fields_of(Recipe.model_json_schema())


def show_fields(prefix: str = "") -> str:
    """The keys (those under `prefix`) with defaults and help, as text for a terminal."""
    return recipe_file.fields_text(fields(), prefix)
