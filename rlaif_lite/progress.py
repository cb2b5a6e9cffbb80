"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere (files, pipes, CI logs)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import ranks
from .formats import duration

LINE_EVERY_S = 5.0  # at most one plain line in this time

_console = Console(stderr=True, highlight=False)
_bar_is_up = False


def say(text: str) -> None:
    """One plain message on stderr, above a bar where one is running; rank 0 alone speaks. stdout stays free for
    results."""
    if not ranks.is_first():
        return
    if _console.is_terminal:
        _console.print(text, markup=False, soft_wrap=True)
    else:
        print(text, file=_console.file, flush=True)


class Counter:
    """What `progress` yields. Call `advance` as work gets done."""

    def __init__(self, total: int | None, description: str, unit: str, show: Callable[["Counter", int], None]):
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self.stats: dict[str, float | int | str] = {}
        self._started = time.monotonic()
        self._show = show

    def advance(self, n: int = 1, **stats: float | int | str) -> None:
        """`n` more units are done. `stats` stand beside the bar (loss=0.41) until they are given again."""
        self.done += n
        self.stats.update(stats)
        self._show(self, n)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def rate_text(self) -> str:
        """ "3.1 it/s", or "4.2 s/it" where one takes longer than a second."""
        rate = self.done / max(self.seconds, 1e-9)
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 or not self.done else f"{1 / rate:.1f} s/{self.unit}"

    def stats_text(self) -> str:
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.stats.items())

    def line(self) -> str:
        """The state as one plain line."""
        of_total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.description}: {self.done}{of_total}", self.rate_text()]
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{duration(self.seconds / self.done * (self.total - self.done))} left")
        return "  ".join(part for part in (*parts, self.stats_text()) if part)


@contextmanager
def progress(total: int | None, description: str, unit: str = "it") -> Iterator[Counter]:
    """Shows `total` units of work (None: unknown) while the block runs; the last line gives the total time.

    Inside another bar there is room for lines only. An exception passes through, without the last line.
    """
    if _console.is_terminal and not _bar_is_up and ranks.is_first():
        yield from _bar(total, description, unit)
    else:
        yield from _lines(total, description, unit)


def _bar(total: int | None, description: str, unit: str) -> Iterator[Counter]:
    global _bar_is_up
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=_console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, note="")

        def show(counter: Counter, n: int) -> None:
            bar.update(task, advance=n, note=f"{counter.rate_text()}  {counter.stats_text()}")

        counter = Counter(total, description, unit, show)
        _bar_is_up = True
        try:
            yield counter
        finally:
            _bar_is_up = False
    say(_last_line(counter))


def _lines(total: int | None, description: str, unit: str) -> Iterator[Counter]:
    last = time.monotonic()

    def show(counter: Counter, n: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY_S and counter.done != counter.total:
            last = time.monotonic()
            say(counter.line())

    counter = Counter(total, description, unit, show)
    yield counter
    say(_last_line(counter))


def _last_line(counter: Counter) -> str:
    unit = counter.unit + ("" if counter.unit == "it" or counter.done == 1 else "s")
    parts = (f"{counter.description}: {counter.done} {unit} in {duration(counter.seconds)}", counter.stats_text())
    return "  ".join(part for part in parts if part)
