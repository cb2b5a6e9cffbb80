"""The plan of a run: what each stage takes of memory, disk and time, whether that fits, and what to change if not."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import ranks
from ..errors import RecipeError, StageError
from ..model.known_bases import shipped_facts
from ..model.limits import positions_of, sampled, too_long
from ..recipe import Recipe, load_recipe
from ..training.meter import give_back
from ..workspace import pick_device
from . import memory, rates
from .host import videos_of
from .lengths import Lengths, lengths_of
from .memory import ADAPTER
from .several import REACHED, Link, Several, link_of, of_one_rank, on_ranks, refuse_groups, updates
from .shapes import Shapes, shapes_of, video_text, video_tokens
from .stages import MemoryModel, Phase, StageMemory

MICRO = (
    "sft.easy.micro_batch",
    "sft.hard.micro_batch",
    "sft.policy_init.micro_batch",
    "reward.micro_batch",
    "ppo.micro_batch",
    "dpo.micro_batch",
    "dpo.divide.train.micro_batch",
)
AUTO = (*MICRO, "ppo.slots")
CHECKPOINTING, DENSE = "model.gradient_checkpointing", "model.dense_rollouts"
WORLD_VIDEO = 67_000  # bytes of one of the world's files; measured
ON_HOST = 4 << 30  # ASSUMED: the process beside a GPU, with CUDA's libraries
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


StagesOf = Callable[[Recipe], dict[str, StageMemory]]


class Device(NamedTuple):
    """Where a run goes."""

    name: str
    on_gpu: bool
    memory: int  # bytes that there are for this process
    process: int  # bytes it holds already: on a CPU the interpreter and its libraries
    reserve: int  # bytes that no plan may count on

    @property
    def room(self) -> int:
        return self.memory - self.reserve


class StagePlan(NamedTuple):
    """One stage."""

    peak: int  # bytes, as the run will measure it
    phase: str  # in which the peak comes
    terms: dict[str, int]  # bytes by kind at the peak; they sum to it
    fits: bool
    proposals: dict[str, int]  # recipe key -> the largest value that fits, for all keys that matter to this stage
    change: str | None  # what to do where it does not fit
    host: int  # bytes of host memory
    disk: int | None  # bytes that it leaves on disk; None: its data are not here
    seconds: float | None  # of one process; None: not known
    basis: str  # where the time comes from
    several: Several | None  # None: one process


class Plan(NamedTuple):
    """A whole run; `recipe` has numbers where the recipe given had `auto`."""

    recipe: Recipe
    device: Device
    stages: dict[str, StagePlan]
    notes: list[str]  # what had to be assumed
    video_tokens: int  # of a whole video, pruned as the recipe says, and of the text that its family writes around it
    too_long: list[str]  # records that take more positions than the base has
    ranks: int  # that share the work, each with a card of its own
    link: Link  # between them

    @property
    def fits(self) -> bool:
        """Every stage into memory, and every record into the base's positions."""
        return not self.too_long and all(stage.fits for stage in self.stages.values())


def device_of(recipe: Recipe, gpu: str | None, here: int) -> Device:
    """The device that the recipe asks for on this machine, or a card of the size given ("24GB"). On a CPU `here` ranks
    share the memory."""
    if gpu is not None:
        size = size_in_bytes(gpu)
        return Device(f"a card of {gpu}", True, size, 0, reserve_of(size))
    device = torch.device(pick_device(recipe.device))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = free + torch.cuda.memory_reserved(device)
        return Device(torch.cuda.get_device_name(device), True, size, 0, reserve_of(size))
    return Device("cpu", False, host_memory() // here, resident(), 0)


def reserve_of(size: int) -> int:
    """Bytes of a GPU's `size` that no tensor can have: the CUDA context, and what the allocator cannot use."""
    return size - int((size - memory.CONTEXT) / (1 + memory.FRAGMENTATION))


def size_in_bytes(text: str) -> int:
    """ "24GB" -> 24e9, "24GiB" -> 24 * 2**30. Raises RecipeError for what is no size."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found:
        raise RecipeError(f"{text} is no size of memory. Write it as 24GB (10^9 bytes) or 24GiB (2^30).")
    return int(float(found[1]) * UNITS[found[2]])


def host_memory() -> int:
    """Bytes of memory that this machine, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def make_plan(recipe: Recipe, gpu: str | None = None, cards: int | None = None, link: str = "pcie") -> Plan:
    """Plan every stage from config files, the data that is here, and arithmetic; nothing else is read or loaded.

    cards: ranks on one machine that share the work; None: those that a launcher started. Raises ModelError for a base
    that is not supported or whose config cannot be read, and StageError for a number of ranks that cannot be."""
    count, here = (ranks.count(), ranks.on_this_machine()) if cards is None else (cards, cards)
    refuse_groups(recipe, count)
    joined = link_of(link)
    device = device_of(recipe, gpu, here)
    kind = torch.device("cuda" if device.on_gpu else "cpu")
    shapes, lengths = shapes_of(recipe.model, kind), lengths_of(recipe)
    judge = None if recipe.model.reward_base is None else shapes_of(recipe.model.for_reward(), kind)
    if not device.on_gpu:  # reading the config files has made the process larger
        give_back()  # as every stage does first
        device = device._replace(process=resident())

    def stages_of(recipe: Recipe, count: int = count) -> dict[str, StageMemory]:
        stages = MemoryModel(recipe, shapes, judge, lengths, device.on_gpu).stages()
        shared = (*AUTO, "ppo.slots")
        share = lambda phases: [of_one_rank(phase, count, shared) for phase in phases]
        return {name: stage._replace(phases=share(stage.phases)) for name, stage in stages.items()}

    # the same for any number of ranks
    given, recipe = recipe, _with_numbers(recipe, device, lambda recipe: stages_of(recipe, 1))
    exchanged = updates(recipe, shapes, judge, lengths)
    disk, times = _disk(recipe, shapes, judge, lengths), rates.seconds(recipe, lengths, device.on_gpu)
    stages = {}
    for name, stage in stages_of(recipe).items():
        peak, phase, terms = _peak(stage, device)
        change = None if peak <= device.room else _change(recipe, name, stage, device, stages_of)
        stages[name] = StagePlan(
            peak,
            phase,
            terms,
            change is None,
            _proposals(stage, device),
            change,
            ON_HOST + sum(stage.host.values()) if device.on_gpu else peak,
            disk.get(name, 0),
            *times[name],
            None if count == 1 else on_ranks(name, times[name][0], exchanged[name], count, joined),
        )
    notes = [
        f"data.{name}: its files are not here; {texts.both} tokens a record are assumed"
        for name, texts in lengths.splits.items()
        if not texts.known
    ]
    for section in (recipe.model, *([] if judge is None else [recipe.model.for_reward()])):
        if shipped_facts(section):
            notes.append(f"the sizes of {section.base} are those that came with this package; it is not on this disk")
    if given.model.gradient_checkpointing == "auto":
        notes.append(_checkpointing(recipe, device, stages_of))
    if shapes.images.patch:
        notes.append("frames are taken to be 360 x 640 pixels; a video of another shape has other tokens")
    if any(step.dtd is not None for step in recipe.features.prune):
        notes.append("how many tokens `dtd` keeps depends on the video: planned for all of them")
    if device.on_gpu:
        notes.append("no GPU figure was measured on one: derived from shapes and from peaks of the same code on a CPU")
    frames = recipe.features.frames
    video = video_tokens(shapes, recipe.features, frames) + video_text(shapes, frames, lengths.count)
    if count > 1:
        notes.append(
            f"memory is of one of {count} ranks; a ring over {joined.name} reaches {REACHED:.0%} of its bandwidth"
        )
    too_long = _too_long(recipe, shapes, lengths, video)
    return Plan(recipe, device, stages, notes, video, too_long, count, joined)


def _too_long(recipe: Recipe, shapes: Shapes, lengths: Lengths, video: int) -> list[str]:
    """The longest record of each split that does not fit into the base's positions."""
    positions, rooms, found = positions_of(shapes.config), sampled(recipe), []
    for name, texts in lengths.splits.items():
        if not texts.known or positions is None:
            continue
        prompt, answer = (texts.both - texts.answer, texts.answer) if name not in rooms else (texts.prompt, rooms[name])
        own = video if texts.videos else 0
        if own + prompt + answer > positions:
            found.append(too_long(f"data.{name}", texts.longest, own, prompt, answer, positions))
    return found


def _bytes(stage: StageMemory, phase: Phase, rows: int, device: Device) -> dict[str, int]:
    process = {"process": device.process} if device.process else {}
    terms = process | stage.fixed
    for added in (phase.terms(rows), {} if device.on_gpu else stage.host):
        for kind, size in added.items():
            terms[kind] = terms.get(kind, 0) + size
    return terms


def _peak(stage: StageMemory, device: Device) -> tuple[int, str, dict[str, int]]:
    """(bytes, phase, bytes by kind) of the phase that takes most."""
    idle = Phase("", None, 0, 0, lambda rows: {})
    found = [(phase.name, _bytes(stage, phase, phase.rows, device)) for phase in stage.phases or [idle]]
    name, terms = max(found, key=lambda each: sum(each[1].values()))
    return sum(terms.values()), name, terms


def _largest(stage: StageMemory, phase: Phase, device: Device) -> int:
    """The most rows that fit, those that may be `auto` evened out over as many pieces; 0 where not even one does."""
    fits = lambda rows: sum(_bytes(stage, phase, rows, device).values()) <= device.room
    low, high = 0, phase.most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return -(-phase.most // -(-phase.most // low)) if low and phase.key in AUTO else low


def _proposals(stage: StageMemory, device: Device) -> dict[str, int]:
    found: dict[str, int] = {}
    for phase in stage.phases:
        if phase.key is not None:
            found[phase.key] = min(_largest(stage, phase, device), found.get(phase.key, phase.most))
    return found


def _change(recipe: Recipe, name: str, stage: StageMemory, device: Device, stages_of: StagesOf) -> str:
    """What to do about a stage that does not fit: smaller batches, then recomputing, then a smaller problem."""
    wanted, most = [], _proposals(stage, device)
    for phase in stage.phases:
        if phase.key and sum(_bytes(stage, phase, phase.rows, device).values()) > device.room:
            if most[phase.key] == 0:
                return _smaller(recipe, name, phase.key, device, stages_of)
            where = recipe.where(phase.key)
            wanted.append(f"`{phase.key}` ({where}) is {phase.rows}; set it to {most[phase.key]}")
    alone = f"what it holds all the time is too much: take a smaller `model.base` ({recipe.where('model.base')})"
    return "; ".join(dict.fromkeys(wanted)) or alone


def _smaller(recipe: Recipe, name: str, size: str, device: Device, stages_of: StagesOf) -> str:
    """Not even one row fits at the key `size`."""
    if not recipe.model.gradient_checkpointing and size in MICRO:
        most = _proposals(stages_of(with_key(recipe, CHECKPOINTING, True))[name], device)[size]
        if most > 0:
            return f"set `{CHECKPOINTING}: true` ({recipe.where(CHECKPOINTING)}), and `{size}` to {most} at most"
    if recipe.model.quantization == "none":
        return f"set `model.quantization: nf4` ({recipe.where('model.quantization')})"
    return (
        f"not even one row fits at `{size}`: keep fewer video tokens (`features.prune`, "
        f"{recipe.where('features.prune')}), shorten the answers, or take a smaller base"
    )


def with_key(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with another value at a dotted key."""

    def put(section, names: list[str]):
        name, *rest = names
        return section.model_copy(update={name: put(getattr(section, name), rest) if rest else value})

    return put(recipe, key.split("."))


def get_key(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key; None below a section that the recipe leaves out."""
    value: Any = recipe
    for name in key.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _with_numbers(recipe: Recipe, device: Device, stages_of: StagesOf) -> Recipe:
    """Sizes that are `auto` become the largest that fit; where none does, 1, and the plan says so. Before that,
    `gradient_checkpointing: auto` becomes false where all stages fit without it, if need be with one row at a time.
    After it, `dense_rollouts: auto` becomes the largest copy that fits beside these sizes; on a CPU it is whole."""
    fits = lambda recipe: all(_peak(stage, device)[0] <= device.room for stage in stages_of(recipe).values())
    keys = [key for key in AUTO if get_key(recipe, key) == "auto"]
    for key in keys:
        recipe = with_key(recipe, key, 1)
    if choose := recipe.model.dense_rollouts == "auto":
        recipe = with_key(recipe, DENSE, not device.on_gpu)
    if recipe.model.gradient_checkpointing == "auto":
        recipe = with_key(recipe, CHECKPOINTING, False)
        if not fits(recipe):
            recipe = with_key(recipe, CHECKPOINTING, True)
    most: dict[str, int] = {}
    for stage in stages_of(recipe).values() if keys else ():
        most |= _proposals(stage, device)
    for key in keys:
        recipe = with_key(recipe, key, max(1, most.get(key, 1)))
    if choose and device.on_gpu:  # of what the sizes leave
        more = (with_key(recipe, DENSE, value) for value in (True, "attention"))
        recipe = next(filter(fits, more), recipe)
    return recipe


def _checkpointing(recipe: Recipe, device: Device, stages_of: StagesOf) -> str:
    """What `gradient_checkpointing: auto` came to, what that costs and what it saves, at the sizes of the plan."""
    on = bool(recipe.model.gradient_checkpointing)
    both = [stages_of(with_key(recipe, CHECKPOINTING, value)) for value in (on, not on)]
    peaks = [{name: _peak(stage, device)[0] for name, stage in stages.items()} for stages in both]
    name = max(recipe.stages, key=lambda stage: abs(peaks[0][stage] - peaks[1][stage]))
    here, other = (f"{each[name] / 2**30:.1f} GiB" for each in peaks)
    if on:
        return (
            f"{CHECKPOINTING}: auto is true: {name} takes {here} and not {other}; backwards compute the forward again"
        )
    return (
        f"{CHECKPOINTING}: auto is false: {name} takes {here} and not {other}; no backward computes the forward again"
    )


def resolve_auto(recipe: Recipe, folder: Path) -> Recipe:
    """`auto` as the run in `folder` resolved it when it began, so that resuming it gives the same bits."""
    keys = [key for key in (*AUTO, CHECKPOINTING, DENSE) if get_key(recipe, key) == "auto"]
    before = load_recipe(folder / "recipe.yaml") if keys and (folder / "recipe.yaml").exists() else None
    for key in keys:
        found = None if before is None else get_key(before, key)
        if key in (CHECKPOINTING, DENSE) and found is not None:
            recipe = with_key(recipe, key, found)
        elif isinstance(found, int):
            whole = key.replace("micro_batch", "minibatch" if key.startswith("ppo") else "batch_size")
            whole = whole.replace("slots", "rollouts")
            recipe = with_key(recipe, key, min(found, get_key(recipe, whole)))
    return recipe


def refuse(plan: Plan, until: str | None = None) -> None:
    """Raise StageError, naming the lines to change, where a stage up to `until` cannot fit, or a record cannot."""
    names = list(plan.stages)
    names = names[: names.index(until) + 1] if until in names else names
    gib = lambda count: f"{count / 2**30:.1f} GiB"
    lines = []
    for name in names:
        stage = plan.stages[name]
        if not stage.fits:
            largest = sorted(stage.terms.items(), key=lambda term: -term[1])[:3]
            held = ", ".join(f"{kind} {gib(size)}" for kind, size in largest)
            lines.append(f"  {name} takes {gib(stage.peak)} ({held}): {stage.change}.")
    if plan.too_long:
        raise StageError("\n".join(plan.too_long))
    if lines:
        have = f"{plan.device.name} has {gib(plan.device.memory)}, of which {gib(plan.device.reserve)} are kept free"
        raise StageError(f"This will not fit: {have}.\n" + "\n".join(lines) + "\nTo try all the same, add --force.")


def _disk(recipe: Recipe, shapes: Shapes, judge: Shapes | None, lengths: Lengths) -> dict[str, int | None]:
    """Bytes that stages leave behind: the world's videos, the feature cache, adapters and, while training, two
    checkpoints."""
    world, dpo, adapter = recipe.data.world, recipe.dpo, ADAPTER * shapes.lora
    videos = videos_of(recipe, [shapes] + ([judge] if judge else []), lengths)
    trained = 1 + (recipe.ppo.value == "adapter")
    return {
        "data": WORLD_VIDEO * (world.sft + world.preference + world.rl + world.test) if world else 0,
        "features": int(sum(v.count * v.features for v in videos)) if all(v.known for v in videos) else None,
        "sft": 2 * adapter + 2 * 3 * adapter,
        "reward": 7 * ADAPTER * (judge or shapes).lora,
        "ppo": trained * 7 * adapter,
        "dpo": (dpo.rounds + 1 + (dpo.divide is not None and dpo.divide.train is not None) + 2 * 3) * adapter,
    }
