"""Checkpoints, addressable batches and seeds, the metrics log, the meter: an interrupted run ends like any other."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlaif_lite.errors import StageError
from rlaif_lite.training import checkpoint
from rlaif_lite.training.loop import MetricsLog, batches, derive_seed, lr_at, split_micro
from rlaif_lite.training.meter import Meter, describe_machine, versions


def training(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 3e-3}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)  # as `training.fit` seeds each step
        noise = torch.rand(())
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) * noise).square().mean().backward()
        optimizer.step()


def test_resumed_training_is_bit_equal(tmp_path):
    model, optimizer = training()
    train(model, optimizer, range(3))
    state = {"kl_coef": 0.1 + 0.2, "position": [3, None, True], "pair": (1, "a"), 7: torch.arange(3), "empty": {}}
    checkpoint.save(tmp_path, 3, model.state_dict(), {"policy": optimizer}, state)
    train(model, optimizer, range(3, 6))

    other, other_optimizer = training(seed=9)
    loaded = checkpoint.load(tmp_path)
    other.load_state_dict(loaded.tensors)
    checkpoint.restore_optimizer(other_optimizer, loaded, "policy")
    train(other, other_optimizer, range(loaded.step, 6))

    assert torch.equal(loaded.state.pop(7), state.pop(7)) and loaded.state == state
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    want, got = optimizer.state_dict(), other_optimizer.state_dict()
    assert want["param_groups"] == got["param_groups"]
    for index, entries in want["state"].items():
        assert entries["step"].item() == 6
        for key in entries:
            assert torch.equal(entries[key], got["state"][index][key]), (index, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_dtypes_and_odd_bits_come_back(tmp_path, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, 3.0]) if dtype != torch.bool else torch.tensor([0, 1])
    tensor = values.to(dtype)
    special = torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])
    turned, scalar = torch.randn(3, 4).t(), torch.tensor(2.5)
    checkpoint.save(tmp_path, 0, {"a.b/c": tensor, "t": turned, "special": special, "scalar": scalar}, {}, {})
    loaded = checkpoint.load(tmp_path).tensors
    assert loaded["a.b/c"].dtype == dtype and torch.equal(loaded["a.b/c"], tensor)
    assert torch.equal(loaded["special"].view(torch.int32), special.view(torch.int32))
    assert torch.equal(loaded["t"], turned) and torch.equal(loaded["scalar"], scalar)


def test_nothing_saved_yet_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "missing") is None


def test_what_cannot_be_written_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {}, {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, {"w": torch.zeros(2)}, {}, {"bad": object()})
    assert checkpoint.load(tmp_path).step == 1


def test_only_one_checkpoint_stays_on_disk(tmp_path):
    for step in range(3):
        checkpoint.save(tmp_path, step, {"w": torch.full((1000,), step)}, {}, {})
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        assert checkpoint.load(tmp_path).step == step


def test_damage_is_named_with_the_way_out(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(100)}, {}, {})
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(StageError, match="is damaged .* Delete .* to start this phase over"):
        checkpoint.load(tmp_path)


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    """Bits over the whole file: the length and text of the header, numbers in the state, and tensors."""
    _, optimizer = training()
    checkpoint.save(tmp_path, 7, {"w": torch.arange(40.0), "b": torch.zeros(())}, {"policy": optimizer}, {"kl": 0.25})
    file = tmp_path / checkpoint.FILE
    sound, rng = file.read_bytes(), random.Random(0)
    places = [0, 1, 7, 8, sound.index(b"0.25"), sound.index(b"lr"), len(sound) - 1, *rng.sample(range(len(sound)), 150)]
    for place in places:
        data = bytearray(sound)
        data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        with pytest.raises(StageError, match="is damaged"):
            checkpoint.load(tmp_path)
    file.write_bytes(sound)
    assert checkpoint.load(tmp_path).step == 7


def test_a_foreign_optimizer_is_refused(tmp_path):
    _, optimizer = training()
    checkpoint.save(tmp_path, 1, {}, {"policy": optimizer}, {})
    loaded = checkpoint.load(tmp_path)
    with pytest.raises(StageError, match="'value'"):
        checkpoint.restore_optimizer(optimizer, loaded, "value")
    with pytest.raises(StageError, match="other parameters"):
        checkpoint.restore_optimizer(torch.optim.AdamW([torch.zeros(3, requires_grad=True)]), loaded, "policy")


# Runs in a process of its own, which forks savers (torch is imported once) and ends each with SIGKILL.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from rlaif_lite import files
from rlaif_lite.training import checkpoint

torch.set_num_threads(1)
folder, crash_at = Path(sys.argv[1]), sys.argv[2] == "calls"

def saver(start):
    for step in range(start, 10**6):
        checkpoint.save(folder, step, {"w": torch.full((200_000,), step)}, {}, {"step": step, "text": "x" * 50_000})

def die_at_call(n):
    # SIGKILL just before the n-th file operation: sync, rename, removal, file write.
    left = [n]
    def guard(function):
        def guarded(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return guarded
    checkpoint.save_file, files.fsync, os.replace = guard(checkpoint.save_file), guard(files.fsync), guard(os.replace)
    Path.unlink, Path.mkdir = guard(Path.unlink), guard(Path.mkdir)

checkpoint.save(folder, 0, {"w": torch.full((200_000,), 0)}, {}, {"step": 0, "text": "x" * 50_000})
seen, rng, patience = 0, random.Random(0), 0.05
for round in range(32 if crash_at else 16):
    child = os.fork()
    if child == 0:
        if crash_at:
            die_at_call(round)
        saver(seen + 1)
    if not crash_at:
        time.sleep(rng.uniform(0, patience))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    loaded = checkpoint.load(folder)
    assert loaded.step >= seen, (loaded.step, seen)
    assert loaded.state == {"step": loaded.step, "text": "x" * 50_000}
    assert bool((loaded.tensors["w"] == loaded.step).all())
    patience *= 1.3 if loaded.step == seen else 0.8  # kills fall into the first saves, however busy the machine is
    seen = loaded.step
files.clean(folder)  # as every run does when it starts
left = [path.name for path in folder.iterdir()]
assert left == [checkpoint.FILE], left  # nothing of a killed save is left behind
print(seen)
"""


@pytest.mark.parametrize("moment", ["calls", "random"])
def test_kill_minus_nine_leaves_a_valid_checkpoint(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLER, tmp_path / "ckpt", moment], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3  # saves did complete between the kills


def test_derived_seeds_are_stable_and_apart():
    assert derive_seed(0, "ppo", 7) == 7134083420856529216
    parts = [(0, "ppo", 7), (0, "ppo", 8), (0, "pp", "o", 7), (0, "ppo7"), ("0", "ppo", 7), (1, "ppo", 7)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)


def test_batches_cover_each_epoch_once_and_do_not_depend_on_how_many_are_asked():
    plan = batches(10, 4, 5, seed=3, stage="sft")
    flat = [item for batch in plan for item in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert batches(10, 4, 9, seed=3, stage="sft")[:5] == plan
    assert batches(10, 4, 5, seed=3, stage="ppo") != plan != batches(10, 4, 5, seed=4, stage="sft")
    assert [len(batch) for batch in batches(2, 5, 3, 0, "x")] == [5, 5, 5]
    with pytest.raises(StageError, match="0 items"):
        batches(0, 4, 1, 0, "sft")


def test_micro_batches():
    assert split_micro([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert split_micro([1, 2, 3], None) == [[1, 2, 3]]


def test_learning_rates_by_hand():
    assert [lr_at(s, 10, 1.0, "constant", 0.2) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert [lr_at(s, 10, 1.0, "linear", 0.2, end=0.2) for s in (2, 6)] == [1.0, pytest.approx(0.6)]
    assert lr_at(6, 10, 2.0, "cosine", 0.2) == pytest.approx(1.0)
    late = 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 12)))
    assert lr_at(7, 12, 2.0, "cosine", 0.0, end=0.1) == pytest.approx(late)
    assert lr_at(0, 20, 1.0, "linear", 3 / 20) == pytest.approx(1 / 3)  # exactly three warm-up steps


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_log_after_a_kill_equals_an_uninterrupted_one(tmp_path):
    def run(log: MetricsLog, stage: str, steps: range) -> None:
        for step in steps:
            log.append(stage, step, {"loss": 0.1 + step / 3, "n": step}, time={"seconds": random.random()})

    whole, broken = MetricsLog(tmp_path / "whole.jsonl"), MetricsLog(tmp_path / "broken.jsonl")
    run(whole, "sft", range(3)), run(whole, "ppo", range(5))
    run(broken, "sft", range(3)), run(broken, "ppo", range(4))
    with open(broken.path, "a") as file:
        file.write('{"stage": "ppo", "step": 4, "lo')  # killed while writing
    broken.resume("ppo", 2)
    run(broken, "ppo", range(2, 5))
    runs = [[{k: v for k, v in line.items() if k != "time"} for line in metrics(log.path)] for log in (whole, broken)]
    assert runs[0] == runs[1]
    assert metrics(whole.path)[1]["loss"] == 0.1 + 1 / 3  # not rounded
    broken.resume("sft", 0)
    assert {line["stage"] for line in metrics(broken.path)} == {"ppo"}


def test_metrics_log_takes_scalars_and_refuses_nan(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.resume("ppo", 0)  # nothing there yet
    log.append("ppo", 0, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": 3})
    assert metrics(log.path) == [{"stage": "ppo", "step": 0, "a": 0.5, "b": 0.25, "c": 3}]
    with pytest.raises(StageError, match="objective/kl is nan at step 4 of stage ppo"):
        log.append("ppo", 4, {"objective/kl": float("nan")})
    assert len(metrics(log.path)) == 1


def test_meter_measures_the_phase_not_the_process():
    with Meter("cpu") as big:
        block = torch.ones(50_000_000)  # 200 MB
        del block
    seconds, peak = big.seconds, big.peak_memory_bytes
    with Meter("cpu") as small:
        pass
    assert big.peak_memory_bytes > 200e6 and big.seconds > 0
    assert (big.seconds, big.peak_memory_bytes) == (seconds, peak)  # fixed when the phase ends
    if Path("/proc/self/clear_refs").exists():
        assert small.peak_memory_bytes < big.peak_memory_bytes - 150e6


def test_machine_and_versions_are_plain_json():
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 1e8 and machine["device"]
    assert versions()["torch"] == torch.__version__ and "python" in versions()
