"""Progress: lines where there is no terminal, a bar where there is one."""

import io
import re

import pytest
from rich.console import Console

from rlaif_lite import progress as module
from rlaif_lite.formats import duration
from rlaif_lite.progress import progress, say


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "_console", Console(file=screen, force_terminal=True, width=100, highlight=False))
    return screen


def test_lines_are_rare_and_say_rate_and_time_left(clock, capsys):
    with progress(12, "sft easy", unit="step") as bar:
        for step in range(12):
            clock.now += 2
            bar.advance(loss=1 / (step + 1))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [  # steps of 2 s: a line after 6 s, 12 s, 18 s, and the last
        "sft easy: 3/12  2.0 s/step  18 s left  loss 0.3333",
        "sft easy: 6/12  2.0 s/step  12 s left  loss 0.1667",
        "sft easy: 9/12  2.0 s/step  6.0 s left  loss 0.1111",
        "sft easy: 12 steps in 24 s  loss 0.08333",
    ]


def test_unknown_total_and_exceptions(clock, capsys):
    with pytest.raises(KeyError), progress(None, "clips") as bar:
        clock.now += 10
        bar.advance(40)
        raise KeyError
    assert capsys.readouterr().err.splitlines() == ["clips: 40  4.0 it/s"]  # and no last line


def test_bar_on_a_terminal_with_text_above_and_a_second_one_inside(terminal, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with progress(4, "outer [x]", unit="video") as outer:
        outer.advance(2, f1=0.5)
        say("a [bracketed] message")
        with progress(3, "inner") as inner:
            inner.advance()
            inner.advance(2)
        outer.advance(2)
    text = terminal.getvalue()
    assert "outer [x]" in text and "a [bracketed] message\n" in text
    assert "4/4" in text and "inner: 1/3  " in text and re.search(r"inner: 3 it in \d", text)  # lines, not a bar
    assert re.search(r"outer \[x\]: 4 videos in \d\.\d s  f1 0\.5\n$", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.9, "1 min 00 s"),
        (65.4, "1 min 05 s"),
        (7384, "2 h 03 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
