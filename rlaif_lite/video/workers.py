"""Reading videos in worker processes, ahead of the tower, so that no file can end or block a long run.

Hashing, opening and decoding happen here and never in the run's own process. A worker has one video at a time, so the
file that crashes a decoder, takes too long or wants too much memory is known. That video becomes a VideoError, like any
other that cannot be read, and a fresh process continues with the next.

A worker that dies is tried again once with the same video. A second death by a signal that decoders cause (such as
SIGSEGV) is the video's fault. A second death from outside (SIGKILL of a machine that is out of memory) is not: it stops
the run, and no video is set aside for it.

Workers hold no torch, and one decoded video each. Their memory is bounded (RLIMIT_AS, where the system has it). Their
time is bounded by the length of the video: BASE_S, and its pixels at PIXELS_PER_S.
"""

import math
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from .. import ranks
from ..errors import StageError, VideoError
from ..phases import phase
from .container import FRAME_LIMIT
from .decode import Frames, Reader, View, open_video, read_views
from .digest import video_digest
from .frame_size import FrameSize

try:
    import resource
except ImportError:  # not a POSIX system: memory is not bounded
    resource = None

Video = str | tuple[str, ...]

MEMORY = 4 << 30  # bytes of address space that one video may take beyond the worker's own; 8K HEVC takes half of it
BASE_S = 60.0  # to hash or to open a file, whatever its length; a slow network drive is given HASH_RATE on top
PIXELS_PER_S = 10e6  # a tenth of what one slow core decodes of H.264
HASH_RATE = 1e6  # bytes per second
CRASHES = {
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS")
    if hasattr(signal, name)
}

# A fork would share the caller's threads and its hold on the GPU. The server forks from a process without either, and
# has the decoders imported: a worker starts in 10 ms, where a spawned one takes 200.
_context = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if hasattr(_context, "set_forkserver_preload"):
    _context.set_forkserver_preload([__name__])


class Job(NamedTuple):
    """What to do with one video. `work(report, *given)` runs in a worker; report(seconds) sets its time limit."""

    name: str
    work: Callable[..., Any]
    given: tuple


class _Limit(NamedTuple):
    """Sent by a worker that has seen how long its video is."""

    seconds: float


def how_many(asked: int | None) -> int:
    """Processes: as many as asked for, else one for every two cores, as the caller computes meanwhile."""
    return asked or max(1, ranks.cores() // 2)


def decode_all(
    wanted: dict[str, tuple[Video, dict[str, View]]],
    workers: int,
    size: tuple[int, int] | FrameSize | None,
    frame_limit: int = FRAME_LIMIT,
) -> Iterator[tuple[str, dict[str, Frames] | VideoError]]:
    """{name: (video, its views)} -> for each its name and its frames, or why there are none; in the order of finishing.

    size: (H, W) of the frames; frame_limit: pixels of a frame above which a video is refused; workers: processes.
    Raises RuntimeError where processes cannot be started, StageError where they are killed from outside.
    """
    jobs = [Job(name, _decode, (video, views, size, frame_limit)) for name, (video, views) in wanted.items()]
    results = run_all(jobs, workers)
    frames = sum(view.count for _, views in wanted.values() for view in views.values())
    for _ in jobs:
        with phase("decode video", frames // len(jobs)):  # what the caller waits for; the rest is done ahead
            result = next(results)
        yield result


def digest_all(videos: dict[str, Video], workers: int) -> Iterator[tuple[str, str | VideoError]]:
    """{name: video} -> for each its name and sha256 (`video_digest`), or why there is none. Raises as `decode_all`."""
    return run_all([Job(name, _digest, (video,)) for name, video in videos.items()], workers)


def decode_one(
    video: Video, views: dict[str, View], size: tuple[int, int] | FrameSize | None, frame_limit: int = FRAME_LIMIT
) -> dict[str, Frames]:
    """`decode_views` in a worker. Raises VideoError, and as `decode_all`."""
    name = video if isinstance(video, str) else video[0]
    ((_, found),) = decode_all({name: (video, views)}, 1, size, frame_limit)
    if isinstance(found, VideoError):
        raise found
    return found


def run_all(jobs: list[Job], workers: int, base_s: float = BASE_S) -> Iterator[tuple[str, Any]]:
    """Each job's name and result (or VideoError), in the order of finishing. Raises as `decode_all`."""
    todo = deque(jobs)
    died: set[str] = set()  # jobs that a worker died on once
    staff = [_Worker() for _ in range(min(workers, len(todo)))]
    try:
        while staff:
            rest_s = min(worker.until for worker in staff) - time.monotonic()
            wait([worker.pipe for worker in staff], None if rest_s == math.inf else max(0.0, rest_s))
            for worker in list(staff):
                if not worker.pipe.poll() and time.monotonic() < worker.until:
                    continue
                job, found = worker.job, worker.take()
                if isinstance(found, _Limit):
                    worker.until = time.monotonic() + found.seconds
                    continue
                if isinstance(found, _Died) and job is not None:
                    if job.name not in died:
                        died.add(job.name)
                        todo.appendleft(job)
                        job = None
                    else:
                        found = found.verdict(job.name)
                if todo and not worker.is_lost:
                    worker.give(todo.popleft(), base_s)
                else:
                    worker.stop()
                    staff.remove(worker)
                    staff += [_Worker()] if todo else []
                if job is not None:
                    yield job.name, found
    finally:
        for worker in staff:
            worker.stop()


class _Died(NamedTuple):
    """A worker that ended in the middle of a job."""

    code: int  # its exit code; -n: by signal n

    @property
    def how(self) -> str:
        return signal.Signals(-self.code).name if self.code < 0 else f"exit code {self.code}"

    def verdict(self, name: str) -> VideoError:
        """The second time: the video's fault, or raises StageError where it came from outside."""
        if self.code < 0 and -self.code not in CRASHES:
            raise StageError(
                f"Processes that decode videos are being killed from outside ({self.how}, twice on {name}). The "
                "machine may be out of memory: lower `features.workers` or free memory, and run again. What is done is "
                "kept, and no video is set aside for this."
            )
        return VideoError(f"{name}: the decoder crashed on it, twice ({self.how}). Re-encode or remove the video.")


class _Worker:
    """One process. Its first message says that it has started. Then come limits and results."""

    def __init__(self):
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        # A new process runs the caller's script again, for what that script defines. Nothing here is defined there, and
        # a script that imports torch would cost every worker seconds and gigabytes: it is hidden.
        with mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
            self.process.start()
        theirs.close()  # now the end of the process is the end of the pipe
        self.job: Job | None = None
        self.until = math.inf  # time.monotonic() when the job has taken too long
        self.given_at = 0.0
        self.is_lost = False

    def give(self, job: Job, base_s: float) -> None:
        self.job, self.given_at = job, time.monotonic()
        self.until = self.given_at + base_s
        self.pipe.send(job)

    def take(self) -> Any:
        """What it sent, why nothing came in time, or how it died."""
        if not self.pipe.poll():
            self.is_lost = True
            spent = time.monotonic() - self.given_at
            return VideoError(
                f"{self.job.name}: the decoder was stopped. It was not done after {spent:.0f} s, ten times what such a "
                "video takes. Re-encode or remove the video."
            )
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.is_lost = True
            self.process.join()
            died = _Died(self.process.exitcode)
        if self.job is None:
            raise RuntimeError(f"A process for decoding ended as it started ({died.how}).")
        return died

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """The life of a process: do what comes until the caller kills it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer
    _bound_memory()
    try:
        pipe.send(None)
        while True:
            job = pipe.recv()
            pipe.send(_result(job, lambda seconds: pipe.send(_Limit(seconds))))
    except (EOFError, ConnectionError):
        return


def _bound_memory() -> None:
    """Limit this process's address space to what it has, and MEMORY more."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # a system without /proc
        own = 1 << 30
    wanted = own + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _result(job: Job, report: Callable[[float], None]) -> Any:
    try:
        return job.work(report, *job.given)
    except VideoError as error:
        return error
    except MemoryError:
        return VideoError(
            f"{job.name}: decoding it takes more than {MEMORY / 2**30:.0f} GiB. Re-encode it smaller, or remove it."
        )
    except Exception as error:  # what no reader expected is one file's matter as well
        return VideoError(f"{job.name}: it cannot be decoded ({type(error).__name__}: {error}).")


def _decode(
    report: Callable[[float], None],
    video: Video,
    views: dict[str, View],
    size: tuple[int, int] | FrameSize | None,
    frame_limit: int,
) -> dict[str, Frames]:
    reader = open_video(video, size, frame_limit)
    report(seconds_for(reader))
    return read_views(reader, views)


def seconds_for(reader: Reader) -> float:
    """How long reading this video may take."""
    return BASE_S + reader.pixels / PIXELS_PER_S


def _digest(report: Callable[[float], None], video: Video) -> str:
    return video_digest(video, lambda size: report(BASE_S + size / HASH_RATE))
