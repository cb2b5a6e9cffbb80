"""Trackers, for real: TensorBoard's event files read back, and wandb without a network."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_lite import recipe
from rlaif_lite.errors import RecipeError
from rlaif_lite.recipe import check_files, load_recipe, recipe_hash
from rlaif_lite.training.loop import MetricsLog
from rlaif_lite.training.trackers import Trackers


def values(step: int, run: int) -> dict[str, float]:
    return {"loss": 1.0 / (1 + step), "run": run}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_hold_after_a_kill(tmp_path):
    """Killed after step 6, resumed at 4: steps 4 to 6 are logged twice, and show once, as the second time."""
    for run, (start, end) in enumerate([(0, 7), (4, 9)]):
        log = MetricsLog(tmp_path / "metrics.jsonl", Trackers(["tensorboard"], tmp_path, {}))
        log.resume("ppo", start)
        log.append("sft.easy", run, {"loss": 2.0})
        for step in range(start, end):
            log.append("ppo", step, values(step, run), {"seconds": 0.5})
    found = curves(tmp_path / "tensorboard" / "ppo")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held = {line["step"]: line for line in lines if line["stage"] == "ppo"}
    assert [step for step, _ in found["ppo/loss"]] == list(range(9)) == list(held)
    assert found["ppo/loss"] == [(step, pytest.approx(line["loss"])) for step, line in held.items()]
    assert [value for _, value in found["ppo/run"]] == [0.0] * 4 + [1.0] * 5
    assert found["ppo/time/seconds"][0] == (0, 0.5)
    assert [step for step, _ in curves(tmp_path / "tensorboard" / "sft.easy")["sft.easy/loss"]] == [0, 1]


def test_a_stage_that_starts_again_has_its_new_curve_alone(tmp_path):
    for run, end in enumerate((5, 2)):
        log = MetricsLog(tmp_path / "metrics.jsonl", Trackers(["tensorboard"], tmp_path, {}))
        log.resume("reward", 0)
        for step in range(end):
            log.append("reward", step, values(step, run))
    assert curves(tmp_path / "tensorboard" / "reward")["reward/run"] == [(0, 1.0), (1, 1.0)]


OFFLINE = """
import sys
from pathlib import Path
from rlaif_lite.training.loop import MetricsLog
from rlaif_lite.training.trackers import Trackers
folder = Path(sys.argv[1])
for start, end in [(0, 3), (1, 5)]:
    trackers = Trackers(["wandb"], folder, {"seed": 3})
    log = MetricsLog(folder / "metrics.jsonl", trackers)
    log.resume("ppo", start)
    for step in range(start, end):
        log.append("ppo", step, {"loss": 1.0 / (1 + step)})
    trackers.finish()
"""


def records(path: Path) -> list[bytes]:
    """The records of wandb's file: a header of 7 bytes, then LevelDB's log in blocks of 32 kB."""
    data, at, found, begun = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        begun += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            found.append(begun)
            begun = b""
        at += 7 + length
    return found


def test_wandb_works_without_a_network_and_is_sent_no_step_twice(tmp_path):
    """wandb's own package in offline mode, in a process of its own since it writes its file as it ends."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="the extra `wandb` is not installed")
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], env=environment, check=True, timeout=120)
    ids, steps, defined = set(), [], set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(file):
            record = internal.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "metric":
                defined.add((record.metric.glob_name, record.metric.step_metric))
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                steps.append(int(items["ppo/step"]))
    assert steps == [0, 1, 2, 3, 4] and ids == {(tmp_path / "tracking_id").read_text()}
    assert ("ppo/*", "ppo/step") in defined


def test_a_missing_package_is_a_recipe_error_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"`track` .* has wandb, .*: pip install 'rlaif-lite\[wandb\]'"):
        check_files(load_recipe("tiny", ["track=[wandb]"]))
    with pytest.raises(RecipeError, match="track"):
        load_recipe("tiny", ["track=[mlflow]"])


def test_tracking_changes_no_result_and_loads_nothing_before_the_first_step(tmp_path):
    assert recipe_hash(load_recipe("tiny", ["track=[tensorboard]"])) == recipe_hash(load_recipe("tiny"))
    Trackers(["tensorboard", "wandb"], tmp_path, {})
    assert list(tmp_path.iterdir()) == [] and "trackio" not in sys.modules
