"""A training step of ours beside the same step of other packages, on a CPU.

    python -m lab.bench.peers [--env trl=PYTHON --env swift=PYTHON --env llamafactory=PYTHON] [--tasks grpo dpo sft ...]
                              [--rounds 3] [--out docs/results/peers_cpu] [--folder FOLDER] [--size KEY=NUMBER ...]

Every package runs in a process of its own, with the Python of the environment that `--env` names. All are loaded before
anything is measured; then they take turns, one step each, round after round. The first step of each warms up and is
left out. What cannot run costs its own row only: the row has the last line of its error. Writes OUT.json and the tables
in OUT.md round by round; tasks that are not asked for stay as they are.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from shlex import join

from lab import commit
from lab.bench import ROOT
from lab.bench.peers.table import write_tables
from lab.bench.peers.work import Sizes, prepare
from lab.bench.peers.worker import Row, Worker, installed
from rlaif_lite.files import read_json, write_json
from rlaif_lite.training.meter import describe_machine, versions

VIDEO, IMAGES = "video", "frames as images"
TASKS = {
    "grpo": (
        Row("ours", None, "grpo", VIDEO),
        Row("features of one video", None, "features", VIDEO),
        Row("TRL", "trl", "grpo", IMAGES),
        Row("ms-swift", "swift", "grpo", VIDEO),
    ),
    "dpo": (Row("ours", None, "dpo", VIDEO), Row("TRL", "trl", "dpo", IMAGES), Row("ms-swift", "swift", "dpo", VIDEO)),
    "sft": (
        Row("ours", None, "sft", VIDEO),
        Row("LLaMA-Factory", "llamafactory", "sft", VIDEO),
        Row("ms-swift", "swift", "sft", VIDEO),
    ),
}


def measure(
    rows: tuple[Row, ...],
    pythons: dict[str | None, str],
    folder: Path,
    rounds: int,
    keep: Callable[[list[dict]], None] = lambda found: None,
) -> list[dict]:
    """Each row's steps and what its process said of itself, or why there are none. `keep` gets them every round."""
    found = [row._asdict() | {"steps": [], "facts": {}} for row in rows]
    workers: dict[int, Worker] = {}

    def give_up(number: int, error: Exception) -> None:
        found[number] |= {"why": str(error), "steps": []}
        print(f"  {rows[number].name}: {error}", file=sys.stderr, flush=True)
        if number in workers:
            workers.pop(number).close()

    for number, row in enumerate(rows):
        try:
            if row.env not in pythons:
                raise RuntimeError(f"no environment was given: --env {row.env}=PYTHON")
            workers[number] = Worker(row, pythons[row.env], folder)
            workers[number].load()
            found[number]["facts"] = workers[number].facts
        except (RuntimeError, OSError) as error:
            give_up(number, error)
    for turn in range(rounds + 1):
        for number in sorted(workers, reverse=turn % 2 == 1):
            try:
                step = workers[number].step()
            except (RuntimeError, OSError) as error:
                give_up(number, error)
                continue
            print(f"  {turn} {rows[number].name}: {step['processor_seconds']:.2f} s", file=sys.stderr, flush=True)
            if turn:  # the first warms up
                found[number]["steps"].append(step)
        if turn:
            keep(found)
    for worker in workers.values():
        worker.close()
    return found


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and write what was found."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON")
    ask.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--size", action="append", default=[], metavar="KEY=NUMBER", help="of the work; see work.Sizes")
    ask.add_argument("--folder", type=Path, help="where checkpoint, videos and logs stay; left out: they do not")
    ask.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "peers_cpu")
    options = ask.parse_args(arguments)
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        ask.error(f"--folder {options.folder} is not empty. Name a new one: ours would go on where an old run stopped.")
    pythons = {None: sys.executable} | dict(each.split("=", 1) for each in options.env)
    given = {key: int(value) for key, value in (each.split("=") for each in options.size)}
    sizes = Sizes(**given, steps=options.rounds + 2)  # the last one is begun and not measured
    file = options.out.with_suffix(".json")
    result = read_json(file) if file.exists() else {"schema": 1, "tasks": {}}
    envs = {name: installed(python) for name, python in pythons.items() if name is not None}
    result |= {"machine": describe_machine(), "sizes": asdict(sizes)}
    result["versions"] = result.get("versions", {}) | envs | {"ours": versions()}
    with ExitStack() as held:
        folder = options.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="rlaif-peers-")))
        prepare(folder, sizes)
        for task in options.tasks:
            print(task, file=sys.stderr, flush=True)
            how = {"commit": commit(), "arguments": join(hidden(options))}

            def keep(rows: list[dict], task: str = task, how: dict = how) -> None:
                result["tasks"][task] = how | {"rows": rows}
                write_json(file, result)
                write_tables(options.out.with_suffix(".md"), result)

            keep(measure(TASKS[task], pythons, folder, options.rounds, keep))
    return result


def hidden(options: argparse.Namespace) -> list[str]:
    """The command line's words, without paths of this machine."""
    words = [f"--env={each.split('=', 1)[0]}=PYTHON" for each in options.env]
    return [*words, "--rounds", str(options.rounds), *(f"--size={each}" for each in options.size)]


if __name__ == "__main__":
    main()
