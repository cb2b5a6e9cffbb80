"""One step at a time: the side of a process that is measured. It needs the standard library alone, and Linux.

The driver asks for a step with a line on standard input. The answer is a JSON line with what the step cost: wall
seconds, processor seconds of all threads, and the highest resident memory while it ran. Standard output is left to the
package, which may print what it likes.
"""

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

TELL = "PEERS_TELL"  # environment variable: the file descriptor of the answers
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of the decoder alone


def read_work() -> tuple[str, Path, dict]:
    """The command line of every process that is measured: TASK FOLDER -> (task, folder, sizes and items)."""
    task, folder = sys.argv[1], Path(sys.argv[2])
    return task, folder, json.loads((folder / "work.json").read_text(encoding="utf-8"))


def share_of_e(text: str) -> float:
    """The reward of all packages: the share of the letter e in an answer."""
    return text.count("e") / max(1, len(text))


class Turns:
    """Waits for its turn before every step, and then says what the step cost. Make it when everything is imported."""

    def __init__(self):
        self._answers = os.fdopen(int(os.environ[TELL]), "w", buffering=1)
        self._imported = resident("VmRSS")
        self._began: tuple[float, float] | None = None
        self.counts: dict[str, float] = {}  # what else to say of the step: positions read, seconds of a part

    def next(self) -> None:
        """The step before, if there was one, has ended. Returns when the next step is to begin; ends the process where
        no more are wanted."""
        if self._began is None:
            self._tell({"imported_bytes": self._imported, "loaded_bytes": resident("VmRSS")})
        else:
            seconds, processor = (now - then for now, then in zip(clocks(), self._began, strict=True))
            cost = {"seconds": seconds, "processor_seconds": processor, "peak_bytes": resident("VmHWM")}
            self._tell(cost | self.counts)
        if not sys.stdin.readline():
            os._exit(0)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # no step is charged for what the one before left in the heap
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
        self.counts = dict.fromkeys(self.counts, 0.0)
        self._began = clocks()

    def add(self, name: str, count: float) -> None:
        """Add to what is said of this step."""
        self.counts[name] = self.counts.get(name, 0.0) + count

    def count_positions(self, model) -> None:
        """Count the positions that go through a Qwen2.5-VL's decoder and the patches through its tower."""

        def of_decoder(_, __, given):
            taken = given["inputs_embeds"] if given.get("inputs_embeds") is not None else given["input_ids"]
            self.add("decoder_positions", taken.shape[0] * taken.shape[1])

        named = dict(model.named_modules())
        of_name = lambda end: next(module for name, module in named.items() if name.split(".")[-1] == end)
        of_name("language_model").register_forward_pre_hook(of_decoder, with_kwargs=True)
        of_name("visual").register_forward_pre_hook(lambda _, given: self.add("tower_patches", given[0].shape[0]))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self._tell({"trained_parameters": trained})

    def _tell(self, what: dict) -> None:
        self._answers.write(json.dumps(what) + "\n")


def clocks() -> tuple[float, float]:
    """(wall, processor) seconds."""
    return time.perf_counter(), time.process_time()


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (highest since it was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))
