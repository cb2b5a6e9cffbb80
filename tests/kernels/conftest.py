"""One set of tests, two ways through them.

Plainly run, `impl` is "torch". Under TRITON_INTERPRET=1, which has to stand before Triton is imported, it is "triton"
and only the tests that ask for `impl` are collected; `test_interpreter.py` starts that second run.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from interpreter_fix import round_bfloat16_to_nearest

    from rlaif_kernels import configs

    round_bfloat16_to_nearest()
    # smaller blocks than any GPU is given, so that the rows of a test, too, are several of them
    small = configs.Config(block=256, num_warps=4)
    configs.TABLE[80] = configs.Configs(small, small, small, small, small)


@pytest.fixture(scope="session")
def impl() -> str:
    return "triton" if INTERPRETING else "torch"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETING:
        items[:] = [item for item in items if "impl" in item.fixturenames]
