"""The notebook runs from its first cell to its last, on a world of a few videos."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "docs" / "demo.ipynb", as_version=4)
    size = [cell for cell in notebook.cells if "VIDEOS, STEPS = 200, 10" in cell.source]
    assert len(size) == 1
    size[0].source = size[0].source.replace("VIDEOS, STEPS = 200, 10", "VIDEOS, STEPS = 16, 1")
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(ROOT))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert len(images) >= 3 and "greedy_hallucination" in printed and "PPO:" in printed
    pages = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("iframe" in page and "held-out" in page for page in pages)
