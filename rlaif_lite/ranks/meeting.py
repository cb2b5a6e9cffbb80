"""How ranks meet, watch each other, and end together with one message."""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import RlaifError, StageError
from .exchange import first, gather, wait
from .world import WORLD, PeerGone, count, rank, talking

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
MEET_S = 60  # until all ranks must have met
LOOK_S = 0.5  # between two looks at the others
ANSWER_S = 5.0  # that a living rank has to say so, when another one is gone
UNWIND_S = 15.0  # until a rank ends that does not unwind, as it waits inside a library
CRITICAL = 1  # exit codes: a defect or a death, and an error that the user can act on, as the command line has them
REFUSED = 2


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The block runs as one rank of those that a launcher started. Where one fails, all end: one message, on rank 0
    (or the first that lives), and an exit code that is not 0 on every rank."""
    if _launched() == 1:
        yield
        return
    # torch reads it when it is imported: a rank that ends would leave C++ stacks in the output of the others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        _join()
    except BaseException as error:
        _end_unmet(error)
    try:
        yield
        wait()
    except BaseException as error:
        _end(error)
    WORLD.closing = True
    import torch.distributed as dist

    dist.destroy_process_group()
    WORLD.rank, WORLD.count = 0, 1


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
    WORLD.rank, WORLD.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    WORLD.local = int(os.environ.get("LOCAL_RANK", WORLD.rank))
    WORLD.here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD.count))
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
    WORLD.store = dist.PrefixStore(f"rlaif_lite/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    # Ranks wait for each other for as long as one works; that one died is known by its closed connections.
    with talking():
        dist.init_process_group(backend, store=WORLD.store, rank=rank(), world_size=count(), timeout=long)
        WORLD.objects = dist.new_group(backend="gloo", timeout=long)
        WORLD.watch = dist.new_group(backend="gloo", timeout=long)
        names = [""] * count()
        dist.all_gather_object(names, f"process {os.getpid()} on {socket.gethostname()}", group=WORLD.objects)
    WORLD.names = tuple(names)
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
            met = dist.barrier(group=WORLD.watch, async_op=True)
            while not met.is_completed():
                time.sleep(LOOK_S)
                if WORLD.store.check(["gone"]):
                    raise RuntimeError
            met.wait()
            time.sleep(LOOK_S)
    except Exception:
        if WORLD.closing:
            return
        with contextlib.suppress(Exception):  # the main thread may be held in an exchange until the store is gone
            _heard.append(_statements(None))
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


_heard: list[_Said] = []  # by the thread that watches


def _verdict(own: str | None) -> tuple[bool, str | None]:
    """(whether this rank is to speak, what it is to say; None where nothing failed)"""
    try:
        said = _heard[-1] if own is None and _heard else _statements(own)
    except Exception:  # the store was rank 0's, and is gone with it
        said = _heard[-1] if _heard else _Said({}, [0])
        said = said if own is None else said._replace(reasons=said.reasons | {rank(): own})
    names = WORLD.names
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
    """Give this rank's reason, and wait for the others'. Rank 0, whose process may hold the store, waits until the
    others have read it."""
    store = WORLD.store
    if own is not None:
        store.set(f"reason/{rank()}", own)
    store.set("gone", "1")
    store.set(f"alive/{rank()}", "1")
    silent = _wait_for("alive", range(count()))
    reasons = {
        number: store.get(f"reason/{number}").decode() for number in range(count()) if store.check([f"reason/{number}"])
    }
    store.set(f"read/{rank()}", "1")
    if rank() == 0:
        _wait_for("read", set(range(count())) - silent)
    return _Said(reasons, sorted(silent))


def _wait_for(sign: str, numbers: Iterable[int]) -> set[int]:
    """Those ranks that have not given a sign after ANSWER_S."""
    until, missing = time.monotonic() + ANSWER_S, set(numbers)
    while missing and time.monotonic() < until:
        missing = {number for number in missing if not WORLD.store.check([f"{sign}/{number}"])}
        time.sleep(0.05)
    return missing


# ------------------------------------------------------------------------------------------------------ at the start


def check_folder(folder: Path) -> None:
    """Raises StageError where a rank does not see the run folder, or sees another one of the same name."""
    path, until = folder / ".ranks.tmp", time.monotonic() + ANSWER_S
    if WORLD.count > 1:
        token, seen = first(lambda: os.urandom(16).hex()), False
        first(lambda: path.write_text(token, encoding="utf-8"))
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
