"""What every stage holds, phase by phase: weights and adapters all the time, and beside them what one phase needs.

Sizes of batches stand in the recipe; a phase says which key shrinks it, so that the plan can propose a value that fits.
"""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from ..model.answers import sharing_pays
from ..recipe import Recipe
from . import host, memory
from .lengths import Lengths, Texts
from .memory import ADAPTER
from .shapes import Shapes, file_bytes, text_model_bytes, video_text, video_tokens

MOST = 512  # answers at a time that the plan proposes at most
NOTHING = Texts(0, 0, 0.0, 0, 0, 0, True)


class Phase(NamedTuple):
    """A part of a stage, and what it holds when `rows` go through at once."""

    name: str
    key: str | None  # recipe key that says how many rows; None: nothing does
    rows: int
    most: int  # rows that it may have at all
    terms: Callable[[int], dict[str, int]]  # rows -> bytes by kind


class StageMemory(NamedTuple):
    """One stage."""

    fixed: dict[str, int]  # bytes by kind, all the time
    phases: list[Phase]
    host: dict[str, int] = {}  # bytes by kind that the process holds besides; on a GPU in host memory


class MemoryModel:
    """The stages of one recipe on one device; `judge` is the reward role's own base, where it has one, and `on_gpu`
    decides how logits are cut and what a heap does."""

    def __init__(self, recipe: Recipe, shapes: Shapes, judge: Shapes | None, lengths: Lengths, on_gpu: bool):
        self.recipe, self.shapes, self.judge, self.lengths, self.on_gpu = recipe, shapes, judge, lengths, on_gpu
        self.video, self.clip = (
            video_tokens(shapes, recipe.features, frames) + video_text(shapes, frames, lengths.count)
            for frames in (recipe.features.frames, recipe.features.clip_frames)
        )
        self.template = lengths.template

    def stages(self) -> dict[str, StageMemory]:
        """The stages that the recipe runs."""
        plans = {
            "data": lambda: StageMemory({}, []),
            "features": self.features,
            "sft": self.sft,
            "context": self.context,
            "preference": self.preference,
            "reward": self.reward,
            "ppo": self.ppo,
            "dpo": self.dpo,
            "evaluate": self.evaluate,
        }
        videos = host.videos_of(self.recipe, [self.shapes] + ([self.judge] if self.judge else []), self.lengths)
        held = host.held(videos, self.lengths, self.shapes.vocabulary)
        before = held | {"features": 0, "libraries": 0}  # none is read before they are made
        stages = {name: plans[name]() for name in self.recipe.stages}
        return {
            name: stage._replace(host=stage.host | (before if name in ("data", "features") else held))
            for name, stage in stages.items()
        }

    # ---- the stages

    def features(self) -> StageMemory:
        model, section = self.recipe.model, self.recipe.features
        held = {"weights": self.shapes.base_bytes(model, tower=True)}
        splits, narrated = self.lengths.splits.items(), self.recipe.narrated
        clips = max((section.clips if name in narrated else ceil(texts.clips) for name, texts in splits), default=0)
        encode = lambda rows: {"activations": memory.tower(self.shapes, section, clips, self.on_gpu)}
        # On a CPU the weight file is mapped until its tensors are quantised, and counts as this process's memory.
        file = {} if self.on_gpu or model.quantization == "none" else {"weight file": file_bytes(model)}
        phases = [Phase("load", None, 1, 1, lambda rows: file), Phase("encode", None, 1, 1, encode)]
        if (judge := self.judge) is not None:  # its tower comes when the base's own was dropped
            more = judge.base_bytes(model.for_reward(), tower=True) - self.shapes.tower * self.shapes.dtype.itemsize
            again = lambda rows: {"weights": more, "activations": memory.tower(judge, section, clips, self.on_gpu)}
            phases.append(Phase("encode for the reward role", None, 1, 1, again))
        return StageMemory(held, phases)

    def sft(self) -> StageMemory:
        sft, phases = self.recipe.sft, []
        for name, section in (("easy", sft.easy), ("hard", sft.hard), ("policy_init", sft.policy_init)):
            split = name if name == "policy_init" else f"sft_{name}"
            if section is not None and split in self.lengths.splits:
                texts = self.texts(split)
                if sft.replay and name != "easy":  # records of the easy phase come in between
                    texts = max(texts, self.texts("sft_easy"), key=lambda t: t.both)
                phases.append(self.training(f"sft.{name}", section, self.video + texts.both, texts.answer))
        return StageMemory(self.holds(2, trained=min(1, len(phases))), phases)

    def context(self) -> StageMemory:
        section = self.recipe.context
        if not self.recipe.narrated:
            return StageMemory({}, [])
        prompt = self.clip + self.template + self.lengths.count(section.prompt)
        sampling = self.sampling("context.batch_size", section.batch_size, MOST, prompt, section.max_new_tokens)
        return StageMemory(self.holds(1), [sampling])

    def preference(self) -> StageMemory:
        section = self.recipe.preference
        if not self.recipe.data.preference:  # pairs are given, or there are none
            return StageMemory({}, [])
        prompt, narrated = self.texts("preference").prompt, section.context or section.compare_context
        judges = [section.judge] if not section.compare_pairs else ["claims", "pairwise"]
        reading = self.judging(judges, prompt, section.max_new_tokens, self.narrative() * narrated)
        key, size = "preference.batch_size", section.batch_size
        answers = self.sampling(key, size, MOST, self.video + prompt, section.max_new_tokens)
        return StageMemory(self.holds(1) | self.outside(section.judge), [answers, *reading])

    def dpo(self) -> StageMemory:
        """One adapter at a time is in memory, the policy's while it is trained; with a KL the reference's as well."""
        section, preference = self.recipe.dpo, self.recipe.preference
        prompt, answer = self.texts("preference").prompt, preference.max_new_tokens
        phases = [self.sampling("preference.batch_size", preference.batch_size, MOST, self.video + prompt, answer)]
        held = 1 + (section.kl_weight > 0)
        fixed, context = self.holds(held) | self.outside(preference.judge), self.narrative() * preference.context
        adam = {kind: size for kind, size in self.holds(held, trained=1).items() if kind not in fixed}

        def trained(phase: Phase) -> Phase:
            return phase._replace(terms=lambda rows: phase.terms(rows) | adam)

        if section.describe is not None:  # clip by clip, as the narrative was
            words, size = self.recipe.context.max_new_tokens, self.recipe.context.batch_size
            read = self.clip + self.template + self.lengths.count(section.describe.prompt) + context
            phases.append(self.sampling("context.batch_size", size, MOST, read, words))
        if (divide := section.divide) is not None:
            lists = divide.max_new_tokens
            asked = self.template + lists + max(self.lengths.count(text or "") for text in (divide.split, divide.ask))
            if divide.model is not None:  # it comes and goes within the stage
                fixed["text model"] = text_model_bytes(divide.model, self.on_gpu)
            else:
                phases.append(self.sampling("dpo.divide.batch_size", divide.batch_size, MOST, asked, lists))
            if divide.train is not None:
                phases.append(trained(self.training("dpo.divide.train", divide.train, asked + lists, lists)))
        judges = [preference.judge] if divide is None else ["claims"]
        phases += self.judging(judges, prompt, answer, context)
        rows, length = self.of_pair(self.video + prompt, answer)
        learnt = self.training("dpo", section, length, 2 * answer, rows)
        return StageMemory(fixed, [*phases, trained(learnt)])

    def reward(self) -> StageMemory:
        section = self.recipe.reward
        own, trained = self if self.judge is None else self.of_judge(), section.adapter is None
        fixed = own.holds(1 + (trained and self.judge is None), trained=int(trained))
        if self.judge is not None:
            fixed["weights"] += self.shapes.base_bytes(self.recipe.model, tower=False)  # it was loaded before
        per_pair, length = own.of_pair(own.scored() - own.pair_answer, own.pair_answer)
        if trained:
            return StageMemory(fixed, [own.training("reward", section, length, 0, per_pair)])
        rows = int(section.micro_batch or section.batch_size)
        read = own.reading("measure", "reward.micro_batch", rows, length)
        return StageMemory(
            fixed, [read._replace(most=section.batch_size, terms=lambda rows: read.terms(per_pair * rows))]
        )

    def ppo(self) -> StageMemory:
        section, new = self.recipe.ppo, self.recipe.ppo.max_new_tokens
        prompt, rewarded = self.video + self.texts("rl").prompt, section.feedback == "reward_model"
        judged = self.scored() - self.pair_answer if rewarded else prompt  # what the judging and value roles read first
        length = max(prompt, judged) + new
        critic = section.value == "adapter"
        judging = section.feedback not in ("rules", "outside") and (not rewarded or self.judge is None)
        fixed = self.holds(2 + critic + judging, trained=1 + critic) | self.outside(section.feedback)
        # in host memory: what an update that runs out of memory is undone with
        undo = {"copy to undo": 3 * ADAPTER * self.shapes.lora * (1 + critic)}
        micro = int(section.micro_batch or section.minibatch)

        def update(rows: int) -> dict[str, int]:
            return self.learning(rows, length, rows * new)

        answers = self.sampling("ppo.slots", int(section.slots or section.rollouts), section.rollouts, prompt, new)
        phases = [answers, Phase("update", "ppo.micro_batch", micro, section.minibatch, update)]
        if section.feedback in ("ranking", "interventions"):
            judges = [self.recipe.preference.judge if section.feedback == "ranking" else "claims"]
            phases += self.judging(judges, self.texts("rl").prompt, new, self.narrative() * bool(self.recipe.narrated))
        elif rewarded and self.judge is not None:
            own = self.of_judge()
            for kind, size in own.holds(1).items():
                fixed[kind] += size
            judged = own.scored() - self.pair_answer + new
            phases.append(own.reading("reward scores", "ppo.micro_batch", micro, judged, section.minibatch))
        return StageMemory(fixed, phases, undo)

    def evaluate(self) -> StageMemory:
        section = self.recipe.evaluate
        if not section.roles:
            return StageMemory({}, [])
        prompt = self.video + self.texts("test").prompt
        sampling = self.sampling("evaluate.batch_size", section.batch_size, MOST, prompt, section.max_new_tokens)
        if section.best_of is None:
            return StageMemory(self.holds(1), [sampling])
        length = prompt + section.max_new_tokens  # of the answers as two roles read them
        reading = self.reading("best of several", "evaluate.batch_size", section.batch_size, length)
        return StageMemory(self.holds(2), [sampling, reading])

    # ---- what they are made of

    def of_judge(self) -> "MemoryModel":
        """The same, on the reward role's own base."""
        recipe = self.recipe.model_copy(update={"model": self.recipe.model.for_reward()})
        return MemoryModel(recipe, self.judge, None, self.lengths, self.on_gpu)

    def scored(self) -> int:
        """Tokens of an answer with what the reward role reads before it."""
        template = self.recipe.reward.prompt
        prompt = self.texts("preference" if "preference" in self.lengths.splits else "rl").prompt
        if template is not None:
            question = prompt - self.template if "{question}" in template else 0
            prompt = self.template + question + self.lengths.count(template)
            prompt += self.narrative() * self.recipe.reward.context
        return self.video + prompt + self.pair_answer

    def of_pair(self, prompt: int, answer: int) -> tuple[int, int]:
        """(rows, tokens of each) of two answers to one prompt: branches of it where that pays (`model/answers.py`)."""
        if sharing_pays(self.shapes.width, [(prompt, [answer, answer])]):
            return 1, prompt + 2 * answer
        return 2, prompt + answer

    @property
    def pair_answer(self) -> int:
        """Tokens of the longest answer of a pair: as it is given, or as it may be sampled."""
        return self.texts("preference").answer if self.recipe.data.pairs else self.recipe.preference.max_new_tokens

    def judging(self, judges: list[str], prompt: int, answer: int, context: int) -> list[Phase]:
        """Answers to a prompt read by a judge: an answer whole, or its claims one by one, each with what is asked."""
        section, count = self.recipe.preference, self.lengths.count
        claims, pairwise = section.claims.prompt, section.pairwise.prompt
        if section.claims.mode == "inline":
            claimed = count(claims) + answer
        else:
            claimed = -(-answer // memory.CLAIM) * (memory.CLAIM + count(claims))

        def asked(template: str) -> int:
            question = (prompt - self.template) * ("{question}" in template)
            return self.video + context + self.template + question

        lengths = {"claims": asked(claims) + claimed, "pairwise": asked(pairwise) + count(pairwise) + 2 * answer}
        key, size = "preference.batch_size", section.batch_size
        return [self.reading(f"judge, {judge}", key, size, lengths[judge]) for judge in judges if judge in lengths]

    def outside(self, judge: str) -> dict[str, int]:
        """The model on this machine that judges from outside, where the recipe has one."""
        section = self.recipe.preference.outside
        used = judge == "outside" and section.url is None and section.model is not None
        return {"text model": text_model_bytes(section.model, self.on_gpu)} if used else {}

    def narrative(self) -> int:
        """Tokens of all captions with the words that head them."""
        heading = 1 if self.recipe.context.markers else 12
        return self.recipe.features.clips * (self.recipe.context.max_new_tokens + heading)

    def texts(self, split: str) -> Texts:
        return self.lengths.splits.get(split, NOTHING)

    def holds(self, roles: int, trained: int = 0) -> dict[str, int]:
        """Base and adapters; of the trained ones also Adam's moments, and the gradients of one at a time."""
        size = ADAPTER * self.shapes.lora
        out = {"weights": self.shapes.base_bytes(self.recipe.model, tower=False), "adapters": roles * size}
        return out | ({"optimizer": 2 * trained * size, "gradients": size} if trained else {})

    def activations(self, kept: int, tokens: int) -> dict[str, int]:
        if self.on_gpu:
            return {"activations": kept, "workspace": memory.CUBLAS}
        return {"activations": memory.on_heap(self.shapes, tokens, kept)}

    def learning(self, rows: int, length: int, scored: int) -> dict[str, int]:
        """A forward and backward; of what is held, the logits are what comes on top of the layers' own peak."""
        head = memory.logits(self.shapes, scored, self.on_gpu) if scored else 0
        layers = memory.training(self.shapes, self.recipe.model, rows, length)
        both = memory.training(self.shapes, self.recipe.model, rows, length, head)
        return self.activations(layers, rows * length) | {"logits": both - layers}

    def training(self, key: str, section, length: int, scored: int, per_record: int = 1) -> Phase:
        """A supervised phase: records of `per_record` rows of `length` tokens, `scored` tokens of a record against the
        vocabulary."""

        def terms(rows: int) -> dict[str, int]:
            return self.learning(rows * per_record, length, rows * scored)

        return Phase(
            key, f"{key}.micro_batch", int(section.micro_batch or section.batch_size), section.batch_size, terms
        )

    def sampling(self, key: str, rows: int, most: int, prompt: int, new: int) -> Phase:
        """Answers in flight, `most` of them at all."""

        def terms(rows: int) -> dict[str, int]:
            held = {"kv_slots": memory.slots(self.shapes, rows, prompt, new)}
            copied = {True: self.shapes.linear, "attention": self.shapes.attention}
            dense = copied.get(self.recipe.model.dense_rollouts, 0)
            held["dense copy"] = dense * self.shapes.dtype.itemsize
            tokens = min(rows * prompt, memory.PREFILL_TOKENS)
            found = self.activations(memory.sampling(self.shapes, rows, prompt, new), tokens)
            return {kind: found.get(kind, 0) + held.get(kind, 0) for kind in found | held}

        return Phase("sampling", key, rows, max(rows, most), terms)

    def reading(self, name: str, key: str, rows: int, length: int, most: int = MOST) -> Phase:
        """Rows that are read without gradients."""
        terms = lambda rows: self.activations(memory.forward(self.shapes, rows, length), rows * length)
        return Phase(name, key, rows, max(rows, most), terms)
