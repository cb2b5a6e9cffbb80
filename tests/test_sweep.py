"""A sweep: what its points share is done once, a killed one goes on, a failing point stops no other; its arithmetic."""

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from core import RECIPE
from rlaif_lite import cli
from rlaif_lite.errors import RecipeError
from rlaif_lite.report import grid as tables
from rlaif_lite.report.across import ROWS
from rlaif_lite.report.stats import t_quantile
from rlaif_lite.sweep import axis, folder_name, grid, sweep

ROOT = Path(__file__).parent.parent
SMALL = [
    "sft.easy.steps=1",
    "sft.hard.steps=1",
    "sft.policy_init.steps=1",
    "reward.steps=1",
    "ppo.steps=1",
    "evaluate.temperatures=[]",
    "evaluate.samples=1",
    "preference.compare_context=false",
    "preference.compare_pairs=0",
]
EARLY = ["data", "features", "sft", "context", "preference", "reward"]


@pytest.fixture
def path(checkpoint, tmp_path) -> Path:
    """A recipe file of the small recipe."""
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"model": RECIPE["model"] | {"base": str(checkpoint)}}))
    return file


class Stopped(KeyboardInterrupt):
    """As Ctrl-C and SIGTERM stop the command."""


@contextmanager
def stopped_when(condition):
    """Raises Stopped in the block, from a signal, once `condition()` holds."""

    def stop(*_):
        raise Stopped

    def watch():
        while not condition():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


# -------------------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_a_sweep_shares_goes_on_and_survives_a_failing_point(path, tmp_path):
    """Two floors, one of which no reward model reaches, times two seeds; stopped in its second point."""
    out = tmp_path / "out"
    over = ["--over", "seed=[3,4]", "--over", "reward.floor=[0.0,1.0]"]
    arguments = ["sweep", str(path), *over, "--out", str(out), *SMALL]
    point = lambda seed, floor: out / f"test_seed={seed}_reward.floor={floor}"
    second = point(3, "1.0")
    with stopped_when((second / "reward" / "done.json").exists), pytest.raises(Stopped):
        sweep([str(path)], ["seed=[3,4]", "reward.floor=[0.0,1.0]"], SMALL, out)
    assert not (second / "ppo" / "done.json").exists()
    with open(second / ".lock") as lock:  # the point's process has ended as well
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first = {file: file.stat().st_mtime_ns for file in (point(3, "0.0") / "adapters").rglob("*.safetensors")}

    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1, result.output
    found = json.loads((out / "sweep.json").read_text())
    by_folder = {one["folder"]: one for one in found["points"]}
    assert [one["reason"] is None for one in found["points"]] == [True, False, True, False]
    assert "below" in by_folder[second.name]["reason"] and "floor" in by_folder[second.name]["reason"]
    # Done once: everything up to the reward model, for each seed; data and features for all.
    assert by_folder[point(3, "0.0").name]["shared"] == []
    assert by_folder[second.name]["shared"] == by_folder[point(4, "1.0").name]["shared"] == EARLY
    assert by_folder[point(4, "0.0").name]["shared"] == ["data", "features"]
    assert {file: file.stat().st_mtime_ns for file in first} == first  # nor again after the kill
    for name in ("sft/adapter_model.safetensors", "reward/head.safetensors"):
        assert os.path.samefile(point(3, "0.0") / "adapters" / name, second / "adapters" / name)
    lines = {p: (p / "metrics.jsonl").read_text().splitlines() for p in (point(3, "0.0"), second)}
    assert [line for line in lines[point(3, "0.0")] if '"ppo"' not in line] == lines[second]
    assert len(list((out / "worlds").iterdir())) == 1 and len(list((out / "features").iterdir())) == 32
    # The figures: two seeds of the floor that was reached, and no difference to the one that was not.
    change = next(row.label for row in ROWS if row.swept)
    values, summed = found["figures"][change]["reward.floor=0.0"]
    summary = json.loads((point(4, "0.0") / "summary.json").read_text())["evaluation"]
    assert values["4"] == summary["ppo"]["greedy_hallucination"] - summary["sft"]["greedy_hallucination"]
    assert summed["n"] == 2 and summed["mean"] == pytest.approx((values["3"] + values["4"]) / 2)
    assert found["differences"] == {}
    text = (out / "sweep.md").read_text()
    assert "2 points done" not in text and "2 of 4 points done, 2 failed" in text and "| failed: " in text
    assert (out / "sweep.svg").read_text().count("reward.floor=1.0") >= 1
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------ the grid


def test_the_grid(path, tmp_path):
    over = [axis("preference.context=[true,false]"), axis("seed,data.world.seed=[7, 8]")]
    points = grid([str(path)], over, ["ppo.kl_coef=0.5"], tmp_path / "out")
    assert [(p.setting, p.draw) for p in points] == [
        (f"preference.context={context}", seed) for context in ("true", "false") for seed in "78"
    ]
    last = points[-1].recipe
    assert (last.seed, last.data.world.seed, last.preference.context, last.ppo.kl_coef) == (8, 8, False, 0.5)
    assert last.output == str(tmp_path / "out" / "test_preference.context=false_seed,data.world.seed=8")
    worlds = {p.recipe.data.folder for p in points}
    assert len(worlds) == 2 and {p.recipe.features.cache for p in points} == {str(tmp_path / "out" / "features")}


def test_a_recipe_with_another_name_has_points_of_its_own(path, tmp_path):
    grids = [grid([str(path)], [axis("seed=[1]")], keys, tmp_path) for keys in ([], ["name=other", "ppo.kl_coef=0.5"])]
    (first,), (second,) = grids
    assert Path(first.recipe.output).name != Path(second.recipe.output).name == "other_seed=1"
    assert (second.setting, first.setting) == ("other", "test")


def test_settings_with_names(path, tmp_path):
    """For what takes several keys; an empty one is the recipe as it is."""
    named = "{as it is: {}, two clips: {features.clips: 2, context.markers: [first, finally]}}"
    points = grid([str(path)], [axis(named), axis("seed=[1]")], [], tmp_path / "out")
    assert [(p.setting, p.draw, p.recipe.features.clips) for p in points] == [
        ("as it is", "1", 3),
        ("two clips", "1", 2),
    ]
    assert points[1].recipe.context.markers == ("first", "finally")
    assert Path(points[1].recipe.output).name == "test_two_clips_seed=1"


def test_several_recipes_are_settings(path, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"base_recipe: {path.name}\nname: other\nppo: {{kl_coef: 0.7}}\nfeatures: {{cache: here}}\n")
    points = grid([str(path), str(other)], [axis("seed=[1,2]")], [], tmp_path / "out")
    assert [(p.setting, p.draw) for p in points] == [("test", "1"), ("test", "2"), ("other", "1"), ("other", "2")]
    assert points[2].recipe.features.cache == "here"  # what a recipe says stands


@pytest.mark.parametrize(
    "over, overrides, message",
    [
        (["seed"], [], "`--over seed` is not of the form key=[value, ...]"),
        (["seed=3"], [], "`--over seed=3` is not of the form"),
        (["seed=[]"], [], "is not of the form"),
        (["seed=[1]", "seed=[2]"], [], "seed stands twice"),
        (["seed=[1,1]"], [], "would hold two points"),
        (["{a: 1}"], [], "each name takes keys"),
        (["output=[a,b]"], [], "each point has its own"),
        (["seed=[1]"], ["output=a"], "each point has its own"),
        (["ppo.kl_cof=[1]"], [], r"`ppo.kl_cof` is not a recipe key .*Did you mean `ppo.kl_coef`"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_runs(path, tmp_path, over, overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message) if "*" not in message else message):
        grid([str(path)], [axis(text) for text in over], overrides, tmp_path / "out")


def test_folder_names_are_safe_and_short():
    assert folder_name("tiny features.prune=[{pool: 2}]") == "tiny_features.prune=_pool_2_"
    long = [folder_name("tiny " + "x" * 200 + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) < 140


# ------------------------------------------------------------------------------------------------------ the arithmetic


def run_of(folder: Path, change: float, f1: float | None = 0.5, method: str = "ppo") -> Path:
    """A finished run's summary: greedy hallucination 0.4 after SFT, `change` less than that after the method."""
    before, after = {"greedy_hallucination": 0.4}, {"greedy_hallucination": 0.4 + change}
    if f1 is not None:
        before, after = before | {"greedy_f1": 0.5}, after | {"greedy_f1": f1}
    folder.mkdir(parents=True)
    interval = {"greedy_hallucination": {"delta": change, "low": change - 0.01, "high": change + 0.02}}
    stage = {"seconds": 10.0, "peak_memory_bytes": 2**20, "status": "done"}
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "recipe": "r",
                "recipe_hash": "0",
                "seed": 0,
                "world_seed": 0,
                "device": "cpu",
                "machine": {},
                "versions": {},
                "method": method,
                "finished": True,
                "evaluation": {"sft": before, method: after},
                "preference": {},
                "reward": {},
                method: {},
                "evaluation_intervals": {f"{method}-sft": interval},
                "stages": {"sft": stage | {"shared_from": "other"}, method: stage},
            }
        )
    )
    return folder


def test_statistics_over_seeds_by_hand(tmp_path):
    """Changes -0.1, -0.2, -0.3: mean -0.2, sd 0.1, half width 4.303 * 0.1 / sqrt(3) = 0.24844. The other setting, with
    -0.12, -0.2 and no third seed, differs from it by -0.02 and 0: mean -0.01, sd 0.014142, half 12.706 * 0.01."""
    a = [run_of(tmp_path / f"a{i}", change) for i, change in enumerate((-0.1, -0.2, -0.3))]
    b = [run_of(tmp_path / f"b{i}", change, f1=None, method="dpo") for i, change in enumerate((-0.12, -0.2))]
    ran = [tables.Ran("a", str(i), folder, None) for i, folder in enumerate(a)]
    ran += [tables.Ran("b", str(i), folder, None) for i, folder in enumerate(b)]
    ran += [tables.Ran("b", "2", tmp_path / "b2", "it burst")]
    tables.write(tmp_path, ran, of=6)
    found = json.loads((tmp_path / "sweep.json").read_text())
    label = "hallucination, greedy, policy - SFT"
    values, one = found["figures"][label]["a"]
    assert list(values.values()) == pytest.approx([-0.1, -0.2, -0.3])
    assert one == pytest.approx({"n": 3, "mean": -0.2, "sd": 0.1, "low": -0.44843, "high": 0.04843}, abs=1e-4)
    paired = found["differences"][label]["b"]
    assert paired == pytest.approx({"n": 2, "mean": -0.01, "sd": 0.0141421, "low": -0.13706, "high": 0.11706}, abs=1e-5)
    assert "b" not in found["figures"]["F1, greedy, policy - SFT"]  # not every run has every figure
    assert found["figures"]["seconds, all stages"]["a"][1]["mean"] == 20.0  # as if it had run alone
    text = (tmp_path / "sweep.md").read_text()
    assert "5 of 6 points done, 1 failed; 50 s in all, 50 s saved" in text and "failed: it burst" in text
    assert "-0.200 (-0.448 to 0.048, n 3)" in text and "| -0.010 (-0.137 to 0.117, n 2) |" in text


def test_a_single_seed_has_the_interval_over_videos(tmp_path):
    tables.write(tmp_path, [tables.Ran("a", "", run_of(tmp_path / "a", -0.1), None)], of=1)
    figures = json.loads((tmp_path / "sweep.json").read_text())["figures"]
    _, one = figures["hallucination, greedy, policy - SFT"]["a"]
    assert one == pytest.approx({"n": 1, "mean": -0.1, "sd": None, "low": -0.11, "high": -0.08})
    assert figures["hallucination, greedy, policy"]["a"][1]["low"] is None  # a level is no change


def test_the_t_quantile_beyond_the_table():
    """Against printed tables."""
    assert [t_quantile(df) for df in (2, 10, 11, 20, 60)] == pytest.approx(
        [4.303, 2.228, 2.201, 2.086, 2.000], abs=3e-3
    )


def test_a_difference_that_counts_is_bold(tmp_path):
    a = [run_of(tmp_path / f"a{i}", change) for i, change in enumerate((-0.1, -0.2))]
    b = [run_of(tmp_path / f"b{i}", change) for i, change in enumerate((-0.15, -0.2501))]
    ran = [tables.Ran(name, str(i), f, None) for name, found in (("a", a), ("b", b)) for i, f in enumerate(found)]
    tables.write(tmp_path, ran, of=4)
    assert "**-0.050 (-0.051 to -0.049, n 2)**" in (tmp_path / "sweep.md").read_text()


def test_every_ablation_of_the_docs_is_a_grid(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    commands = [
        line.split("rlaif-lite ")[1]
        for line in (ROOT / "docs" / "ablations.md").read_text().splitlines()
        if line.startswith("    rlaif-lite sweep ")
    ]
    assert len(commands) >= 12
    for command in commands:
        _, *words = shlex.split(command)
        over = [word for before, word in itertools.pairwise(words) if before == "--over"]
        paths = [word for word in words if word.endswith(".yaml")]
        points = grid(paths, [axis(text) for text in over], [], tmp_path)
        assert len({point.draw for point in points}) == 3 and len({point.setting for point in points}) * 3 == len(
            points
        )
        assert {word.startswith(("recipes/", "--over")) or word in over for word in words} == {True}
