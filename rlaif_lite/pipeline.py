"""The order of the stages; what is done, what is stale and why; the summary.

A stage is finished when its folder holds `done.json`: what it read (recipe keys, and the digests of the stages before
it), what it returned, and the digest of what it left (see `run_folder.py`). When nothing of that changed it is skipped.
When something did, its folder is emptied and it runs again, and so do the stages that need it. A stage that was killed
has no `done.json` and goes on from its own checkpoint. What a stage read says all that decides what it finds, so a run
may also take a stage from another run that read the same (`share`).
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from . import __version__, ranks
from .data.splits import own_files
from .data.truth import module_file
from .errors import RlaifError, StageError
from .files import (
    clean,
    digest_of,
    file_digest,
    read_json,
    read_jsonl,
    read_sealed,
    remove,
    write_json,
    write_sealed,
    write_text,
)
from .model.base import base_digest
from .planner import Plan, make_plan, refuse, resolve_auto
from .progress import say
from .recipe import Recipe, dump_yaml, flatten, load_recipe, neutral_keys, recipe_hash
from .report import page
from .run_folder import MARKS, check, explained, left_by, only_run, seal
from .stages import context, data, dpo, evaluate, features, ppo, preference, reward, sft
from .training.health import counted, findings
from .training.loop import MetricsLog
from .training.meter import Meter, describe_machine, versions
from .video.cache import read_index
from .workspace import Workspace

STAGES = {
    "data": data,
    "features": features,
    "sft": sft,
    "context": context,
    "preference": preference,
    "reward": reward,
    "ppo": ppo,
    "dpo": dpo,
    "evaluate": evaluate,
}
# Roles that each stage leaves behind; emptied with it when it is stale.
LEAVES = {"sft": ("sft", "reference"), "reward": ("reward",), "ppo": ("policy", "value"), "dpo": ("policy", "divider")}
GATES = {"reward": "reward.floor"}  # a key of the stage's section that only a later stage acts on
# What makes a stage run again, but changes nothing that a later stage reads without asking for it by itself.
INWARD = {
    "data": (*data.CHECKED, "files of model.base"),
    "features": ("splits with a narrative", "altered videos", "features.clips", "features.clip_frames"),
}


def run(
    recipe: Recipe, until: str | None = None, again: str | None = None, force: bool = False, share: Path | None = None
) -> dict:
    """Run every stage that is not done, up to and including `until`; returns the summary, which also lies in the run
    folder. The stage `again` runs whether it is done or not. A stage that a run folder in `share` has done from the
    same inputs is taken from there.

    Memory is planned first; `force` starts what cannot fit. The report is written at the end, also of a run that a
    stage ended early. Raises StageError for an unknown stage and for a plan that does not fit, and whatever the stages
    raise; what was done before stays done."""
    if until is not None and until not in recipe.stages:
        raise StageError(f"There is no stage `{until}`; the stages are {', '.join(recipe.stages)}.")
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    folder = Path(recipe.output)
    digests: dict[str, str] = {}
    here = lambda: list(digests)[-1] if digests else str(folder)
    with explained(folder, here, lambda: list(digests)[:-1]), ExitStack() as held:
        here_and_there = {"output": str(Path(recipe.output).absolute())}
        for what, value in (
            ("the recipe", flatten(recipe) | here_and_there),
            ("the code of rlaif_lite", code_digest()),
            ("the environment", versions()),
        ):
            ranks.same(what, value, "The ranks must agree")
        plan = ranks.first(lambda: make_plan(resolve_auto(recipe, folder)))
        recipe = plan.recipe
        if not force:
            refuse(plan, until)
        work = Workspace(recipe)
        work.video_tokens = plan.video_tokens
        ranks.first(lambda: hold(held, work.folder))
        ranks.check_folder(work.folder)
        write_text(work.folder / "recipe.yaml", dump_yaml(recipe))
        if again is not None:
            ranks.first(lambda: empty(work, again))
        try:
            for name in recipe.stages:
                run_stage(work, name, STAGES[name], digests, plan, share)
                ranks.first(lambda: write_summary(work, list(digests), finished=list(digests)[-1] == "evaluate"))
                if name == until:
                    break
        except BaseException:
            if ranks.is_first():
                with ranks.alone():
                    try:
                        if (work.folder / "summary.json").exists():
                            page.write(work.folder)
                    except (RlaifError, OSError, MemoryError) as error:  # it must not hide what ended the run
                        say(f"the report was not written: {error}")
            raise
        ranks.first(lambda: page.write(work.folder))
        say(f"{work.folder / 'report.html'}")
        return ranks.first(lambda: read_json(work.folder / "summary.json"))


def hold(held: ExitStack, folder: Path) -> None:
    """Make the run folder, and hold it until `held` closes."""
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_run(folder))
    clean(folder)


def code_digest() -> str:
    """Of the source of this package."""
    root = Path(__file__).parent
    return digest_of([(str(path.relative_to(root)), file_digest(path)) for path in sorted(root.rglob("*.py"))])


def evaluate_again(run_dir: Path, best_of: int | None = None) -> dict:
    """Evaluate a run's roles once more, by the recipe in its folder, and write its summary and report again;
    `best_of` sets `evaluate.best_of` in that recipe."""
    keys = [f"output={run_dir}"] + ([f"evaluate.best_of={best_of}"] if best_of else [])
    return run(load_recipe(run_dir / "recipe.yaml", keys), again="evaluate", force=True)


def run_stage(
    work: Workspace, name: str, stage: Any, digests: dict[str, str], plan: Plan, share: Path | None = None
) -> None:
    """Skip, take, resume or run one stage, and write its `done.json`; `digests` gains the stage's."""
    digests[name], reads, run = ranks.first(lambda: begin_stage(work, name, stage, digests, share))
    if not run:
        return
    with Meter(work.device) as meter:
        result = stage.run(work)
    work.release_roles()
    ranks.wait()  # all have read what a clean-up removes
    peak = max(ranks.gather(meter.peak_memory_bytes))
    ranks.first(lambda: end_stage(work, name, reads, result, meter.seconds, peak, plan.stages[name].peak))


def begin_stage(
    work: Workspace, name: str, stage: Any, digests: dict[str, str], share: Path | None
) -> tuple[str, dict[str, Any], bool]:
    """Skip or take a stage, or make ready to run it -> (its digest, what it reads, whether it is to run)."""
    folder = work.stage(name)
    reads = inputs(work, name, stage.READS) | {
        f"stage {need}": digests[need]
        for need in stage.NEEDS
        if need in digests  # a method has some of them
    }
    outward = {key: value for key, value in reads.items() if not under(key, INWARD.get(name, ()))}
    digest = digest_of([name, outward])
    done, begun = read_sealed(folder / "done.json"), read_sealed(folder / "begun.json")
    if done is not None and done["reads"] == reads:
        check(work.folder, name, done, work.log.digests())
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # of a run that was killed before it did so
        say(f"{name}: done before, nothing it reads has changed")
        write_sealed(folder / "done.json", done | {"status": "skipped"})
        return digest, reads, False
    remove_rivals(work, name)
    if share is not None and (source := finished_beside(work, name, reads, share)) is not None:
        say(f"{name}: taken from {source}, which read the same")
        take(work, name, source)
        return digest, reads, False
    before = (done or begun or {}).get("reads")
    if before is not None and before != reads:
        say(f"{name}: runs again, because {changes(before, reads)}")
        differ = {key for key in before.keys() | reads.keys() if before.get(key) != reads.get(key)}
        if name != "data" or not all(
            under(key, INWARD[name]) for key in differ
        ):  # else the records are only checked again
            empty(work, name)
    elif begun is not None:
        say(f"{name}: goes on where it was stopped")
    write_sealed(folder / "begun.json", {"reads": reads})
    return digest, reads, True


def end_stage(
    work: Workspace, name: str, reads: dict[str, Any], result: dict, seconds: float, peak: int, planned: int
) -> None:
    """Seal what a stage left and write its `done.json`."""
    folder = work.stage(name)
    cost = {"seconds": seconds, "peak_memory_bytes": peak, "planned_memory_bytes": planned, "ranks": ranks.count()}
    kept = {"files": seal(work.folder, name, outputs(work, name)), "metrics": work.log.digests().get(name)}
    write_sealed(folder / "done.json", {"reads": reads, "status": "done", "cost": cost, "result": result, **kept})
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    say(f"{name}: {seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB, planned {planned / 2**20:.0f}")


def finished_beside(work: Workspace, name: str, reads: dict[str, Any], share: Path) -> Path | None:
    """A run folder in `share` that has finished the stage from the same inputs, if what the stage leaves outside the
    run folder (the world's files, cached features) is where this run looks for it."""
    for path in sorted(share.glob(f"*/{name}/done.json")):
        run = path.parents[1]
        try:
            done = read_sealed(path)
            if done["reads"] != reads:
                continue
            check(run, name, done, MetricsLog(run / "metrics.jsonl").digests())
        except StageError as error:
            say(f"{name}: not taken from {run}. {error}")
            continue
        if name == "data" and work.recipe.data.world and not (work.data_folder / "world.json").exists():
            continue
        keys = [key for index in path.parent.glob("index*.json") for key in read_index(index).values()]
        if all(work.store.path(key).exists() for key in keys):
            return run
    return None


def take(work: Workspace, name: str, source: Path) -> None:
    """Make the stage's folder, adapters and metrics those of the run in `source`. Weights are hard links: they are only
    ever written anew, never into. A kill in the middle leaves the stage stale."""
    empty(work, name)
    write_sealed(work.stage(name) / "begun.json", {"reads": {"half taken from": str(source)}})
    roles = [f"adapters/{role}" for role in LEAVES.get(name, ()) if (source / "adapters" / role).exists()]
    left = shutil.ignore_patterns("begun.json", "done.json", "cache", "checkpoint")
    for folder in (name, *roles):
        shutil.copytree(source / folder, work.folder / folder, ignore=left, copy_function=link, dirs_exist_ok=True)
    work.log.take(name, source / "metrics.jsonl")
    done = {"shared_from": source.name} | read_sealed(source / name / "done.json") | {"status": "shared"}
    write_sealed(work.stage(name) / "begun.json", {"reads": done["reads"]})
    write_sealed(work.stage(name) / "done.json", done | {"files": seal(work.folder, name, outputs(work, name))})


def outputs(work: Workspace, name: str) -> list[Path]:
    """The files that a stage leaves: in its folder, its adapters, and the world where it is written elsewhere."""
    found = left_by(work.stage(name))
    for role in LEAVES.get(name, ()):
        found += [path for path in work.adapter(role).rglob("*") if path.is_file()]
    if name == "data" and work.recipe.data.world and work.data_folder != work.stage("data"):
        found += left_by(work.data_folder)
    return found


def link(source: str, target: str) -> None:
    """A hard link of weights where the file system has them; a copy otherwise, and of everything else."""
    try:
        if source.endswith(".safetensors"):
            os.link(source, target)
            return
    except OSError:
        pass
    shutil.copy2(source, target)


def under(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `names`, or a key of a section that they name."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def inputs(work: Workspace, name: str, reads: tuple[str, ...]) -> dict[str, Any]:
    """What a stage depends on beside the stages before it: recipe keys, the base's files, the data files, this
    version."""
    found = keys_read(work.recipe, name, reads)
    if "model.base" in found:
        found["files of model.base"] = base_digest(work.recipe.model)
    if "model.reward_base.base" in found:
        found["files of model.reward_base"] = base_digest(work.recipe.model.for_reward())
    if name in ("features", "context"):
        found["splits with a narrative"] = list(work.recipe.narrated)
    if name == "features":
        found["altered videos"] = {split: list(kinds) for split, kinds in work.recipe.altered.items()}
    for key in ("sft.adapter", "reward.adapter"):
        if found.get(key) is not None:
            found[f"files of {key}"] = folder_digest(Path(found[key]))
    if found.get("evaluate.synonyms") is not None:
        found["file of evaluate.synonyms"] = file_digest(Path(found["evaluate.synonyms"]))
    if found.get("evaluate.truth") is not None:
        found["code of evaluate.truth"] = file_digest(module_file(found["evaluate.truth"]))
    outside = work.recipe.preference.outside
    if found.get("preference.outside.model") and outside.url is None and Path(outside.model).is_dir():
        found["files of preference.outside.model"] = folder_digest(Path(outside.model))
    if name == "ppo" and work.recipe.ppo.feedback == "rules":
        for function in work.recipe.ppo.rules.own:
            found[f"code of {function}"] = file_digest(module_file(function, "ppo.rules.rewards"))
    if name == "sft" and own_files(work.recipe.data) and work.cut_by_recipe():
        found["features.clips"] = work.recipe.features.clips
    if name == "data":
        if work.recipe.method != "ppo" or work.recipe.ppo.feedback != "rules":  # no rule reads the solutions
            found = {key: value for key, value in found.items() if not under(key, data.RULES)}
        for path in own_files(work.recipe.data):
            found[f"file {path}"] = file_digest(path)
        if own_files(work.recipe.data):
            found["videos"] = work.videos_digest()
    return found | {"version": __version__}


def keys_read(recipe: Recipe, name: str, reads: tuple[str, ...]) -> dict[str, Any]:
    """The recipe's keys, with their values, that decide what a stage finds."""
    neutral = neutral_keys()
    return {
        key: value
        for key, value in flatten(recipe).items()
        if key not in neutral and key != GATES.get(name) and under(key, reads)
    }


def folder_digest(folder: Path) -> str:
    """Of an adapter that the run starts from. Raises StageError where it is gone: what was made from it is not
    stale."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors"))
    if not files:
        raise StageError(f"There is no adapter in {folder}. Paths start at {Path.cwd()}.")
    return digest_of([(path.name, file_digest(path)) for path in files])


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two sets of inputs, in words."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    said = [
        "videos were added, removed or replaced"
        if key == "videos" and key in before
        else f"{key} ran again"
        if key.startswith("stage ")
        else f"`{key}` was {before.get(key)!r} and is {now.get(key)!r}"
        for key in keys
    ]
    return "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if len(said) > 5 else "")


def empty(work: Workspace, name: str) -> None:
    """Remove what a stale stage left behind, but for cached features: they are found by content. What says that it is
    stale goes last, so that a kill in between leaves it stale."""
    work.log.drop(name)
    for role in LEAVES.get(name, ()):
        shutil.rmtree(work.adapter(role), ignore_errors=True)
    for path in sorted(work.stage(name).iterdir(), key=lambda p: p.name in MARKS):
        if path.name != "cache":
            remove(path)


def remove_rivals(work: Workspace, name: str) -> None:
    """Remove what another method's stage left if it made adapters of the same names as stage `name` makes. It is no
    longer done. A kill in the middle leaves it stale."""
    mine = set(LEAVES.get(name, ()))
    for other, roles in LEAVES.items():
        if other != name and mine.intersection(roles) and (work.folder / other / "done.json").exists():
            say(f"{other}: removed, because {name} makes adapters of the same names")
            write_sealed(work.folder / other / "begun.json", {"reads": {"replaced by": name}})
            (work.folder / other / "done.json").unlink()
            empty(work, other)


def write_summary(work: Workspace, stages: list[str], finished: bool) -> None:
    """`summary.json`: the contract of the design, with more beside it. `stages` are those that this run did or found
    done: what a stale stage once found does not belong to this recipe."""
    recipe = work.recipe
    found = {name: read_sealed(work.folder / name / "done.json") for name in stages}
    results = {name: done["result"] for name, done in found.items() if done is not None}
    evaluation = results.get("evaluate", {})
    write_json(
        work.folder / "summary.json",
        {
            "recipe": recipe.name,
            "recipe_hash": recipe_hash(recipe),
            "method": recipe.method,
            "feedback": recipe.ppo.feedback if recipe.method == "ppo" else None,
            "seed": recipe.seed,
            "world_seed": recipe.data.world.seed if recipe.data.world else None,
            "device": torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else "cpu",
            "machine": describe_machine(),
            "versions": versions(),
            "finished": finished,
            "stages": {
                name: done["cost"] | {key: done[key] for key in ("status", "shared_from") if key in done}
                for name, done in found.items()
                if done is not None
            },
            "health": findings(read_jsonl(work.log.path)) + counted(results),
            "features": results.get("features"),
            "evaluation": evaluation.get("evaluation", {}),
            "evaluation_intervals": evaluation.get("evaluation_intervals", {}),
            "order": evaluation.get("order", {}),
            "preference": results.get("preference", {}),
            "reward": results["reward"] | {"floor": recipe.reward.floor} if "reward" in results else {},
            recipe.method: results.get(recipe.method, {}),
        },
    )
