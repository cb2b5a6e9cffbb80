"""Where a sweep's points go: side by side on this machine, or as jobs of a scheduler, by submitit. Its local executor
runs the jobs for real, in processes that are preempted and killed. SLURM's commands are not here: the test reads the
files that submitit writes for them."""

import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from rlaif_lite import launchers
from rlaif_lite.errors import RecipeError
from rlaif_lite.files import read_json
from rlaif_lite.launchers import Cluster, chain_of, executor_of, levels_of, read_cluster
from rlaif_lite.sweep import axis, grid, sweep
from test_sweep import SMALL, path  # noqa: F401

STEPS = ["ppo.steps=4", "ppo.checkpoint_every=1"]


# ------------------------------------------------------------------------------------------------------------ for real


def holder(lock: Path) -> int | None:
    """The process that holds a run folder."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == str(lock):
                return int(descriptor.parts[2])
        except OSError:
            continue
    return None


def when(there: Path, number: int, lock: Path, sent: list[int]) -> threading.Thread:
    """Sends a signal to the process that holds `lock` once the file `there` is there."""

    def watch() -> None:
        until = time.monotonic() + 200
        while not there.exists() and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(pid := holder(lock), number)
        sent.append(pid)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_jobs_are_preempted_and_killed_and_the_sweep_goes_on_side_by_side(path, tmp_path, capfd):  # noqa: F811
    """Two points on a cluster of two ranks a job. Their common job is preempted, and queued again. One rank of the
    first point is killed. Then the sweep resumes with `--jobs 2` on this machine, in one rank a point."""
    out, cluster = tmp_path / "out", tmp_path / "cluster.yaml"
    cluster.write_text("{executor: local, gpus: 2, hours: 0.5, jobs: 1, cpus: 1}")
    over = ["ppo.kl_coef=[0.1,0.2]"]
    first, second = (out / f"test_ppo.kl_coef={value}" for value in (0.1, 0.2))
    sent: list[int] = []
    when(first / "sft" / "begun.json", signal.SIGUSR2, first / ".lock", sent)
    when(first / "ppo" / "checkpoint" / "checkpoint.safetensors", signal.SIGKILL, first / ".lock", sent)
    assert not sweep([str(path)], over, [*SMALL, *STEPS], out, "submitit", cluster=cluster)
    assert len(sent) == 2 and sent[0] != sent[1]
    logs = {log.name: log.read_text() for log in (out / "jobs").glob("*.err")}
    assert any("Requeued job" in log.read_text() for log in (out / "jobs").glob("*.out"))
    preempted = [text for text in logs.values() if "this job is preempted" in text]
    assert any("sft: goes on where it was stopped" in text for text in preempted), logs
    found = {point["folder"]: point for point in read_json(out / "sweep.json")["points"]}
    assert found[second.name]["reason"] is None
    assert "without a result" in found[first.name]["reason"] and "_0_log.err" in found[first.name]["reason"]
    assert read_json(second / "summary.json")["stages"]["ppo"]["ranks"] == 2
    capfd.readouterr()

    assert sweep([str(path)], over, [*SMALL, *STEPS], out, jobs=2)
    said = capfd.readouterr().err
    assert "ppo: goes on where it was stopped" in said and said.count("evaluate: done before") == 1
    assert [point["reason"] for point in read_json(out / "sweep.json")["points"]] == [None, None]
    for run, count in ((first, 1), (second, 2)):
        assert (
            read_json(run / "summary.json")["finished"]
            and read_json(run / "summary.json")["stages"]["ppo"]["ranks"] == count
        )
        assert read_json(run / "summary.json")["stages"]["sft"].get("shared_from") == (
            None if run == first else first.name
        )


# --------------------------------------------------------------------------------------------------- what is to be done


def names(levels) -> list[list[tuple[str, str | None]]]:
    return [[(Path(job.recipe.output).name, job.until) for job in level] for level in levels]


def test_levels_do_once_what_points_share(path, tmp_path):  # noqa: F811
    """Two seeds share the world and the features; two floors of one seed share all before PPO."""
    recipes = [
        point.recipe for point in grid([str(path)], [axis("seed=[3,4]"), axis("reward.floor=[0,0.1]")], [], tmp_path)
    ]
    assert names(levels_of(recipes)) == [
        [("test_seed=3_reward.floor=0", "features")],
        [("test_seed=3_reward.floor=0", "reward"), ("test_seed=4_reward.floor=0", "reward")],
        [(f"test_seed={seed}_reward.floor={floor}", None) for seed in (3, 4) for floor in (0, 0.1)],
    ]
    assert names(levels_of(recipes[:1])) == [[("test_seed=3_reward.floor=0", None)]]
    same = [chain_of(recipes[0].model_copy(update={"output": name, "threads": 7})) for name in "ab"]
    assert same[0] == same[1] == chain_of(recipes[0])


# -------------------------------------------------------------------------------------------------------- the scheduler

SBATCH = """#!/bin/sh
n=$(ls {seen}/*.sh 2>/dev/null | wc -l)
cp "$1" {seen}/$n.sh
echo "Submitted batch job $((70 + n))"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> {seen}/cancelled
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder that gets every file given to `sbatch`, and what is given to `scancel`. The commands are on the path."""
    folder, seen = tmp_path / "bin", tmp_path / "seen"
    folder.mkdir(), seen.mkdir()
    nothing = "#!/bin/sh\n"
    scripts = {
        "sbatch": SBATCH.format(seen=seen),
        "scancel": SCANCEL.format(seen=seen),
        "sacct": nothing,
        "srun": nothing,
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return seen


class Polled(KeyboardInterrupt):
    """Ctrl-C, as soon as all jobs are sent."""


def test_what_slurm_is_asked_for(slurm, path, tmp_path, monkeypatch):  # noqa: F811
    def stop(_):
        raise Polled

    monkeypatch.setattr(launchers, "_finished", stop)
    asked = {"partition": "a100", "gpus": 4, "hours": 12, "memory_gb": 200, "jobs": 16, "extra": {"account": "lab"}}
    points = grid([str(path)], [axis("ppo.kl_coef=[0.1,0.2]")], SMALL, tmp_path / "out")
    levels = levels_of([point.recipe for point in points])
    with pytest.raises(Polled):
        list(launchers.on_a_cluster(levels, tmp_path / "out", tmp_path / "jobs", Cluster(**asked)))
    first, second = ((slurm / f"{number}.sh").read_text().splitlines() for number in range(2))
    wanted = ["partition=a100", "gpus-per-node=4", "ntasks-per-node=4", "nodes=1", "time=720", "mem=200GB"]
    for line in (*wanted, "cpus-per-task=8", "account=lab"):
        assert f"#SBATCH --{line}" in first and f"#SBATCH --{line}" in second
    assert "#SBATCH --array=0-1%2" in second and not any("array" in line for line in first)
    assert "#SBATCH --dependency=afterany:70" in second and not any("dependency" in line for line in first)
    assert any(line.startswith("#SBATCH --signal=USR2@") for line in first)  # before the time is over
    assert (slurm / "cancelled").read_text().split() == ["70", "71_0", "71_1"]


def test_a_cluster_that_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="There is no file .*nowhere.yaml for --cluster"):
        read_cluster(tmp_path / "nowhere.yaml")
    file = tmp_path / "cluster.yaml"
    file.write_text("{partiton: a100}")
    with pytest.raises(RecipeError, match=r"(?s)partiton.*Its keys are:.*partition: SLURM partition"):
        read_cluster(file)
    file.write_text("{gpus: -1}")
    with pytest.raises(RecipeError, match="greater than or equal to 0"):
        read_cluster(file)
    assert read_cluster(None) == Cluster()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RecipeError, match="executor `slurm` does not start here.*executor: local"):
        executor_of(tmp_path, Cluster())
