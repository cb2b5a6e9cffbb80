"""The processes that are measured, from the driver's side."""

import json
import os
import select
import subprocess
from pathlib import Path
from typing import NamedTuple

from lab.bench import ROOT
from lab.bench.peers.turns import TELL

HERE = Path(__file__).parent
SCRIPTS = {"trl": "with_trl.py", "swift": "with_swift.py", "llamafactory": "with_llamafactory.py"}
PACKAGES = (
    "trl",
    "ms-swift",
    "llamafactory",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
)
LOADING, STEP = 240.0, 150.0  # seconds after which a process counts as stuck


class Row(NamedTuple):
    """A package on a task."""

    name: str
    env: str | None  # None: ours
    task: str  # as its process is told
    reads: str


class Worker:
    """A process that loads, and makes a step when it is asked to."""

    def __init__(self, row: Row, python: str, folder: Path):
        read, tell = os.pipe()
        own = row.env is None
        script = ["-m", "lab.bench.peers.ours"] if own else [str(HERE / SCRIPTS[row.env])]
        environment = os.environ | {
            TELL: str(tell),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "MODELSCOPE_CACHE": str(folder / "modelscope"),
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))) if own else "",
        }
        self.log = folder / f"{row.env or 'ours'}_{row.task}.log"
        self.facts: dict = {}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [python, *script, row.task, str(folder)],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(tell,),
                text=True,
            )
        os.close(tell)
        self._answers = os.fdopen(read, encoding="utf-8")

    def load(self) -> None:
        """Wait until the first step could begin. Raises RuntimeError with the error that the process ended with."""
        while "loaded_bytes" not in self.facts:
            self.facts |= self._answer(LOADING)

    def step(self) -> dict:
        """Let it make a step -> what that cost. Raises RuntimeError as `load` does."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer(STEP)

    def close(self) -> None:
        """End the process: it waits for its turn, and hears that there is none."""
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()

    def _answer(self, limit: float) -> dict:
        ready, _, _ = select.select([self._answers], [], [], limit)
        line = self._answers.readline() if ready else ""
        if not line:
            raise RuntimeError(last_error(self.log) if ready else f"it made no step within {limit:.0f} s")
        return json.loads(line)


def last_error(log: Path) -> str:
    """The last line of a log that names an exception; the last line of all where none does."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception"))]
    return (errors or lines or ["it ended without a word"])[-1][:300]


def installed(python: str) -> dict[str, str]:
    """The versions of PACKAGES that an environment has."""
    asks = (
        "import importlib.metadata as m, json, platform, sys\n"
        "has = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version()} | {n: has[n] for n in sys.argv[1:] if n in has}))"
    )
    said = subprocess.run([python, "-c", asks, *PACKAGES], capture_output=True, text=True, check=True)
    return json.loads(said.stdout)
