"""The bench runs where there is no GPU, says of everybody either a number or why not, and claims nothing it did not
measure."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "run.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is what a machine without a GPU does")
def test_dry_run(tmp_path):
    spec = importlib.util.spec_from_file_location("kernels_bench_run", RUN)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.main(["--shapes", "16x8x40", "--tasks", "train", "kl", "--rounds", "1", "--out", str(tmp_path)])

    rows = list(csv.DictReader((tmp_path / "kernels_bench.csv").open()))
    assert [(row["task"], row["provider"]) for row in rows] == [
        (task, name) for task in ("train", "kl") for name in run.PROVIDERS
    ]
    assert all((row["ms"] == "") != (row["note"] == "") for row in rows), "a number or a reason"
    measured = {(row["task"], row["provider"]): row for row in rows if row["ms"]}
    for name in ("rlaif_kernels", "rlaif_kernels (torch path)", "Hugging Face eager", "matmuls alone"):
        assert ("train", name) in measured and ("kl", name) in measured
    ours, eager = measured["train", "rlaif_kernels"], measured["train", "Hugging Face eager"]
    assert float(ours["logp_error"]) < 1e-5 < float(eager["logp_error"])
    assert float(ours["grad_error"]) < 3e-3
    assert (tmp_path / "kernels_bench.png").exists()
    page = (tmp_path / "kernels_bench.md").read_text()
    assert page.count("not measured: no GPU was available") == 5 and "a dry run" in page
