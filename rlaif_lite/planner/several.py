"""What several ranks change about a plan: each has its share of a batch, and updates add up gradients over a link.

Bytes follow from the shapes. Seconds follow from the link's bandwidth, and from how much of a stage's time the ranks
share (`rates.SERIAL`). Nothing here was measured on GPUs. What a step waits for the slowest rank is not counted
(docs/many_cards.md has its formula).
"""

from typing import NamedTuple

from ..errors import RecipeError, StageError
from ..recipe import Recipe
from ..training.fit import steps_of
from .lengths import Lengths
from .memory import ADAPTER
from .rates import SERIAL, pairs_of
from .shapes import Shapes
from .stages import Phase

REACHED = 0.8  # share of a link's bandwidth that a ring reaches (ASSUMED)


class Link(NamedTuple):
    """What joins the cards, as data sheets have it."""

    name: str
    bandwidth: float  # bytes per second and direction, of one card (or of the machine's port)


LINKS = {
    "nvlink": Link("NVLink of an A100", 300e9),  # 600 GB/s, both directions together
    "pcie": Link("PCIe 4.0 x16", 32e9),
    "100gb": Link("100 Gb/s between machines", 12.5e9),
}


class Several(NamedTuple):
    """What N ranks make of one stage."""

    updates: int  # all-reduces of gradients
    bytes: int  # of gradients, all updates together
    exchange_seconds: float  # of all of them
    seconds: float | None  # of the stage; None: not known


def link_of(name: str) -> Link:
    """Raises RecipeError for a link that is not in the table."""
    if name not in LINKS:
        raise RecipeError(f"`--link {name}`: the table has no such link. It has {', '.join(LINKS)}.")
    return LINKS[name]


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """`size` bytes added up by a ring: every rank sends, and gets, each byte 2 (N - 1) / N times."""
    return 2 * (ranks - 1) / ranks * size / (REACHED * link.bandwidth)


def of_one_rank(phase: Phase, ranks: int, shared: tuple[str, ...]) -> Phase:
    """The phase with the rows that one rank has of a batch; `shared`: the keys of batches that ranks share."""
    if ranks == 1 or phase.key not in shared:
        return phase
    most = -(-phase.most // ranks)
    return phase._replace(rows=min(phase.rows, most), most=most)


def refuse_groups(recipe: Recipe, ranks: int) -> None:
    """Raises StageError where `ranks` do not divide the groups of answers of a PPO step."""
    size, rollouts = recipe.ppo.group_size, recipe.ppo.rollouts
    if recipe.method == "ppo" and size > 1 and (groups := rollouts // size) % ranks:
        raise StageError(
            f"{ranks} ranks do not divide the {groups} groups of a PPO step (`ppo.rollouts: {rollouts}` in groups of "
            f"{size}): a group stays on one rank. Start a number of ranks that divides {groups}, or set "
            f"`ppo.rollouts` to a multiple of {size * ranks}."
        )


def updates(recipe: Recipe, shapes: Shapes, judge: Shapes | None, lengths: Lengths) -> dict[str, list[tuple[int, int]]]:
    """{stage: [(all-reduces, bytes of gradients in each)]}; a head's are those of the base's width."""
    records = {name: texts.records for name, texts in lengths.splits.items()}
    adapter, ppo, dpo = ADAPTER * shapes.lora, recipe.ppo, recipe.dpo
    of_reward = judge or shapes
    phases = (("sft_easy", recipe.sft.easy), ("sft_hard", recipe.sft.hard), ("policy_init", recipe.sft.policy_init))
    trained = [(split, section) for split, section in phases if section is not None and split in records]
    minibatches = ppo.steps * ppo.epochs * -(-ppo.rollouts // ppo.minibatch)
    asked = (1 - dpo.heldout) * records.get("preference", 0)
    pairs = round(min(asked, dpo.prompts or asked)) * (1 if dpo.altered else dpo.pairs)
    critic = [(minibatches, adapter + ADAPTER * shapes.width)] * (ppo.value == "adapter")
    reward = steps_of(recipe.reward, pairs_of(recipe, lengths), recipe.reward.batch_size)
    found = {
        "sft": [(steps_of(section, records[split], section.batch_size), adapter) for split, section in trained],
        "reward": [(reward, ADAPTER * (of_reward.lora + of_reward.width))] * (recipe.reward.adapter is None),
        "ppo": [(minibatches, adapter), *critic],
        "dpo": [(dpo.rounds * steps_of(dpo, pairs, dpo.batch_size), adapter)],
    }
    return {stage: found.get(stage, []) for stage in recipe.stages}


def on_ranks(stage: str, seconds: float | None, made: list[tuple[int, int]], ranks: int, link: Link) -> Several:
    """A stage that one process does in `seconds`, done by N ranks: serial rest + shared / N + all-reduces."""
    exchange = sum(times * all_reduce_seconds(size, ranks, link) for times, size in made)
    serial = SERIAL.get(stage, 0.0)
    whole = None if seconds is None else seconds * (serial + (1 - serial) / ranks) + exchange
    return Several(sum(times for times, _ in made), sum(times * size for times, size in made), exchange, whole)
