"""The sections of a recipe that every run has: data, the base, features, supervised training, narratives, evaluation.

To add a key, add one line with its default, range and help. "published" in a help text gives VLM-RLAIF's value
(arXiv 2402.03746 and its released scripts) where ours differs.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_serializer

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Rows = Count | Literal["auto"]  # auto: the planner's proposal, a number in the run folder's recipe
Share = Annotated[float, Field(ge=0, le=1)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]  # the only place where `~` is expanded
Words = Annotated[tuple[str, ...], Strict(False)]  # not strict about list or tuple; the items are text all the same
FilePaths = Annotated[tuple[FilePath, ...], Strict(False)]
# Marks a key that says where and how fast, not what: a change of it makes no stage stale and leaves `recipe_hash`
# alone. Batch sizes of sampling are science: they change which random numbers an answer is drawn with.
NEUTRAL = {"neutral": True}

SPLITS = ("sft_easy", "sft_hard", "policy_init", "preference", "rl", "test")  # what stages read
WORLD_SETS = (*SPLITS, "sft_questions", "rl_questions", "test_questions")  # of the synthetic world
SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no conversion of types, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class World(Section):
    """Synthetic videos with known facts."""

    seed: int = Field(0, ge=0, description="which draw of the world")
    sft: Count = Field(640, description="videos for supervised training")
    preference: Count = Field(600, description="videos for preferences")
    rl: Count = Field(600, description="videos for policy initialisation and PPO")
    test: Count = Field(300, description="videos for evaluation only")
    dropout: float = Field(0.33, ge=0, lt=1, description="share of frames in which an object is hidden")
    weak_video: bool = Field(False, description="leave tasks about whole videos out of the easy records")
    workers: Count | None = Field(
        None, description="processes that write videos; null: one per core", json_schema_extra=NEUTRAL
    )


class Data(Section):
    """Files of records, from the working directory; `world:rl` and the like name sets of the synthetic world."""

    world: World | None = Field(None, description="synthetic videos with known facts, made by the run; null: none")
    sft: FilePaths = Field((), description="instruction files, split into easy and hard by answer length")
    sft_easy: FilePaths = Field((), description="instruction files of the easy stage (instead of `sft`)")
    sft_hard: FilePaths = Field((), description="instruction files of the hard stage (instead of `sft`)")
    max_easy_words: Count = Field(20, description="`sft` answers up to this many words are easy")
    policy_init: FilePaths = Field((), description="instruction files of the RL domain, for policy initialisation")
    preference: FilePaths = Field((), description="prompts that the model answers twice and judges")
    pairs: FilePaths = Field(
        (), description="preference pairs that are there, instead of `preference`: nothing is judged"
    )
    rl: FilePaths = Field((), description="prompts of PPO")
    test: FilePaths = Field((), description="prompts of the evaluation, on videos used nowhere else")
    folder: FilePath | None = Field(
        None, description="where the world is written; null: inside the run folder", json_schema_extra=NEUTRAL
    )
    video_root: FilePath | None = Field(
        None, description="folder that video paths start from; null: the data file's folder"
    )
    on_missing: Literal["error", "skip"] = Field("error", description="an unreadable video: stop, or skip and count")

    def files(self, split: str) -> tuple[str, ...]:
        """The entries that the records of one of SPLITS come from."""
        own = getattr(self, split)
        if split in ("sft_easy", "sft_hard"):
            return own or self.sft
        return self.pairs or own if split == "preference" else own


class Lora(Section):
    """The adapters: every role has one of this shape."""

    rank: Count = Field(16, description="rank (published 64)")
    alpha: Positive = Field(32.0, description="scale; the update is multiplied by alpha / rank (published 16)")
    targets: Words = Field(SEVEN_LINEARS, min_length=1, description="linear layers that carry an adapter")


class RewardBase(Section):
    """A second base, for the reward role alone. It costs its own weights beside the policy's while rewards are learnt
    and during PPO (13B in 4 bits: 6.7 GiB), and every video's features once more on disk."""

    base: FilePath = Field(description="embedded | a folder | a Hugging Face id; of any family, with any tokenizer")
    revision: str | None = Field(None, description="revision of a Hugging Face id")
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4-bit with double quantisation")
    chat_template: str | None = Field(None, description="as `model.chat_template`, for this base")


class Model(Section):
    """The frozen base that all roles share."""

    base: FilePath = Field("embedded", description="embedded | embedded_weak | a folder | a Hugging Face id")
    revision: str | None = Field(None, description="revision of a Hugging Face id")
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4-bit with double quantisation")
    chat_template: str | None = Field(
        None, description="vicuna_v1 (published) | a Jinja file; null: the checkpoint's own"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on CPU, bfloat16 on GPU")
    loader: Literal["transformers", "unsloth"] = Field(
        "transformers", description="unsloth: its kernels, on NVIDIA GPUs (extra [unsloth], its own environment)"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        False,
        description="recompute in the backward: less memory, more time; auto: only where a stage fits in no other way",
        json_schema_extra=NEUTRAL,
    )
    dense_rollouts: bool | Literal["attention", "auto"] = Field(
        "auto",
        description="sample with a dense copy of the decoder, adapter merged in, or of its attention's layers only; "
        "auto: as much as fits, by the plan",
    )
    lora: Lora = Lora()
    reward_base: RewardBase | None = Field(
        None, description="the reward role's own base; null: shared (published: 13B)"
    )

    def for_reward(self) -> Model:
        """The base that the reward role sits on."""
        own = {} if self.reward_base is None else self.reward_base.model_dump()
        return self.model_copy(update={**own, "reward_base": None})


Kept = Annotated[float | None, Field(gt=0, le=1)]


class Prune(Section):
    """One step of pruning, as a mapping with one key."""

    pool: Count | None = Field(None, description="side length of a frame's token grid after average pooling")
    evs: Kept = Field(None, description="share of tokens kept: those that changed most (vLLM serves it)")
    vidcom2: Kept = Field(None, description="share of tokens kept: least like video and frame (vLLM serves it)")
    v_cast: Kept = Field(None, description="share of tokens kept: more where the video turns")
    dtd: float | None = Field(None, ge=-1, le=1, description="drop what is more like the frame before than this cosine")
    random: Kept = Field(None, description="share of tokens kept, drawn for each video: a baseline")
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
    cache: FilePath | None = Field(
        None, description="folder of the feature cache; null: inside the run folder", json_schema_extra=NEUTRAL
    )
    workers: Count | None = Field(
        None,
        description="processes that hash and decode videos ahead; null: one for every two cores of a rank",
        json_schema_extra=NEUTRAL,
    )
    max_source_pixels: Count = Field(2**26, description="larger frames are refused, not opened (8K has 2**25)")


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

    adapter: FilePath | None = Field(
        None, description="folder of an adapter that training goes on from; null: a fresh one"
    )
    easy: Training | None = Field(Training(), description="short answers; null leaves the phase out")
    hard: Training | None = Field(Training(), description="long answers; null leaves the phase out")
    policy_init: Training | None = Field(Training(), description="RL domain, seeds the policy; null leaves it out")
    replay: float = Field(0.0, ge=0, lt=1, description="share of every later batch drawn from the easy records")
    loss_per: Literal["token", "record"] = Field("token", description="what weighs alike: every token, or every record")
    train_on: Literal["all", "last"] = Field("all", description="all: every answer of a conversation; last: its last")


class Context(Section):
    """Clips captioned and joined to the narrative that the judge reads."""

    prompt: str = Field("Describe this video in detail.", description="what is asked about each clip (published)")
    markers: Words = Field((), description="word before each clip's caption: none, or one per clip")
    max_new_tokens: Count = Field(128, description="longest caption")
    batch_size: Count = Field(32, description="clips in flight", json_schema_extra=NEUTRAL)


class Evaluate(Section):
    """The held-out comparison."""

    roles: Annotated[tuple[Literal["base", "sft", "reference", "policy"], ...], Strict(False)] = Field(
        ("base", "sft", "reference", "policy"),
        description="who is compared (the policy under the method's name); [] leaves the evaluation out",
    )
    samples: Count = Field(2, description="sampled answers per prompt, beside the greedy one")
    temperature: Positive = Field(1.0, description="temperature of sampling")
    temperatures: Annotated[tuple[Positive, ...], Strict(False)] = Field(
        (0.7, 0.5, 0.3), description="SFT's control: lower temperatures, so that sharpening is not taken for alignment"
    )
    best_of: Count | None = Field(
        None, description="also the policy's best of so many answers, by its own reward against `reference`; null: not"
    )
    shuffled: bool = Field(True, description="also answer with the frames shuffled: how much the order matters")
    max_new_tokens: Count = Field(64, description="longest answer")
    batch_size: Count = Field(64, description="answers in flight")
    bootstrap: Count = Field(2000, description="resamples for the intervals")
    truth: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="`module:function` that says what is true of an answer; null: the records' own `facts`",
    )
    synonyms: FilePath | None = Field(
        None, description="file with a line per object, its name and synonyms, for annotated facts; null: names alone"
    )
    examples: int = Field(10, ge=0, description="videos shown in the report")
