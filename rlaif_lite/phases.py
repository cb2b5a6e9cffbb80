"""What is going on inside a stage, told to whoever listens: nobody, unless `rlaif-lite profile` is measuring.

The real functions name their phases (`with phase("decode", tokens): ...`) and where a step begins (`step()`). Without
a listener that costs a comparison. Phases do not nest.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Listener(Protocol):
    """What is told of phases and steps while it listens."""

    def phase(self, name: str, count: int) -> AbstractContextManager: ...

    def step(self) -> None: ...


_listener: Listener | None = None
_nothing = nullcontext()


def phase(name: str, count: int = 0) -> AbstractContextManager:
    """The block is phase `name`, and `count` tokens go through it (padding counts; before the tower: frames)."""
    return _nothing if _listener is None else _listener.phase(name, count)


def step() -> None:
    """An optimiser step, or a round of PPO, begins."""
    if _listener is not None:
        _listener.step()


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Send phases and steps to `listener` inside the block; blocks may be nested."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
