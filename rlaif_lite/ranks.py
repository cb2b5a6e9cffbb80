"""One run in several processes, the ranks, as `torchrun` or `accelerate launch` starts them. No other module knows
`torch.distributed`; in one process every function here does its work alone.

All ranks run the same program on the same values. Work without gradients is cut into items, which are dealt to the
ranks, and everybody gets every result in the order of the items (`spread`). An update is cut likewise (`deal`), and
its gradients are added up (`sum_gradients`). Rank 0 alone writes (`first`).

Every exchange begins with one small integer from each rank: is it well, or did its memory run out? So a rank that
fails in the middle of an update (`ran_out`) is heard wherever the others are, and all of them undo the update
(`PeerOutOfMemory`).

A rank that dies closes its connections. The others notice within a second, name it, and end.
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .errors import RlaifError, StageError
from .phases import phase

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

T = TypeVar("T")
R = TypeVar("R")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
MEET_S = 60  # until all ranks must have met
LOOK_S = 0.5  # between two looks at the others
ANSWER_S = 5.0  # that a living rank has to say so, when another one is gone
UNWIND_S = 15.0  # until a rank ends that does not unwind, as it waits inside a library
CRITICAL = 1  # exit codes: a defect or a death, and an error that the user can act on, as the command line has them
REFUSED = 2


class PeerOutOfMemory(MemoryError):
    """Memory ran out on another rank, so this one undoes its part of the update, too."""


class PeerGone(RlaifError):
    """An exchange failed, as another rank ended."""


class _World:
    """What this process knows of the others."""

    rank, count, local, here = 0, 1, 0, 1  # number, of all; number on this machine, of those on it
    names: tuple[str, ...] = ()  # of the processes, by rank
    alone = False  # inside `first`: the others wait
    closing = False
    store: Any = None  # keys and values that all ranks see; it outlives a rank
    objects: Any = None  # groups: for what is pickled, and for the watch
    watch: Any = None
    lost = threading.Event()  # another rank is gone


_world = _World()


def rank() -> int:
    """The number of this process among all of the run; 0 where there is one."""
    return _world.rank


def count() -> int:
    """How many processes the run has."""
    return _world.count


def on_this_machine() -> int:
    """How many of them share this machine."""
    return _world.here


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _world.rank == 0


def device(kind: str) -> str:
    """`kind` ("cuda" or "cpu") with this rank's card. Raises StageError where there are more ranks than cards."""
    if kind != "cuda" or _world.count == 1:
        return kind
    import torch

    if _world.local >= torch.cuda.device_count():
        raise StageError(
            f"{_world.here} ranks on {socket.gethostname()}, which has {torch.cuda.device_count()} GPUs. Start one "
            f"rank per GPU: `torchrun --nproc-per-node {torch.cuda.device_count()}`."
        )
    torch.cuda.set_device(_world.local)
    return f"cuda:{_world.local}"


# ------------------------------------------------------------------------------------------------------------ exchange


def first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank. Only rank 0 calls it, and may write files in it."""
    if not _together():
        return make()
    _all_well()
    found: list[Any] = [None]
    if is_first():
        with alone():
            found = [make()]
    import torch.distributed as dist

    with _talking():
        dist.broadcast_object_list(found, src=0, group=_world.objects)
    return found[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The block waits for no other rank: where the run ends, and others may be gone."""
    before, _world.alone = _world.alone, True
    try:
        yield
    finally:
        _world.alone = before


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; tensors arrive on the CPU, where there are several ranks."""
    if not _together():
        return [value]
    import torch.distributed as dist

    _all_well()
    found: list[Any] = [None] * _world.count
    with _talking():
        dist.all_gather_object(found, _on_cpu(value), group=_world.objects)
    return found


def _on_cpu(value: Any) -> Any:
    """Lists, tuples and dictionaries with their tensors on the CPU: a number of a card means another one elsewhere."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_on_cpu, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def collect(value: T) -> list[T]:
    """Every rank's value on rank 0, which is what is large and only to be written; nothing on the others."""
    if not _together():
        return [value]
    import torch.distributed as dist

    _all_well()
    found: list[Any] | None = [None] * _world.count if is_first() else None
    with _talking():
        dist.gather_object(_on_cpu(value), found, dst=0, group=_world.objects)
    return found or []


def wait() -> None:
    """Until all ranks are here."""
    gather(None)


def total(x: "Tensor") -> "Tensor":
    """The sum of every rank's tensor, in place; all have one shape and type."""
    if _together():
        import torch.distributed as dist

        _all_well()
        with _talking():
            dist.all_reduce(x)
    return x


def totals(values: dict[str, float]) -> dict[str, float]:
    """The sums of every rank's numbers, in the order of the ranks, so that all ranks get the same bits."""
    every = gather(values)
    return {name: sum(each[name] for each in every) for name in values} if len(every) > 1 else values


def sum_gradients(parameters: Sequence["Parameter"]) -> None:
    """Add up the gradients of all ranks, in one flat exchange: each rank's loss is its share of the whole batch's."""
    if not _together():
        return
    import torch

    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    with phase("all-reduce", flat.numel()):
        total(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def same(what: str, value: object, where: str) -> None:
    """Raises StageError, naming the ranks, where `value` differs from rank 0's."""
    every = gather(value)
    if other := [number for number, each in enumerate(every) if each != every[0]]:
        differs = f"{what} differs on rank {_listed(other)} from rank 0's"
        raise StageError(f"{where}: {differs}. {_differences(every, other)}")


# ------------------------------------------------------------------------------------------------------------- sharing


def share(items: int, size: Callable[[int], float] = lambda item: 0.0) -> list[list[int]]:
    """The numbers below `items`, dealt to the ranks so that each has about as much: the largest go first, to and fro.
    In one process: all of them, in their order."""
    order = sorted(range(items), key=lambda item: -size(item)) if _world.count > 1 else list(range(items))
    hands: list[list[int]] = [[] for _ in range(_world.count)]
    for place, item in enumerate(order):
        turn, seat = divmod(place, _world.count)
        hands[seat if turn % 2 == 0 else -1 - seat].append(item)
    return [sorted(hand) for hand in hands]


def deal(items: Sequence[T], size: Callable[[T], float] = lambda item: 0.0) -> list[T]:
    """This rank's share of a batch that all ranks know; `size` tells what an item costs."""
    return [items[i] for i in share(len(items), lambda i: size(items[i]))[_world.rank]] if _together() else list(items)


def spread(items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """`work` on all items, one result for each: every rank works on its share, and gets all results, in order."""
    if not items:
        return []
    if not _together():
        return work(list(items))
    hands = share(len(items))
    own = hands[_world.rank]
    found: dict[int, R] = {}
    for hand, results in zip(hands, gather(work([items[i] for i in own]) if own else []), strict=True):
        found |= zip(hand, results, strict=True)
    return [found[i] for i in range(len(items))]


# ------------------------------------------------------------------------------------------------- memory that runs out


def ran_out() -> None:
    """Tell the others, wherever they are in the update, that memory ran out on this rank."""
    if _together():
        _status(1)


def went_well() -> None:
    """At the end of an update that others may still fail in. Raises PeerOutOfMemory where one does."""
    if _together():
        _all_well()


def _all_well() -> None:
    if _status(0):
        raise PeerOutOfMemory("memory ran out on another rank")


def _status(code: int) -> int:
    """The highest code that a rank gives."""
    import torch
    import torch.distributed as dist

    said = torch.tensor([code], dtype=torch.int32)
    with _talking():
        dist.all_reduce(said, dist.ReduceOp.MAX, group=_world.objects)
    return int(said)


def _together() -> bool:
    return _world.count > 1 and not _world.alone


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """An exchange; raises PeerGone where it fails."""
    try:
        yield
    except RuntimeError as error:
        raise PeerGone(f"Another rank ended ({str(error).splitlines()[0]}).") from error


# ------------------------------------------------------------------------------------------------- meeting and parting


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The block runs as one rank of those that a launcher started. Where one fails, all end: one message, on rank 0
    (or the first that lives), and an exit code that is not 0 on every rank."""
    if _launched() == 1:
        yield
        return
    try:
        _join()
    except BaseException as error:
        _end_unmet(error)
    try:
        yield
        wait()
    except BaseException as error:
        _end(error)
    _world.closing = True
    import torch.distributed as dist

    dist.destroy_process_group()
    _world.rank, _world.count = 0, 1


def _launched() -> int:
    """How many ranks a launcher started; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def refuse_several(what: str) -> None:
    """Raises StageError where a launcher started several ranks of `what`, which is for one process."""
    if _launched() > 1:
        raise StageError(
            f"{what} runs in one process. Start it without torchrun, accelerate launch or another launcher."
        )


def _join() -> None:
    """Meet the other ranks, and start to watch them."""
    _world.rank, _world.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _world.local = int(os.environ.get("LOCAL_RANK", _world.rank))
    _world.here = int(os.environ.get("LOCAL_WORLD_SIZE", _world.count))
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise StageError("This torch has no `torch.distributed` with gloo, so it runs in one process only.")
    gpu = torch.cuda.is_available()
    if gpu and not dist.is_nccl_available():
        raise StageError(
            "This torch sees a GPU, but has no NCCL, which adds up gradients across GPUs. Install a CUDA build of "
            "torch for Linux, or start one process without a launcher."
        )
    # A foreign program that holds the port may accept the connection and never answer, and torch then waits for ever.
    silence = StageError(_unmet(f"no answer within {2 * MEET_S} s"))
    late = threading.Timer(2 * MEET_S, _end_unmet, [silence])
    late.daemon = True
    late.start()
    meet, long = datetime.timedelta(seconds=MEET_S), datetime.timedelta(days=7)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=meet)))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise StageError(_unmet(str(error).splitlines()[0])) from error
    _world.store = dist.PrefixStore(f"rlaif_lite/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    # Ranks wait for each other for as long as one works; that one died is known by its closed connections.
    with _talking():
        dist.init_process_group(backend, store=_world.store, rank=rank(), world_size=count(), timeout=long)
        _world.objects = dist.new_group(backend="gloo", timeout=long)
        _world.watch = dist.new_group(backend="gloo", timeout=long)
        names = [""] * count()
        dist.all_gather_object(names, f"process {os.getpid()} on {socket.gethostname()}", group=_world.objects)
    _world.names = tuple(names)
    late.cancel()
    threading.Thread(target=_look_after, daemon=True).start()


def _unmet(reason: str) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank() == 0:
        hint = "Another program may hold the port: give another one (`torchrun --master-port`)."
    else:
        hint = "Is rank 0 started, and can its machine be reached under this address?"
    return f"Rank {rank()} of {count()} cannot meet the others at {address} ({reason}). {hint}"


def _look_after() -> None:
    """Notice that a rank is gone, and end with the others: the thread that watches."""
    import torch.distributed as dist

    try:
        while True:
            met = dist.barrier(group=_world.watch, async_op=True)
            while not met.is_completed():
                time.sleep(LOOK_S)
                if _world.store.check(["gone"]):
                    raise RuntimeError
            met.wait()
            time.sleep(LOOK_S)
    except Exception:
        if _world.closing:
            return
        _world.lost.set()
        with contextlib.suppress(Exception):
            _world.store.set("gone", "1")
            _world.store.set(f"alive/{rank()}", "1")
    import _thread

    handled = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN, None)
    _thread.interrupt_main(signal.SIGTERM if handled else signal.SIGINT)
    time.sleep(UNWIND_S)
    _end(PeerGone("Another rank ended."))


_ending = threading.Lock()


def _end(error: BaseException) -> None:
    """Say once for all ranks why they end, and end this one. Never returns."""
    if not _ending.acquire(blocking=False):
        time.sleep(2 * UNWIND_S)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # the launcher stops the rest as soon as one has ended
            signal.signal(number, signal.SIG_IGN)
    stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
    own = None
    if not stopped and not isinstance(error, PeerGone):
        own = str(error) if isinstance(error, RlaifError) else "".join(traceback.format_exception(error)).rstrip()
    speaker, text = _verdict(own)
    code = REFUSED
    if own is not None and not isinstance(error, RlaifError):
        code = CRITICAL
    elif text is None and stopped:
        text, code = "\nStopped; what is done is kept: run the same command again.", 143
        if isinstance(error, SystemExit) and isinstance(error.code, int):  # as submitit ends a job to queue it again
            code = error.code
    if speaker:
        print(text or f"{error}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)  # libraries that wait for a dead rank would not let the interpreter end


def _end_unmet(error: BaseException) -> None:
    """As `_end`, where the ranks have not met."""
    said = str(error) if isinstance(error, RlaifError) else "".join(traceback.format_exception(error)).rstrip()
    if rank() == 0 or not isinstance(error, StageError) or "cannot meet" in said:
        print(said, file=sys.stderr, flush=True)
    os._exit(REFUSED if isinstance(error, RlaifError) else CRITICAL)


class _Said(NamedTuple):
    """Who ended, and why."""

    reasons: dict[int, str]  # of ranks that gave one
    dead: list[int]  # ranks that say nothing more


def _verdict(own: str | None) -> tuple[bool, str | None]:
    """(whether this rank is to speak, what it is to say; None where nothing failed)"""
    try:
        said = _statements(own)
    except Exception:  # the store was rank 0's, and is gone with it
        said = _Said({} if own is None else {rank(): own}, [0])
    names = _world.names
    speaker = rank() == min(set(range(count())) - set(said.dead), default=0)
    if len(set(said.reasons.values())) == 1 and len(said.reasons) == count():
        return speaker, next(iter(said.reasons.values()))
    lines = [
        reason if number == 0 else f"Rank {number} of {count()} ({names[number]}): {reason}"
        for number, reason in sorted(said.reasons.items())
    ]
    lines += [
        f"Rank {number} of {count()} ({names[number]}) is gone without a word: it was killed, or its machine ran out "
        f"of memory or went down. {KEPT}"
        for number in said.dead
        if not said.reasons
    ]
    return speaker, "\n".join(lines) or None


KEPT = "The last checkpoint is kept: run the same command again, with any number of ranks."


def _statements(own: str | None) -> _Said:
    """Give this rank's reason, and wait for the others'."""
    store = _world.store
    if own is not None:
        store.set(f"reason/{rank()}", own)
    store.set("gone", "1")
    store.set(f"alive/{rank()}", "1")
    until = time.monotonic() + ANSWER_S
    silent = set(range(count()))
    while silent and time.monotonic() < until:
        silent = {number for number in silent if not store.check([f"alive/{number}"])}
        time.sleep(0.05)
    reasons = {
        number: store.get(f"reason/{number}").decode() for number in range(count()) if store.check([f"reason/{number}"])
    }
    return _Said(reasons, sorted(silent))


# ------------------------------------------------------------------------------------------------------- at the start


def check_folder(folder: Path) -> None:
    """Raises StageError where a rank does not see the run folder, or sees another one of the same name."""
    token = first(lambda: _leave_token(folder))
    path, until = folder / ".ranks.tmp", time.monotonic() + ANSWER_S
    if _world.count > 1:
        seen = False
        while not seen and time.monotonic() < until:
            with contextlib.suppress(OSError):
                seen = path.read_text(encoding="utf-8") == token
            time.sleep(0.0 if seen else 0.1)
        blind = gather(None if seen else f"rank {rank()} on {socket.gethostname()}")
        first(lambda: path.unlink(missing_ok=True))
        if named := [name for name in blind if name is not None]:
            raise StageError(
                f"{', '.join(named)}: the run folder {folder.absolute()} of rank 0 is not to be seen there. All ranks "
                "need it at one path: set `output` to a folder that all machines share."
            )


def _leave_token(folder: Path) -> str:
    token = os.urandom(16).hex()
    if _world.count > 1:
        (folder / ".ranks.tmp").write_text(token, encoding="utf-8")
    return token


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _differences(every: list, other: list[int]) -> str:
    """The first keys that differ, where the values are dictionaries."""
    mine, theirs = every[0], every[other[0]]
    if not isinstance(mine, dict):
        return f"It is {theirs!r} there, and {mine!r} on rank 0."
    keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    shown = "; ".join(f"`{key}` is {theirs.get(key)!r} there, and {mine.get(key)!r} on rank 0" for key in keys[:5])
    return shown + (f"; and {len(keys) - 5} more." if len(keys) > 5 else ".")
