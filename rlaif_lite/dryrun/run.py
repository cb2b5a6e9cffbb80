"""Drives the stages in a dry run and writes down what each phase costs, in the JSON shape of `rlaif-lite profile`.

Everything has the recipe's size. What is only repeated is run less often and multiplied: each phase takes one step, on
the first two micro-batches of one minibatch, and PPO goes over it in one epoch. Optimisers have their moments from the
beginning, as they have from the second step on.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .. import workspace
from ..errors import StageError
from ..judge.divide import Divided
from ..model.base import Base, resolve_base
from ..model.families import Encoded
from ..model.random_base import load_random
from ..model.roles import Roles
from ..phases import listen
from ..pipeline import STAGES
from ..planner import Plan, make_plan
from ..planner.memory import CLAIM
from ..profiler import stage_figures
from ..profiler.inputs import made_up, reduced, stand_ins, words, write_inputs
from ..profiler.recorder import Cost
from ..profiler.tables import SCHEMA, aligned, gib
from ..progress import say
from ..recipe import Recipe, recipe_hash
from ..rollout import Sampling
from ..stages import features, judging, reward, sft
from ..stages.dpo import judges, rounds
from ..stages.dpo import train as dpo_train
from ..stages.ppo import experience, step
from ..training import fit
from ..training.loop import split_micro
from ..training.meter import describe_machine, versions
from ..workspace import Workspace
from .cards import Card
from .device import pretended
from .tracker import Tracker

DRIVEN = tuple(name for name in STAGES if name != "data")
judge_round, divide_answers, through_tower = rounds.judge_round, judges.divide_answers, features.through_tower
KEPT = 2  # micro-batches of a minibatch: the second finds the gradients of the first
COUNTS = ("launches", "bytes_moved", "flops", "syncs", "host_copies")


@dataclass
class DryCost(Cost):
    """Of one phase, over all its calls."""

    launches: int = 0
    bytes_moved: int = 0
    flops: int = 0
    syncs: int = 0
    host_copies: int = 0


class DryRecorder:
    """A listener for one stage (see `phases`). As in a measured profile, the first step is dropped where there is a
    second, of another phase."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.costs: dict[str, DryCost] = {}
        self.steps = 0
        self.peak_memory_bytes = self.reserved_memory_bytes = 0
        self.seconds = self.measured_seconds = 0.0
        self._warmed = False
        tracker.begin()
        self._begin = self._since = Counter(tracker.sums)

    def step(self) -> None:
        if self.steps == 1 and not self._warmed:
            self.costs.clear()
            self.steps, self._warmed, self._since = 0, True, Counter(self.tracker.sums)
            self.tracker.syncs.clear()
            self.tracker.copies.clear()
        self.steps += 1

    @contextmanager
    def phase(self, name: str, count: int) -> Iterator[None]:
        tracker = self.tracker
        before, highest = Counter(tracker.sums), tracker.peak
        tracker.peak = tracker.live
        yield
        cost = self.costs.setdefault(name, DryCost())
        cost.calls += 1
        cost.count += count
        cost.seconds += tracker.sums["seconds"] - before["seconds"]
        cost.peak_memory_bytes = max(cost.peak_memory_bytes, tracker.peak)
        for each in COUNTS:
            setattr(cost, each, getattr(cost, each) + tracker.sums[each] - before[each])
        tracker.peak = max(tracker.peak, highest)

    def finish(self, times: dict[str, float]) -> None:
        """Multiply what was run less often than a step has it."""
        now = self.tracker.sums
        self.measured_seconds = now["seconds"] - self._since["seconds"]
        self.seconds = now["seconds"] - self._begin["seconds"]
        for name, cost in self.costs.items():
            often = times.get(name, 1.0)
            self.measured_seconds += (often - 1) * cost.seconds
            self.seconds += (often - 1) * cost.seconds
            cost.seconds *= often
            for each in ("calls", "count", *COUNTS):
                setattr(cost, each, round(often * getattr(cost, each)))
        self.peak_memory_bytes, self.reserved_memory_bytes = self.tracker.peak, self.tracker.allocator.peak


class Fewer:
    """Keeps the first micro-batches of each minibatch, of PPO's minibatches the first, and of the videos of one shape
    the first two, and says how often a phase of the whole step runs."""

    def __init__(self, recipe: Recipe):
        self.epochs = recipe.ppo.epochs
        self.micros = self.minibatches = 1.0  # in the recipe, for each that is run
        self.encoded: dict[tuple, list[Encoded]] = {}  # by the shape of the pixels, without features
        self.videos = 0

    def through_tower(self, base: Base, pixels_TCHW: Tensor, merged: int) -> Encoded:
        self.videos += 1
        before = self.encoded.setdefault((base.path, pixels_TCHW.shape), [])
        if len(before) == KEPT:
            return before[0]._replace(features_LGPD=torch.empty_like(before[0].features_LGPD, device=base.device))
        found = through_tower(base, pixels_TCHW, merged)
        before.append(found._replace(features_LGPD=found.features_LGPD.to("meta")))
        return found

    def split(self, batch: Sequence, size: int | None) -> list:
        found = split_micro(batch, size)
        self.micros = sum(map(len, found)) / sum(map(len, found[:KEPT]))  # the last one may be smaller
        return found[:KEPT]

    def cut(self, *args: object) -> list:
        found = experience.cut(*args)
        self.minibatches = float(len(found))
        return found[:1]

    def times(self, stage: str) -> dict[str, float]:
        if stage == "features":
            return {"tower": self.videos / sum(map(len, self.encoded.values()))}
        if stage != "ppo":
            return {"forward": self.micros, "backward": self.micros}
        score, update = self.micros * self.minibatches, self.micros * self.minibatches * self.epochs
        times = {f"score {role}": score for role in ("reference", "policy", "value", "reward")}
        times |= {f"update {role} {part}": update for role in ("policy", "value") for part in ("forward", "backward")}
        return times | {"update reference": update, "optimiser": self.minibatches * self.epochs}


def dry_profile(recipe: Recipe, card: Card, stages: Sequence[str], layers: int | None, trace: bool) -> dict:
    """What `stages` (none named: all that are driven and that the recipe runs) cost on `card`, as JSON has it.

    Raises StageError for a stage that is not driven, and for tensors on the wrong device."""
    known = [name for name in DRIVEN if name in recipe.stages]
    if unknown := [name for name in stages if name not in known]:
        raise StageError(f"There is no stage `{unknown[0]}` to run dry; there are {', '.join(known)}.")
    tracker = Tracker(card, trace=trace, expandable=True)  # as a run sets it (`workspace.pick_device`)
    fewer, found = Fewer(recipe), {}
    with opened(recipe, card, layers, tracker) as (work, plan, whole), pretended(tracker), without_files(fewer):
        chosen = [stage for stage in known if not stages or stage in stages]
        for stage in ["features", *(stage for stage in chosen if stage != "features")]:
            if stage != "features":
                stand_ins(work)
                work.release_roles()
            say(f"dry run: {stage}")
            recorder = DryRecorder(tracker)
            with listen(recorder):
                STAGES[stage].run(work)
            recorder.finish(fewer.times(stage))
            work.release_roles()
            if stage in chosen and recorder.costs:  # a recipe may leave nothing to do
                found[stage] = dry_figures(recorder, work, plan.stages[stage].peak, trace)
    machine = describe_machine() | {"device": f"{card.name}, not measured", "gpu_memory_bytes": card.memory}
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "random_weights": True,
        "steps": 1,
        "memory_cap_bytes": None,
        "matmul_flops": card.bf16 * card.matmul,
        "machine": machine,
        "versions": versions(),
        "dry": {
            "layers": layers,
            "card": card._asdict(),
            "planned_at_full_depth": {stage: whole.stages[stage].peak for stage in found},
        },
        "stages": found,
    }


def dry_figures(recorder: DryRecorder, work: Workspace, planned: int, trace: bool) -> dict:
    """A stage's figures in the schema of a measured profile, with what only a dry run can see."""
    card = recorder.tracker.card
    out = stage_figures(recorder, work.base(), card.bf16 * card.matmul, planned)
    for name, cost in recorder.costs.items():
        out["phases"][name] |= {each: getattr(cost, each) for each in COUNTS}
    out["reserved_memory_bytes"] = recorder.reserved_memory_bytes
    out["syncs"], out["host_copies"] = dict(recorder.tracker.syncs), dict(recorder.tracker.copies)
    return out | ({"at_peak": recorder.tracker.held_at_peak()} if trace else {})


@contextmanager
def opened(recipe: Recipe, card: Card, layers: int | None, tracker: Tracker) -> Iterator[tuple[Workspace, Plan, Plan]]:
    """The recipe on a base without weights, with one step of each training phase and made-up inputs; its plan, and that
    of the whole depth."""
    with tempfile.TemporaryDirectory(prefix="rlaif-dry-run-") as name:
        folder = Path(name)
        small = made_up(recipe, folder, small=False)
        if layers is not None:
            small = with_own_config(small, folder)
        small = reduced(small, folder, steps=0)  # and the one that warms up a measured profile
        small = small.model_copy(update={"device": "cuda", "ppo": small.ppo.model_copy(update={"epochs": 1})})
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(small.model.base))
        tracker.fillers = tuple(tokenizer.encode(word, add_special_tokens=False)[0] for word in ("video", "yes"))
        write_inputs(small, folder, tokenizer)
        plan = whole = make_plan(small, f"{card.memory}B")
        if layers is not None:  # what is `auto` is chosen for the whole depth
            cut_layers(folder, layers)
            plan = make_plan(whole.recipe, f"{card.memory}B")
        with patch.object(workspace, "pick_device", lambda _: "cuda"):
            yield Workspace(plan.recipe, load=load_random), plan, whole


def with_own_config(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a copy of its base's small files in `folder`, where they are not made up there already.

    Raises StageError for a base that is not on this disk."""
    path = Path(resolve_base(recipe.model.base))
    if path.is_relative_to(folder):
        return recipe
    if not path.is_dir():
        raise StageError(
            f"`--layers` works on the bases of the shipped recipes and on folders; the base is `{recipe.model.base}`. "
            "Leave it out."
        )
    shutil.copytree(path, folder / "base0", ignore=shutil.ignore_patterns("*.safetensors"))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(folder / "base0")})})


def cut_layers(folder: Path, layers: int) -> None:
    """The same widths with fewer layers."""
    for path in sorted(folder.glob("base*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["text_config"]["num_hidden_layers"] = layers
        if "layer_types" in config["text_config"]:
            config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:layers]
        path.write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def without_files(fewer: Fewer) -> Iterator[None]:
    """Weights have no values, so adapters and checkpoints are neither written nor read, and the check of PPO's first
    step has nothing to check. Steps are cut as `fewer` says."""
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.optim, "AdamW", WarmAdamW),
            (Roles, "save", save),
            (Roles, "load", load),
            (fit, "save", lambda *_: None),
            (fit, "load", lambda _: None),
            (step, "check_first_step", lambda *_: None),
            (step, "cut", fewer.cut),
            (features, "through_tower", fewer.through_tower),
            (rounds, "sample_answers", different_answers),
            (judges, "divide_answers", long_lists),
            (rounds, "judge_round", some_pairs),
            *((module, "split_micro", fewer.split) for module in (sft, reward, experience, dpo_train)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


class WarmAdamW(torch.optim.AdamW):
    """AdamW that has made its moments."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.step()
        self.zero_grad()


def different_answers(
    work: Workspace, role: str, records: list, sampling: Sampling, samples: int, *rest: object
) -> list[judging.Answers]:
    """`sample_answers`, and then answers of full length that differ, which sampled tokens without values do not."""
    judging.sample_answers(work, role, records, sampling, samples, *rest)
    tokenizer = work.base().tokenizer
    texts = [words(tokenizer, sampling.max_new_tokens - n) for n in range(samples)]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [judging.Answers(record, texts, ids) for record in records]


def long_lists(work: Workspace, answers: list, folder: Path, label: str) -> list[Divided]:
    """`divide_answers`, and then claims and questions that make up the longest list."""
    divide_answers(work, answers, folder, label)
    claims = [words(work.base().tokenizer, CLAIM)] * -(-work.recipe.preference.max_new_tokens // CLAIM)
    return [Divided(claims, claims)] * len(answers)


def some_pairs(
    work: Workspace, role: str, number: int, answers: list[judging.Answers], *rest: object
) -> rounds.ChosenPairs:
    """`judge_round`, and then pairs for two micro-batches, because a judge without values prefers nothing."""
    found = judge_round(work, role, number, answers, *rest)
    section = work.recipe.dpo
    count = min(section.batch_size, KEPT * (section.micro_batch or section.batch_size))
    pairs = []
    for of in (answers[i % len(answers)] for i in range(count)):
        (chosen, rejected), (chosen_ids, rejected_ids) = of.texts[:2], of.ids[:2]
        pairs.append(dpo_train.Preferred(of.record, chosen, rejected, chosen_ids, rejected_ids, margin=1.0))
    return found._replace(pairs=pairs)


def save(roles: Roles, name: str, folder: Path) -> None:
    """`Roles.save` without weights: an empty folder, and a mark where the role has a head."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name in roles.heads:
        (folder / "head.safetensors").touch()


def load(roles: Roles, name: str, folder: Path) -> None:
    """`Roles.load` of what `save` left: a fresh role."""
    roles.add(name)
    if (folder / "head.safetensors").exists():
        roles.add_head(name, zero=False)


def as_text(profile: dict, lines: int = 12) -> str:
    """The table that `rlaif-lite profile --dry` prints, the lines that make the host wait, and what holds the peak."""
    rows = [("stage", "phase", "calls", "ms", "share", "peak", "launches", "GB moved", "TFLOP", "syncs", "copies")]
    notes = []
    for stage, cost in profile["stages"].items():
        sizes = [gib(cost[key]) for key in ("peak_memory_bytes", "reserved_memory_bytes", "planned_memory_bytes")]
        rows.append((stage, "", "", f"{1e3 * cost['measured_seconds']:,.0f}", "", sizes[0], *[""] * 5))
        notes.append(f"{stage}: tensors {sizes[0]}, reserved {sizes[1]}, planned {sizes[2]}")
        for name, phase in cost["phases"].items():
            counts = [""] * 5
            if "launches" in phase:
                counts = [f"{phase['launches']:,}", f"{phase['bytes_moved'] / 1e9:,.1f}"]
                counts += [f"{phase['flops'] / 1e12:,.2f}", str(phase["syncs"]), str(phase["host_copies"])]
            took = f"{1e3 * phase['seconds']:,.1f}"
            peak = gib(phase["peak_memory_bytes"])
            rows.append(("", name, f"{phase['calls']:,}", took, f"{phase['share']:.1%}", peak, *counts))
        for what in ("syncs", "host_copies"):
            found = sorted(cost[what].items(), key=lambda each: -each[1])
            notes += [f"  {what.replace('_', ' ')} {count:6} {line}" for line, count in found[:lines]]
        notes += [f"  at the peak {gib(size)} {line}" for line, size in list(cost.get("at_peak", {}).items())[:lines]]
    layers = profile["dry"]["layers"]
    head = f"{profile['recipe']} on {profile['machine']['device']}: a roofline of shapes"
    head += "" if layers is None else f", {layers} layers"
    return "\n".join([head, aligned(rows), *notes])
