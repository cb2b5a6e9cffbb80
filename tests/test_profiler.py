"""The profiler: what it adds up, that it drives the real stages, and what it prints and writes."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from core import small_recipe
from rlaif_lite import phases, profiler
from rlaif_lite.cli import app
from rlaif_lite.errors import RlaifError, StageError
from rlaif_lite.profiler import inputs, recorder, tables

STAGES = ("features", "reward", "ppo")


@pytest.fixture
def clock(monkeypatch):
    """A clock and a memory that move only when told."""
    state = SimpleNamespace(now=0.0, peak=0)
    monkeypatch.setattr(recorder, "now", lambda _: state.now)
    monkeypatch.setattr(recorder, "peak_bytes", lambda device: state.peak)
    monkeypatch.setattr(recorder, "reset_peak", lambda device: setattr(state, "peak", 0))
    return state


def spend(clock, name, seconds, count=0, peak=0):
    with phases.phase(name, count):
        clock.now += seconds
        clock.peak = peak


def test_costs_add_up_and_the_first_step_is_dropped(clock):
    found = recorder.Recorder(torch.device("cpu"))
    with phases.listen(found), found:
        phases.step()
        spend(clock, "decode", 100.0, count=7, peak=900)
        phases.step()
        spend(clock, "decode", 1.5, count=30, peak=200)
        clock.now += 4.0
        clock.peak = 1000  # between phases
        spend(clock, "decode", 0.5, count=10, peak=300)
        phases.step()
        spend(clock, "score policy", 2.0, count=64, peak=50)
    assert set(found.costs) == {"decode", "score policy"}
    assert found.costs["decode"] == recorder.Cost(calls=2, seconds=2.0, count=40, peak_memory_bytes=300)
    assert (found.steps, found.seconds, found.measured_seconds) == (2, 108.0, 8.0)
    assert found.peak_memory_bytes == 1000  # of the whole stage, between phases and in the warm-up too


def test_a_single_step_is_kept(clock):
    found = recorder.Recorder(torch.device("cpu"))
    with phases.listen(found), found:
        phases.step()
        spend(clock, "decode", 3.0)
    assert (found.steps, found.costs["decode"].seconds) == (1, 3.0)


def test_nested_phases_are_refused_and_nobody_listens_afterwards(clock):
    found = recorder.Recorder(torch.device("cpu"))
    refused = pytest.raises(RuntimeError, match="`b` began inside")
    with refused, phases.listen(found), found, phases.phase("a"), phases.phase("b"):
        pass
    with phases.phase("a"), phases.phase("b"):  # no listener: nothing is checked or kept
        pass
    assert not found.costs


def test_share_of_the_matmul_rate():
    """A decoder of 1000 weights; 50 tokens in 2 s are 2 * 1000 * 50 / 2 = 50,000 operations a second."""
    layers = torch.nn.Linear(20, 25), torch.nn.Linear(25, 20), torch.nn.LayerNorm(20)
    base = SimpleNamespace(decoder=torch.nn.Sequential(*layers))
    costs = {"prefill": recorder.Cost(1, 2.0, 50, 9), "tower": recorder.Cost(1, 1.0, 4, 9)}
    found = recorder.Recorder(torch.device("cpu"), costs=costs)
    found.seconds, found.measured_seconds = 8.0, 4.0
    told = profiler.stage_figures(found, base, rate=200_000.0, planned=5)["phases"]
    assert told["prefill"]["of_matmul"] == 0.25 and told["prefill"]["per_second"] == 25.0
    assert told["prefill"]["share"] == 0.5 and told["other"]["seconds"] == 1.0
    assert told["tower"]["of_matmul"] is None


@pytest.fixture(scope="module")
def taken(checkpoint, tmp_path_factory):
    """A profile of the small recipe, taken on small videos and short prompts."""
    patch = pytest.MonkeyPatch()
    patch.setattr(inputs, "FRAME", (32, 48))
    patch.setattr(inputs, "PROMPT_TOKENS", 6)
    patch.setattr(inputs, "VIDEOS", (2, 2))
    folder = tmp_path_factory.mktemp("profile")
    recipe = small_recipe(checkpoint, folder, "preference.batch_size=16")
    traces = profiler.Traces(folder / "trace.json", folder / "memory.png")
    try:
        return folder, profiler.profile(recipe, 1, STAGES, traces=traces)
    finally:
        patch.undo()


def test_the_real_stages_are_timed(taken):
    _, found = taken
    stages = found["stages"]
    assert tuple(stages) == STAGES
    assert set(stages["features"]["phases"]) == {"decode video", "tower", "other"}
    roles = {f"score {role}" for role in ("policy", "reference", "reward", "value")}
    updates = {f"update {role} {way}" for role in ("policy", "value") for way in ("forward", "backward")}
    ppo = stages["ppo"]
    assert set(ppo["phases"]) == roles | updates | {
        "dense copy",
        "prefill",
        "fill slots",
        "decode",
        "advantages",
        "optimiser",
        "copy to undo",
        "other",
    }
    # 8 answers in 2 minibatches, twice: one micro-batch each; a policy and a value step for each minibatch and epoch
    assert ppo["steps"] == 1 and ppo["phases"]["score value"]["calls"] == 2
    assert ppo["phases"]["update policy backward"]["calls"] == 4 and ppo["phases"]["optimiser"]["calls"] == 8
    assert stages["reward"]["steps"] == 1 and stages["reward"]["phases"]["optimiser"]["calls"] == 1
    for cost in stages.values():
        assert sum(phase["share"] for phase in cost["phases"].values()) == pytest.approx(1)
        assert cost["peak_memory_bytes"] >= max(phase["peak_memory_bytes"] for phase in cost["phases"].values())
        assert cost["planned_memory_bytes"] > 0
    json.dumps(found)


def test_trace_and_picture(taken):
    folder, _ = taken
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"decode", "score policy", "update value backward"} <= names
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_text_and_comparison(taken, tmp_path):
    folder, found = taken
    assert "score reference" in tables.as_text(found)
    slower = json.loads(json.dumps(found))
    for phase in slower["stages"]["ppo"]["phases"].values():
        phase["seconds"] *= 3
    for name, profile in (("a", found), ("b", slower)):
        (tmp_path / name).write_text(json.dumps(profile))
    told = CliRunner().invoke(app, ["profile", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert told.exit_code == 0, told.output
    row = next(line.split() for line in told.output.splitlines() if "update policy backward" in line)
    assert row[6] == "3.00"


def test_what_cannot_be_compared_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(RlaifError, match="has schema 0, this version reads 1"):
        tables.read(tmp_path / "old.json")
    with pytest.raises(RlaifError, match="cannot be read"):
        tables.read(tmp_path / "none.json")


def test_a_cap_is_a_fraction_of_the_card(monkeypatch):
    """24 of 80 GB; the device is left to torch, whose function refuses `cuda` without a number."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    profiler.cap(24 * 10**9, torch.device("cuda"))
    profiler.cap(None, torch.device("cuda"))
    assert asked == [(0.3,)]


@pytest.mark.gpu
def test_a_cap_holds_on_a_gpu():
    profiler.cap(2**29, torch.device("cuda"))
    try:
        torch.empty(2**27, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_cap_needs_a_gpu_and_a_stage_a_name(recipe):
    with pytest.raises(StageError, match="bounds the CUDA allocator"):
        profiler.profile(recipe(), memory_cap=10**9)
    with pytest.raises(StageError, match="no stage `pdo`"):
        profiler.profile(recipe(), stages=("pdo",))
    for method, stage in (("ppo", "dpo"), ("dpo", "ppo")):  # the stages of the recipe's own method
        with pytest.raises(StageError, match=f"no stage `{stage}` to profile; there are features, sft, context, "):
            profiler.profile(recipe(f"method={method}"), stages=(stage,))
