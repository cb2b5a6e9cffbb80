"""What a stage reads of the recipe is what makes it stale: every key is recorded while the shipped tiny recipes run."""

import shutil
from pathlib import Path

import pytest

from core import RECIPE
from rlaif_lite import pipeline
from rlaif_lite.launchers import chain_of
from rlaif_lite.recipe import Recipe, Section, flatten, neutral_keys
from rlaif_lite.workspace import Workspace
from shrunk import shrunk

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("tiny*.yaml"))
# Read, but without a say in what the stage leaves.
HARMLESS = {
    "features": {  # the base is loaded whole, and only its tower is run, which is neither quantised nor adapted
        *("model.quantization", "model.loader", "model.dense_rollouts", "model.lora.rank", "model.lora.alpha"),
        *("model.lora.targets", "model.reward_base.quantization", "model.reward_base"),
        "model.chat_template",  # of texts; the tower sees frames
    },
    # A record that does not say of how many clips makes it an input of `sft` (`pipeline.inputs`); the world's do.
    "sft": {"features.clips"},
}
BY_RULES = ("ppo.feedback=rules", "ppo.rules.rewards=[{rule: length, tokens: [1, 4]}]")  # no shipped recipe has them


class Reads:
    """Records the dotted keys that are read of a recipe's sections."""

    def __init__(self, recipe: Recipe):
        self.keys: set[str] = set()
        self.on = False
        self._place: dict[int, str] = {}
        self._kind: dict[type, str] = {}
        self._held = recipe
        self._walk(recipe, "")

    def _walk(self, section: Section, prefix: str) -> None:
        self._place[id(section)] = prefix
        self._kind.setdefault(type(section), prefix)
        for name in type(section).model_fields:
            value = section.__dict__[name]
            if isinstance(value, Section):
                self._walk(value, f"{prefix}{name}.")

    def saw(self, section: Section, name: str) -> None:
        """A copy of a section (another base for the reward role) counts as the section that it is a copy of."""
        if self.on and name in type(section).model_fields and not isinstance(section.__dict__.get(name), Section):
            place = self._place.get(id(section), self._kind.get(type(section)))
            if place is not None:
                self.keys.add(place + name)


@pytest.fixture
def record(monkeypatch):
    def install(recipe: Recipe) -> Reads:
        reads = Reads(recipe)
        plain, dump = Section.__getattribute__, Section.model_dump

        def watched(self, name):
            if not name.startswith("_"):
                reads.saw(self, name)
            return plain(self, name)

        def dumped(self, *arguments, **keys):
            for name in type(self).model_fields:
                getattr(self, name)
            return dump(self, *arguments, **keys)

        def unwatched(whose: property) -> property:
            def found(self):
                on, reads.on = reads.on, False
                try:
                    return whose.fget(self)
                finally:
                    reads.on = on

            return property(found)

        for name in ("narrated", "altered"):  # inputs of their own, "splits with a narrative" and "altered videos"
            monkeypatch.setattr(Recipe, name, unwatched(getattr(Recipe, name)))
        monkeypatch.setattr(Section, "__getattribute__", watched)
        monkeypatch.setattr(Section, "model_dump", dumped)
        return reads

    return install


def covered(recipe: Recipe, name: str) -> set[str]:
    """Keys whose change makes a stage run again: its own, and those of stages that it needs, unless only they mind."""
    stage = pipeline.STAGES[name]
    keys = flatten(recipe)
    found = {key for key in keys if pipeline.under(key, stage.READS)}
    found -= {pipeline.GATES.get(name)}
    for need in stage.NEEDS:
        if need in recipe.stages:
            inward = pipeline.INWARD.get(need, ())
            found |= {key for key in covered(recipe, need) if not pipeline.under(key, inward)}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[tuple, Path]]:
    """(a folder for all runs of this file, {what a stage and those before it read: the run that did it})."""
    return tmp_path_factory.mktemp("reads"), {}


@pytest.mark.parametrize(
    "path, overrides",
    [
        *(pytest.param(path, (), id=path.stem) for path in RECIPES),
        pytest.param(RECIPES[0].with_name("tiny_grpo.yaml"), BY_RULES, id="rules"),
    ],
)
def test_every_key_that_a_stage_reads_makes_it_stale(path, overrides, runs, checkpoint, record):
    """A stage that an earlier recipe ran with all the same keys is copied: it would read the same again."""
    folder, known = runs
    recipe = shrunk(path, folder / f"{path.stem}{len(overrides)}", checkpoint, *overrides)
    reads = record(recipe)
    missed = {}
    for name, chain in zip(recipe.stages, chain_of(recipe), strict=True):
        work = Workspace(recipe)  # a fresh one: what it loads lazily belongs to the stage that asks
        reads_too = (chain, recipe.narrated, str(recipe.altered))
        if (source := known.setdefault(reads_too, work.folder)) != work.folder:
            for part in (name, *(f"adapters/{role}" for role in pipeline.LEAVES.get(name, ()))):
                if (source / part).exists():
                    shutil.copytree(source / part, work.folder / part)
            continue
        reads.keys.clear()
        reads.on = True
        pipeline.STAGES[name].run(work)
        reads.on = False
        missed[name] = reads.keys - covered(recipe, name) - neutral_keys() - HARMLESS.get(name, set())
        (work.stage(name) / "done.json").write_text("{}")  # some stages ask whether another is done
    assert not any(missed.values()), missed


def test_a_key_that_is_not_declared_is_found(recipe, monkeypatch, record):
    """The recorder itself, on a stage whose READS lack a key."""
    given = recipe()
    monkeypatch.setattr(pipeline.STAGES["context"], "READS", ("seed",))
    reads = record(given)
    reads.on = True
    assert given.context.prompt == RECIPE["context"]["prompt"]
    assert reads.keys == {"context.prompt"} and "context.prompt" not in covered(given, "context")
