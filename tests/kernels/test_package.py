"""What the package promises about itself: where it lies and what it imports."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "rlaif_kernels"


def test_kernels_is_a_plain_folder():
    """A package of that name would stand in for Hugging Face's `kernels` and break `import transformers`."""
    assert PACKAGE.is_dir() and not (ROOT / "kernels" / "__init__.py").exists()


def test_imports_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_works_where_triton_is_not_installed():
    """macOS and Windows: `auto` is torch there, and "triton" says why it cannot be."""
    script = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "triton" else find(name)
import torch
from rlaif_kernels import linear_logprob
arguments = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
assert linear_logprob(*arguments).logp_N.isfinite().all()
try:
    linear_logprob(*arguments, impl="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert run.returncode == 0 and "triton is not installed" in run.stdout, run.stderr
