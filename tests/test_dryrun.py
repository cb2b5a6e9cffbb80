"""The dry run: that it sees what it says it sees, and what the stages may cost a GPU. Dry runs are processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from core import RECIPE
from rlaif_lite.dryrun import allocator, launch, shim
from rlaif_lite.dryrun.cards import CARDS, fuses, seconds
from rlaif_lite.errors import StageError
from rlaif_lite.workspace import let_segments_grow

pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(), reason="a torch with CUDA needs a GPU for this"
)
MIB = 1 << 20
LONG = {"max_new_tokens": 12}
LAYERS = 2
KNOWN = """
import json
import runpy
import sys
from pathlib import Path
from rlaif_lite.dryrun import shim
if sys.argv[1]:
    shim.install(Path(sys.argv[1]))
import pytest
import torch
from rlaif_lite.dryrun.cards import CARDS
from rlaif_lite.dryrun.device import captured, pretended
from rlaif_lite.dryrun.tracker import Tracker
from rlaif_lite.errors import StageError

MIB = 1 << 20
tracker = Tracker(CARDS["a100"], fillers=(7, 8), trace=True)
with pretended(tracker):
    tracker.begin()
    first = torch.empty(MIB, device="cuda")  # 4 MiB held
    second = first + 1  # 8
    del first  # 4
    third = torch.cat([second, second])  # 12, the peak
    del second, third
    assert (tracker.peak, tracker.live) == (12 * MIB, 0)
    assert sum(tracker.held_at_peak().values()) == 12 * MIB
    assert tracker.allocator.peak == 20 * MIB  # one segment of blocks below 10 MiB
    assert tracker.sums["launches"] == 2 and tracker.sums["bytes_moved"] == (8 + 16) * MIB
    assert not tracker.syncs and not tracker.copies

    weight = torch.empty(64, 32, device="cuda", requires_grad=True)
    before = tracker.sums["flops"]
    (torch.empty(16, 64, device="cuda") @ weight).sum().backward()
    assert tracker.sums["flops"] - before == 2 * (2 * 16 * 64 * 32) and weight.grad.shape == (64, 32)

    length_B = torch.tensor([3, 1], device="cuda")
    assert len(tracker.copies) == 1
    mask_BT = torch.arange(4, device="cuda")[None] < length_B[:, None]
    value_N = torch.empty(2, 4, device="cuda")[mask_BT]
    assert value_N.shape == (4,) and tracker.sums["syncs"] == 1  # a mask whose size is known, and waited for
    assert int(length_B.max()) == 3 and (length_B * 2).tolist() == [6, 2]
    length_B += torch.empty(2, device="cuda").long()  # from here on nobody knows
    assert int(length_B.max()) == 7 and length_B.tolist() == [7, 8]

    with pytest.raises(StageError, match="reads tensors of the CPU and of the GPU"):
        weight + torch.ones(64, 32)
    graph = torch.cuda.CUDAGraph()
    launches = tracker.sums["launches"]
    with torch.cuda.graph(graph, pool=(0, 0)):
        weight.detach().exp().sum()
    assert tracker.sums["launches"] == launches
    graph.replay()
    assert tracker.sums["launches"] == launches + 2
    with pytest.raises(RuntimeError, match="waits for the host"), torch.cuda.graph(graph, pool=(0, 0)):
        weight.detach().sum().item()

# In the same process, because its imports take longer than they do: DPO, and all other stages as the command runs them.
from rlaif_lite.dryrun.run import dry_profile
from rlaif_lite.recipe import load_recipe

found = dry_profile(load_recipe(sys.argv[2]), CARDS["a100"], ["dpo"], 2, False)
Path(sys.argv[3]).write_text(json.dumps(found))
del sys.argv[1:4]
runpy.run_module("rlaif_lite.dryrun", run_name="__main__")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[dict, dict]:
    """After the known program: DPO, and every other stage, on two layers of the embedded base at the sizes of the
    tests. A tensor on the wrong device anywhere ends the run."""
    folder = tmp_path_factory.mktemp("dry")
    few = {"preference": {**RECIPE["preference"], **LONG, "samples": 2}}
    by_dpo = {**RECIPE, **few, "method": "dpo", "dpo": {"batch_size": 2, "micro_batch": 1}}
    # One phase of SFT is enough, and one role greedily. Answers are long enough for a capture; its replays cost little.
    parts = {
        "sft": {**RECIPE["sft"], "hard": None, "policy_init": None},
        "context": {**RECIPE["context"], **LONG},
        "ppo": {**RECIPE["ppo"], **LONG, "rollouts": 4, "micro_batch": 2},
        "evaluate": {**RECIPE["evaluate"], **LONG, "roles": ["sft"], "samples": 1, "temperatures": []},
    }
    for name, recipe in (("dpo", by_dpo), ("all", {**RECIPE, **few, **parts})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "output": str(folder / "run")}))
    asked = {"shim": None, "recipe": str(folder / "all.yaml"), "overrides": [], "gpu": "a100", "stages": []}
    asked |= {"layers": LAYERS, "trace": False, "out": str(folder / "all.json")}
    given = [str(shim.build() or ""), str(folder / "dpo.yaml"), str(folder / "dpo.json"), json.dumps(asked)]
    done = subprocess.run([sys.executable, "-c", KNOWN, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_dpo, costs = (json.loads((folder / f"{name}.json").read_text()) for name in ("dpo", "all"))
    return by_dpo, costs


def test_a_program_whose_costs_are_known_and_a_round_of_dpo(ran):
    found = ran[0]["stages"]["dpo"]
    assert {"prefill", "decode", "judge", "forward", "backward", "optimiser"} <= set(found["phases"])
    assert found["phases"]["backward"]["flops"] > found["phases"]["forward"]["flops"] > 0


@pytest.fixture(scope="module")
def costs(ran) -> dict:
    return ran[1]


def test_every_stage_ends_and_weighs_something(costs):
    assert list(costs["stages"]) == ["features", "sft", "context", "preference", "reward", "ppo", "evaluate"]
    for stage in costs["stages"].values():
        assert 0 < stage["peak_memory_bytes"] <= stage["reserved_memory_bytes"]
    assert costs["stages"]["preference"]["phases"]["judge"]["launches"] > 0


def test_the_captured_step_waits_for_nothing_and_copies_nothing(costs):
    """One transfer a step is the tokens' own, after the captured part; a capture that failed would add launches."""
    for stage in ("context", "preference", "ppo"):
        decode = costs["stages"][stage]["phases"]["decode"]
        assert decode["syncs"] == decode["calls"] and decode["host_copies"] == 0


def test_a_forward_waits_once_and_a_backward_never(costs):
    """transformers looks once whether the mask is all ones. Outside of these phases the host waits once a micro-batch,
    where the reward role's rows are picked."""
    phases = costs["stages"]["ppo"]["phases"]
    found = {name: cost for name, cost in phases.items() if name.startswith(("score", "update"))}
    assert {"score policy", "score value", "update policy backward", "update value forward"} <= set(found)
    for name, cost in found.items():
        assert cost["syncs"] == (0 if name.endswith("backward") else cost["calls"]), name


# Launches per layer, what is outside of the layers included. A change that adds kernels is seen.
BOUNDS = {"decode": 56, "update policy forward": 112, "update policy backward": 240}


@pytest.mark.parametrize("phase", BOUNDS)
def test_launches_per_layer_stay_bounded(costs, phase):
    cost = costs["stages"]["ppo"]["phases"][phase]
    assert 0.8 * BOUNDS[phase] < cost["launches"] / cost["calls"] / LAYERS <= BOUNDS[phase]


def test_the_allocator_splits_and_joins():
    model = allocator.Allocator()
    small = [model.allocate(MIB // 2) for _ in range(4)]
    assert model.reserved == 2 * MIB
    large = model.allocate(30 * MIB + 1)
    assert model.reserved == 34 * MIB
    model.free(large)
    halves = [model.allocate(15 * MIB), model.allocate(15 * MIB)]
    assert model.reserved == 34 * MIB
    model.pool = "graph"
    model.allocate(12 * MIB)
    assert model.reserved == model.peak == 46 * MIB
    for block in (*small, *halves):
        model.free(block)
    model.empty_cache()
    assert model.reserved == 12 * MIB


def test_segments_that_grow_waste_less_where_lengths_differ():
    """Micro-batches of other lengths, one after the other: a run asks torch for `expandable_segments` for that."""

    def reserved(expandable: bool) -> tuple[int, int]:
        model, most = allocator.Allocator(expandable), 0
        weights = [model.allocate(90 * MIB) for _ in range(8)]
        for rows in (986, 1013, 958, 1100, 1207, 990):
            sizes = [rows * width * 2 for width in (4096, 11008, 11008, 4096, 11008) * 8]
            held = [model.allocate(size) for size in sizes]
            most = max(most, sum(sizes))
            for block in held[::2] + held[1::2]:
                model.free(block)
        return model.reserved, most + len(weights) * 90 * MIB

    (classic, peak), (grown, same) = reserved(False), reserved(True)
    assert peak == same and peak <= grown < 1.05 * peak < 1.1 * peak < classic


@pytest.mark.skipif(sys.platform != "linux", reason="torch has such segments on Linux only")
def test_a_run_asks_for_segments_that_grow_and_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64,expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:False"


def test_bitsandbytes_own_table_says_which_matmuls_are_fused():
    """By rows, for the layers of a LLaVA-1.5-7B: attention, gate and up, down."""
    layers = ((4096, 4096), (11008, 4096), (4096, 11008))
    most = lambda card: [max(rows for rows in range(1, 2000) if fuses(CARDS[card], rows, *layer)) for layer in layers]
    assert {card: most(card) for card in ("h200", "a100", "4090", "3090")} == {
        "h200": [7, 32, 5],
        "a100": [5, 64, 16],
        "4090": [8, 64, 64],
        "3090": [64, 128, 64],
    }


def test_the_roofline_takes_the_longest():
    card = CARDS["a100"]
    assert seconds(card, 1, 1, 2) == 2e-6
    assert seconds(card, 10**9, 1, 2) == pytest.approx(10**9 / (0.82 * 2.039e12))
    assert seconds(card, 1, 10**12, 2) == pytest.approx(10**12 / (0.75 * 312e12))


def test_wrong_input_is_said(monkeypatch, tmp_path, capfd):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**RECIPE, "stops": 3}))
    assert launch.dry_run(str(tmp_path / "bad.yaml"), [], "a100", [], None, False, None) == 2
    assert "stops" in capfd.readouterr().err
    with pytest.raises(StageError, match="no such card. It has h200, h100"):
        launch.dry_run("tiny", [], "gtx", [], None, False, None)
    from torch.utils import cpp_extension

    def fail(*args, **options):
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    with pytest.raises(StageError, match="(?s)Ninja is required.*Install a C.. compiler and ninja"):
        shim.build()
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(StageError, match="has CUDA and sees no GPU.*pip install torch=="):
        shim.build()
