"""`python kernels/bench/run.py`: every provider, every task, every shape, side by side in one process.

Protocol: the same inputs for all, the head frozen, targets and outputs the same; three warm-ups, then rounds in which
the providers take turns in a shuffled order, with the cache flushed before each step; median, 20th and 80th percentile.
Memory is the peak above what was held before, less the results. Errors are against float64 on 64 rows. Where there is
no GPU the same code runs at tiny shapes, to show that it runs; such times mean nothing and are not kept in
docs/results.
"""

import argparse
import csv
import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)] + [str(Path(__file__).resolve().parent)]

from providers import MATMULS, PROVIDERS, CannotRun, Problem, make_problem

from rlaif_kernels import reference
from rlaif_lite.formats import markdown_table

MAIN = (8192, 3584, 152064)
SHAPES = [MAIN, (2048, 3584, 152064), (8192, 2048, 151936), (8192, 4096, 32000)]
TINY = [(64, 48, 600)]
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
CHECKED_ROWS = 64


class Row(NamedTuple):
    """One line of the CSV; empty where it does not apply."""

    task: str
    N: int
    D: int
    V: int
    provider: str
    note: str = ""  # why there is no number
    ms: float | str = ""
    ms_p20: float | str = ""
    ms_p80: float | str = ""
    useful_tflops: float | str = ""  # 2NDV per matmul that the task cannot do without
    of_matmul: float | str = ""  # the same as a share of what the matmuls alone reach
    extra_mb: float | str = ""
    logp_error: float | str = ""  # largest, nats
    ratio_error: float | str = ""  # largest |exp(logp - exact) - 1|: what PPO's ratio is off by before any update
    grad_error: float | str = ""  # relative


class Clock:
    """Times one step and clears the cache before it."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty((256 << 20) if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, step) -> float:
        """Milliseconds."""
        if not self.cuda:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def errors(problem: Problem, task: str, logp_N: torch.Tensor | None) -> dict[str, float]:
    """Against float64 on the first rows; the gradient of `train` only, where no row depends on how many there are."""
    rows = slice(0, CHECKED_ROWS)
    hidden_ND = problem.hidden_ND[rows].detach().double().requires_grad_()
    exact_N = reference.linear_logprob(hidden_ND, problem.weight_VD.double(), problem.target_N[rows])[0]
    found = {}
    if logp_N is not None:
        gap_N = logp_N[rows].double() - exact_N.detach()
        found = {"logp_error": float(gap_N.abs().max()), "ratio_error": float(gap_N.expm1().abs().max())}
    if task == "train":
        exact_N.backward(problem.upstream_N[rows].double())
        grad_ND = problem.hidden_ND.grad[rows].double()
        found["grad_error"] = float((grad_ND - hidden_ND.grad).norm() / hidden_ND.grad.norm())
    return found


def extra_memory(problem: Problem, step, cuda: bool) -> float | str:
    """Megabytes at the peak of one step beyond what is there before and what it leaves as its result."""
    if not cuda:
        return ""
    problem.hidden_ND.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    results = sum(t.numel() * t.element_size() for t in (kept, problem.hidden_ND.grad) if t is not None)
    return (torch.cuda.max_memory_allocated() - before - results) / 1e6


def bench(shape: tuple[int, int, int], task: str, device: str, rounds: int, clock: Clock) -> list[Row]:
    """One row per provider."""
    problem = make_problem(*shape, torch.bfloat16, device)
    N, D, V = len(problem.target_N), shape[1], shape[2]
    steps, rows = {}, {name: Row(task, N, D, V, name) for name in PROVIDERS}
    for name, provider in PROVIDERS.items():
        try:
            problem.hidden_ND.grad = None
            step = provider(problem, task)
            kept = step()
            found = {} if name == "matmuls alone" else errors(problem, task, kept)
            del kept
            for _ in range(2):
                step()
            rows[name] = rows[name]._replace(extra_mb=extra_memory(problem, step, device == "cuda"), **found)
            steps[name] = step
        except CannotRun as reason:
            rows[name] = rows[name]._replace(note=str(reason))
        except Exception as error:  # out of memory, or a peer that fails at this shape: the others go on
            rows[name] = rows[name]._replace(note=failure(error))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(times), len(times)):
            problem.hidden_ND.grad = None
            try:
                times[name].append(clock(steps[name]))
            except Exception as error:  # the others go on
                rows[name] = rows[name]._replace(note=failure(error))
                del times[name]
    work = 2e-9 * MATMULS[task] * N * D * V
    floor = statistics.median(times["matmuls alone"]) if "matmuls alone" in times else None
    for name, taken in times.items():
        p20, ms, p80 = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows[name] = rows[name]._replace(
            ms=ms, ms_p20=p20, ms_p80=p80, useful_tflops=work / ms, of_matmul=floor / ms if floor else ""
        )
    return list(rows.values())


def failure(error: Exception) -> str:
    """A provider's note in place of its numbers."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def targets(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(what, target, measured) at the main shape."""
    at = {(row.task, row.provider): row for row in rows if (row.N, row.D, row.V) == MAIN and row.ms != ""}
    none = "not measured: no GPU was available"

    def ratio(task: str) -> str:
        ours, floor = at.get((task, "rlaif_kernels")), at.get((task, "matmuls alone"))
        return f"{ours.ms / floor.ms:.2f} x" if ours and floor else none

    ours = at.get(("train", "rlaif_kernels"))
    peers = [
        row
        for (task, name), row in at.items()
        if task == "train" and not name.startswith(("rlaif", "matmuls", "Hugging", "torch.compile"))
    ]
    best = min(peers, key=lambda row: row.ms) if peers else None
    return [
        ("train: time over the two matmuls alone", "at most 1.35 x", ratio("train")),
        (
            "train: against the fastest per-token peer",
            "at least 1.4 x faster",
            f"{best.ms / ours.ms:.2f} x ({best.provider})" if ours and best else none,
        ),
        (
            "train: memory beyond inputs and outputs",
            "at most 0.40 GB",
            f"{ours.extra_mb / 1e3:.2f} GB" if ours else none,
        ),
        ("train: error of the log-prob", "at most 5e-5", f"{ours.logp_error:.1e}" if ours else none),
        ("kl: time over the three matmuls alone", "at most 1.35 x", ratio("kl")),
    ]


def write(rows: list[Row], device: str, out: Path) -> None:
    """kernels_bench.csv, .md and .png."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "kernels_bench.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(Row._fields)
        table.writerows([f"{value:.4g}" if isinstance(value, float) else value for value in row] for row in rows)
    lines = [
        "# Bench of the row kernels",
        "",
        f"Device: {device}. torch {torch.__version__}. Written by `python kernels/bench/run.py`.",
        "",
    ]
    lines += [markdown_table(("target at N=8192, D=3584, V=152064, bf16", "wanted", "measured"), targets(rows))]
    columns = (
        "provider",
        "ms",
        "ms_p20",
        "ms_p80",
        "of_matmul",
        "extra_mb",
        "logp_error",
        "ratio_error",
        "grad_error",
        "note",
    )
    for task, N, D, V in dict.fromkeys(row[:4] for row in rows):
        shown = [[getattr(row, column) for column in columns] for row in rows if row[:4] == (task, N, D, V)]
        cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in shown]
        lines += ["", f"## {task}, N={N}, D={D}, V={V}", "", markdown_table(columns, cells)]
    (out / "kernels_bench.md").write_text("\n".join(lines) + "\n")
    plot(rows, device, out / "kernels_bench.png")


def plot(rows: list[Row], device: str, path: Path) -> None:
    """Time and memory of `train` at the first shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape = rows[0][1:4]
    bars = [row for row in rows if row.task == "train" and row[1:4] == shape and row.ms != ""]
    if not bars:
        return
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.4 * len(bars) + 1.2), sharey=True, constrained_layout=True
    )
    names = [row.provider for row in bars]
    colours = ["#c44e52" if row.provider == "rlaif_kernels" else "#8c8c8c" for row in bars]
    left.barh(names, [row.ms for row in bars], color=colours)
    right.barh(names, [row.extra_mb or 0 for row in bars], color=colours)
    left.invert_yaxis()
    left.set_xlabel("ms, forward + backward")
    right.set_xlabel("MB beyond inputs and outputs")
    figure.suptitle(f"log-probs with a given gradient, N={shape[0]} D={shape[1]} V={shape[2]}, {device}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Runs and writes; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="NxDxV, for example 8192x3584x152064")
    parser.add_argument("--tasks", nargs="*", default=list(MATMULS), choices=list(MATMULS))
    parser.add_argument("--rounds", type=int, help="30 on a GPU, 3 on a CPU")
    parser.add_argument("--out", type=Path, help="folder; docs/results on a GPU, ./kernels_bench_dry_run on a CPU")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes or []] or (
        SHAPES if device == "cuda" else TINY
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, a dry run: its times mean nothing"
    out = options.out or (RESULTS if device == "cuda" else Path("kernels_bench_dry_run"))
    clock, rows = Clock(device), []
    for shape in shapes:
        for task in options.tasks:
            for row in bench(shape, task, device, options.rounds or (30 if device == "cuda" else 3), clock):
                rows.append(row)
                print(
                    f"{row.task:6} {row.N}x{row.D}x{row.V} {row.provider:28} ",
                    f"{row.ms:9.3f} ms" if row.ms != "" else row.note,
                )
            write(rows, name, out)  # after each task: a run that is killed leaves what it has
    print(f"-> {out / 'kernels_bench.md'}")
    return rows


if __name__ == "__main__":
    main()
