"""The Triton path without a GPU: the same tests once more, in a process where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")
HERE = Path(__file__).parent

SELF_TEST = """
import torch, triton, triton.language as tl
import interpreter_fix

@triton.jit
def narrow(x_ptr, out_ptr):
    at = tl.arange(0, 1024)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))

def wrong():
    x, out = torch.randn(1024), torch.empty(1024, dtype=torch.bfloat16)
    narrow[(1,)](x, out)
    return int((out != x.bfloat16()).sum())

shipped = wrong()
interpreter_fix.round_bfloat16_to_nearest()
print(shipped, wrong())
"""


def interpreted(*command: str) -> subprocess.CompletedProcess:
    """Runs python with these arguments where Triton interprets."""
    paths = [str(HERE), str(HERE.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False
    )


def test_triton_path_in_the_interpreter():
    """In one process, for importing takes long; `--confcutdir`: the conftest.py above imports the whole package."""
    files = ("test_linear_logprob.py", "test_entropy_and_kl.py", "test_gae.py", "test_frames.py")
    options = ("-p", "no:cacheprovider", "--confcutdir", str(HERE))
    run = interpreted("-m", "pytest", *options, *(str(HERE / name) for name in files))
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_the_rounding_fix_is_needed_and_works(tmp_path):
    """When this fails because nothing is wrong as shipped, Triton has mended it: delete interpreter_fix.py."""
    script = tmp_path / "self_test.py"  # triton.jit reads its source from a file
    script.write_text(SELF_TEST)
    run = interpreted(str(script))
    assert run.returncode == 0, run.stderr
    shipped, mended = map(int, run.stdout.split())
    assert shipped > 300, "the interpreter rounds bfloat16 correctly now: delete interpreter_fix.py"
    assert mended == 0
