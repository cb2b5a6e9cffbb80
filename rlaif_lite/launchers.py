"""Where the runs of a sweep go: into processes on this machine, or as jobs to a cluster's scheduler by submitit.

Points that begin alike share stages. `levels_of` cuts the sweep into jobs: a job of an early level does once what the
jobs of the next level take from it, and the last job of each point finishes its run. Jobs of one level do not wait for
each other.
"""

import hashlib
import json
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from . import ranks
from .errors import RecipeError, RlaifError
from .recipe import Recipe, Section
from .recipe.marked_yaml import parse

MESSAGE = 4000  # characters of a reason that are kept; a pipe holds more
POLL_S = 2.0  # between two looks at the scheduler


class Job(NamedTuple):
    """A part of one point."""

    point: int  # its number
    recipe: Recipe
    until: str | None  # the last stage that it is to do; None: all


class Cluster(Section):
    """What a job asks the scheduler for: the file of `--cluster`."""

    partition: str | None = Field(None, description="SLURM partition; null: the cluster's default")
    gpus: int = Field(1, ge=0, description="GPUs of a job, all on one machine; each holds one rank of the run")
    hours: float = Field(24.0, gt=0, description="time of a job; it is requeued, and resumes, when that is over")
    cpus: int = Field(8, ge=1, description="CPU cores for each GPU, or for a job without one")
    memory_gb: float | None = Field(None, gt=0, description="memory of a job; null: the cluster's default")
    jobs: int = Field(64, ge=1, description="jobs that run at the same time")
    requeues: int = Field(20, ge=0, description="how often a job that was preempted or timed out is started again")
    extra: dict[str, str | int] = Field({}, description="more of sbatch's options, such as {account: lab}")
    executor: str = Field("slurm", description="submitit's executor: slurm, or local for a trial on this machine")


def read_cluster(path: Path | None) -> Cluster:
    """The section in a YAML file; all defaults without one. Raises RecipeError for a file that is no such section."""
    if path is None:
        return Cluster()
    if not path.is_file():
        raise RecipeError(f"There is no file {path} for --cluster. Paths start at {Path.cwd()}.")
    try:
        return Cluster(**parse(path.read_text(encoding="utf-8"), str(path)).data)
    except (ValidationError, TypeError) as error:
        known = "\n".join(f"  {name}: {field.description}" for name, field in Cluster.model_fields.items())
        raise RecipeError(f"{path} does not say what a job needs: {error}\nIts keys are:\n{known}") from None


def levels_of(recipes: Sequence[Recipe]) -> list[list[Job]]:
    """Jobs such that no two of one level do the same stage, and none does what one of an earlier level has done."""
    keys = [chain_of(recipe) for recipe in recipes]
    known = dict.fromkeys(range(len(recipes)), 0)  # point -> how many of its stages are in a level
    levels = []
    while known:
        groups: dict[str, list[int]] = {}
        for point, done in known.items():
            groups.setdefault(keys[point][done], []).append(point)
        level = []
        for leader, *others in groups.values():
            end = known[leader]
            while others and end < len(keys[leader]) and {keys[point][end] for point in others} == {keys[leader][end]}:
                end += 1
            level.append(Job(leader, recipes[leader], recipes[leader].stages[end - 1] if others else None))
            for point in (leader, *others):
                known[point] = end
            if not others:
                del known[leader]
        levels.append(level)
    return levels


def chain_of(recipe: Recipe) -> list[str]:
    """For each stage of a recipe a digest of the keys that it and all stages before it read."""
    from . import pipeline

    digest, found = hashlib.sha256(), []
    for name in recipe.stages:
        read = pipeline.keys_read(recipe, name, pipeline.STAGES[name].READS)
        outward = {key: value for key, value in read.items() if key not in pipeline.INWARD.get(name, ())}
        digest.update(json.dumps([name, outward], sort_keys=True).encode())
        found.append(digest.hexdigest())
    return found


# -------------------------------------------------------------------------------------------------------- this machine


def on_this_machine(levels: list[list[Job]], share: Path, jobs: int) -> Iterator[tuple[Job, str | None]]:
    """Run jobs in processes of their own, `jobs` at a time -> each with the reason why it did not finish, if it did
    not. Side by side, each process sees one card."""
    processes = multiprocessing.get_context("forkserver")
    # Forked from a process that has imported everything, where no GPU can be in use: CUDA does not survive a fork.
    on_cpu = all(job.recipe.device == "cpu" for level in levels for job in level)
    processes.set_forkserver_preload(["rlaif_lite.pipeline"] if on_cpu else [])
    if jobs == 1:
        for job in (job for level in levels for job in level):
            yield job, run_apart(processes, job, share)
        return
    free = cards(jobs, on_cpu)
    running: list[Any] = []

    def run(job: Job) -> str | None:
        card = free.get()
        try:
            return run_apart(processes, job, share, card, running)
        finally:
            free.put(card)

    for level in levels:
        with ThreadPoolExecutor(jobs) as pool:
            started = {pool.submit(run, job): job for job in level}
            try:
                for future in as_completed(started):
                    yield started[future], future.result()
            except BaseException:  # we are being stopped, and so are they
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    process.terminate()
                raise


def cards(jobs: int, on_cpu: bool) -> "queue.Queue[str | None]":
    """The card that each of `jobs` processes may see; None on a CPU. Raises RecipeError where there are too few."""
    found: queue.Queue[str | None] = queue.Queue()
    import torch

    there = 0 if on_cpu else torch.cuda.device_count()  # this starts nothing on them
    if there and jobs > there:
        raise RecipeError(f"`--jobs {jobs}` wants a GPU for each job, and there are {there}. Set `--jobs {there}`.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for number in range(jobs):
        found.put(None if not there else visible[number] if visible != [""] else str(number))
    return found


def run_apart(
    processes: Any, job: Job, share: Path, card: str | None = None, running: list[Any] | None = None
) -> str | None:
    """Run a job in a process of its own, listed in `running` meanwhile; returns why it did not finish, None where it
    did."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_run, args=(theirs, job, share, card))
    process.start()
    running = [] if running is None else running
    running.append(process)
    theirs.close()
    try:
        process.join()
        said = ours.recv() if ours.poll() else None
    except EOFError:
        said = None
    finally:
        if process.is_alive():  # we are being stopped, and so is it
            process.terminate()
            process.join()
        running.remove(process)
    if process.exitcode == 0:
        return None
    if process.exitcode == -signal.SIGKILL:
        return "it was killed (SIGKILL); where memory ran out, that is what the system does"
    return said or f"its process ended with exit code {process.exitcode}"


def _run(answer: Connection, job: Job, share: Path, card: str | None) -> None:
    """What the job's process does. It goes down cleanly with SIGTERM, and when the sweep's process is gone."""
    own = os.getpid()
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card

    def stop(*_: object) -> None:
        if os.getpid() != own:  # one of its workers
            os._exit(143)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    parent = multiprocessing.parent_process().sentinel

    def end_with_parent() -> None:
        wait([parent])
        os.kill(own, signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        _pipeline(job.recipe).run(job.recipe, until=job.until, share=share)
    except RlaifError as error:
        answer.send(str(error)[:MESSAGE])
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(143) from None
    except Exception as error:
        traceback.print_exc()
        answer.send(f"{type(error).__name__}: {error}"[:MESSAGE])
        raise SystemExit(1) from None


def _pipeline(recipe: Recipe) -> ModuleType:
    from .model.unsloth_loader import import_first

    import_first(recipe.model)
    from . import pipeline

    return pipeline


# ----------------------------------------------------------------------------------------------------------- a cluster


class ClusterJob:
    """What a cluster's job calls; submitit pickles it. A job that is preempted, or out of time, is queued again as it
    is: the run resumes from its checkpoint."""

    def __init__(self, job: Job, share: Path, gpus: int):
        self.job, self.share, self.gpus = job, share, gpus

    def __call__(self) -> str | None:
        """Why the job did not finish, None where it did."""
        if self.gpus > 1:
            import submitit

            # Every rank sees all cards of the job, and takes the one of its number (`ranks.device`).
            environment = submitit.helpers.TorchDistributedEnvironment()
            environment.export(set_cuda_visible_devices=False, overwrite=True)
        with ranks.joined():
            try:
                _pipeline(self.job.recipe).run(self.job.recipe, until=self.job.until, share=self.share)
            except RlaifError as error:
                if ranks.count() > 1:  # the ranks say together which of them failed
                    raise
                return str(error)[:MESSAGE]
        return None

    def checkpoint(self) -> Any:
        """For submitit: what is to be queued again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def on_a_cluster(
    levels: list[list[Job]], share: Path, folder: Path, cluster: Cluster
) -> Iterator[tuple[Job, str | None]]:
    """Send every level as one job array that waits for the level before -> each job with the reason why it did not
    finish, if it did not. `folder` gets submitit's files and the jobs' logs. Raises RecipeError without submitit or
    without the scheduler."""
    executor = executor_of(folder, cluster)
    waiting: list[tuple[Job, Any]] = []
    try:
        for level in levels:
            if cluster.executor != "slurm":  # it has no queue: we are the queue
                yield from _here(executor, level, share, cluster, waiting)
                continue
            if waiting:  # those that fail are no reason not to start: the stages that they owe are done again
                before = sorted({handle.job_id.partition("_")[0] for _, handle in waiting})
                after = cluster.extra | {"dependency": f"afterany:{':'.join(before)}"}
                executor.update_parameters(slurm_additional_parameters=after)
            with executor.batch():
                sent = [(job, executor.submit(ClusterJob(job, share, cluster.gpus))) for job in level]
            waiting += sent
        while waiting:
            yield from _finished(waiting)
            time.sleep(POLL_S)
    finally:
        for _, handle in waiting:  # only where we are being stopped
            handle.cancel()


def _here(
    executor: Any, level: list[Job], share: Path, cluster: Cluster, waiting: list[tuple[Job, Any]]
) -> Iterator[tuple[Job, str | None]]:
    todo = list(level)
    while todo or waiting:
        while todo and len(waiting) < cluster.jobs:
            job = todo.pop(0)
            waiting.append((job, executor.submit(ClusterJob(job, share, cluster.gpus))))
        yield from _finished(waiting)
        time.sleep(0.2)


def _finished(waiting: list[tuple[Job, Any]]) -> Iterator[tuple[Job, str | None]]:
    """Those of `waiting` that are over, which leave the list."""
    for job, handle in list(waiting):
        if not handle.done():
            continue
        waiting.remove((job, handle))
        try:
            reason = next((each for each in handle.results() if each is not None), None)
        except Exception as error:  # submitit's own, which hold the traceback of the job
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            reason = f"its job {handle.job_id} ended without a result ({last[0]}); its log is {handle.paths.stderr}"
        yield job, reason


def executor_of(folder: Path, cluster: Cluster) -> Any:
    """submitit's executor, with what a job asks for."""
    try:
        import submitit
    except ImportError:
        raise RecipeError("`--launcher submitit` needs submitit: pip install 'rlaif-lite[cluster]'.") from None
    limit = {f"{cluster.executor}_max_num_timeout": cluster.requeues}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster.executor, **limit)
    except (RuntimeError, ValueError) as error:
        raise RecipeError(
            f"submitit's executor `{cluster.executor}` does not start here: {error}. Run the sweep where `sbatch` and "
            "`srun` work, or set `executor: local` in the file of --cluster for a trial on this machine."
        ) from None
    executor.update_parameters(
        name="rlaif-lite",
        timeout_min=max(1, round(60 * cluster.hours)),
        nodes=1,
        tasks_per_node=max(1, cluster.gpus),
        gpus_per_node=cluster.gpus,
        cpus_per_task=cluster.cpus,
    )
    if cluster.memory_gb is not None:
        executor.update_parameters(mem_gb=cluster.memory_gb)
    if cluster.executor == "slurm":
        executor.update_parameters(
            slurm_array_parallelism=cluster.jobs, slurm_additional_parameters=dict(cluster.extra)
        )
        if cluster.partition is not None:
            executor.update_parameters(slurm_partition=cluster.partition)
    return executor
