"""Decoding in worker processes, ahead of the tower, so that no file can end a long run.

A process holds one video at a time. So the culprit is known when a decoder crashes or never comes back: that video is a
VideoError like any other that cannot be read, and a fresh process goes on with the next. The processes import the
decoders and nothing else (no torch), and keep at most one decoded video each.
"""

import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

from ..errors import VideoError
from ..phases import phase
from .decode import Frames, View, decode_views

LIMIT_S = 1800.0  # for one video. Hours of film read in order take minutes

_spawn = multiprocessing.get_context("spawn")  # a fork would share the caller's threads and its hold on the GPU


def decode_all(
    wanted: dict[str, tuple[str | tuple[str, ...], dict[str, View]]],
    workers: int,
    size: tuple[int, int] | None,
    limit_s: float = LIMIT_S,
) -> Iterator[tuple[str, dict[str, Frames] | VideoError]]:
    """{name: (video, its views)} -> for each its name and its frames, or why there are none; as they get done.

    size: (H, W) of the frames. workers: processes; 0 decodes here, and then a crash or a hang is the caller's own.
    Raises RuntimeError where processes cannot be started at all.
    """
    todo = deque((name, *job, size) for name, job in wanted.items())
    if workers == 0:
        for name, video, views, size in todo:
            with phase("decode video", sum(view.count for view in views.values())):
                found = _decode(name, video, views, size)
            yield name, found
        return
    staff = [_Worker() for _ in range(min(workers, len(todo)))]
    try:
        while staff:
            rest_s = min(worker.until for worker in staff) - time.monotonic()
            wait([worker.pipe for worker in staff], None if rest_s == math.inf else max(0.0, rest_s))
            for worker in list(staff):
                if not worker.pipe.poll() and time.monotonic() < worker.until:
                    continue
                name, found = worker.name, worker.take(limit_s)
                if todo and not worker.is_lost:
                    worker.give(todo.popleft(), limit_s)
                else:
                    worker.stop()
                    staff.remove(worker)
                    staff += [_Worker()] if todo else []
                if name:
                    yield name, found
    finally:
        for worker in staff:
            worker.stop()


class _Worker:
    """One process. Its first message says that it has begun, each later one is what became of a video."""

    def __init__(self):
        self.pipe, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # now the end of the process is the end of the pipe
        self.name = ""  # of the video it is at
        self.until = math.inf  # time.monotonic() when that has taken too long
        self.is_lost = False

    def give(self, job: tuple, limit_s: float) -> None:
        self.name, self.until = job[0], time.monotonic() + limit_s
        self.pipe.send(job)

    def take(self, limit_s: float) -> dict[str, Frames] | VideoError | None:
        """What it sent, or why nothing came."""
        if not self.pipe.poll():
            self.is_lost = True
            return VideoError(
                f"{self.name}: the decoder was stopped, it was not done after {limit_s:.0f} s. Re-encode or remove the "
                "video; `features.workers: 0` sets no limit."
            )
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.is_lost = True
            self.process.join()
            code = self.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not self.name:
            raise RuntimeError(f"A process for decoding ended as it began ({how}). `features.workers: 0` needs none.")
        return VideoError(f"{self.name}: the decoder crashed on it ({how}). Re-encode or remove the video.")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """The life of a process: decode what comes until the caller kills it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer
    try:
        pipe.send(None)
        while True:
            pipe.send(_decode(*pipe.recv()))
    except (EOFError, ConnectionError):
        return


def _decode(
    name: str, video: str | tuple[str, ...], views: dict[str, View], size: tuple[int, int] | None
) -> dict[str, Frames] | VideoError:
    try:
        return decode_views(video, views, size=size)
    except VideoError as error:
        return error
    except Exception as error:  # what no reader thought of is one file's matter as well
        return VideoError(f"{name}: it cannot be decoded ({type(error).__name__}: {error}).")
