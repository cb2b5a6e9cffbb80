"""The data of the run: the synthetic world is made here when the recipe asks for one; files that are there are read
and counted.

Nothing is trained yet, so whatever is wrong with a file or a path is found now and not after an hour. So is a record
that the base cannot read (longer than its positions), and an answer that it cannot write (unknown words, special
tokens).
"""

from .. import ranks
from ..data.truth import TRUTH
from ..data.world import WorldConfig, WorldSplits, write_world
from ..model.limits import check_answers, check_lengths, load_limits, sampled
from ..progress import progress
from ..workspace import Workspace
from .ppo.rules import RuleReward, check_solutions

# What decides whether rules can read the solutions.
RULES = ("method", "ppo.feedback", "ppo.rules")
# What decides whether the base can read and write the records; it changes none of them.
CHECKED = (
    *("model.base", "model.revision", "model.chat_template", "features.frames", "features.prune", "sft.train_on"),
    *("preference.max_new_tokens", "ppo.max_new_tokens", "evaluate.max_new_tokens"),
    *RULES,
)
READS = ("data", *CHECKED, *TRUTH)
NEEDS = ()


def run(work: Workspace) -> dict:
    """Make the world's videos and files (once), read every split, and count records, videos and what is missing."""
    world = work.recipe.data.world
    if world is not None:
        splits = WorldSplits(sft=world.sft, preference=world.preference, rl=world.rl, test=world.test)
        with progress(world.sft + world.preference + world.rl + world.test, "world", unit="video") as bar:
            ranks.first(
                lambda: write_world(
                    work.data_folder,
                    splits,
                    world.seed,
                    WorldConfig(dropout=world.dropout, weak_video=world.weak_video),
                    workers=world.workers or ranks.cores(),
                    progress=lambda done, total: bar.advance(done - bar.done),
                )
            )
    check_texts(work)
    if work.recipe.method == "ppo" and work.recipe.ppo.feedback == "rules":
        check_solutions(work.recipe.ppo.rules, work.records("rl"), "data.rl")
        RuleReward(work.recipe.ppo.rules)  # loads the user's functions
    counts = {name: len(work.records(name)) for name in work.split_names()}
    known = work.truth.known(work.records("test")) if "test" in counts else 0  # refuses junk among all facts
    return {"records": counts, "missing_videos": len(work.missing_videos), "test_records_with_truth": known}


def check_texts(work: Workspace) -> None:
    """Raise DataError where the base cannot read a prompt or write an answer, with the record."""
    recipe = work.recipe
    limits = load_limits(recipe.model)
    rooms = sampled(recipe)
    for name in work.split_names():
        records, room = work.records(name), rooms.get(name)
        key = "data.pairs" if name == "preference" and recipe.data.pairs else f"data.{name}"
        if room is None:
            check_answers(limits, key, records, recipe.sft.train_on)
        check_lengths(limits, key, records, work.video_tokens, room)
