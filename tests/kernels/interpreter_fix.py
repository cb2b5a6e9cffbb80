"""Triton's interpreter rounds float32 to bfloat16 by cutting; a GPU rounds to nearest even. This mends it, for tests
alone.

(The interpreter also multiplies bfloat16 as raw bits in `tl.dot` and in arithmetic. No kernel here does either: every
load is turned to float32, and the matmuls are torch's.) It reaches into Triton's private names, so
`test_interpreter.py` holds that it is still needed and still works.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

ORIGINAL = interpreter._convert_float


def round_bfloat16_to_nearest() -> None:
    """Replaces the interpreter's conversion by torch's, for float32 to bfloat16 unless truncation is asked for."""

    def convert(values, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16 and mode != interpreter._ir.ROUNDING_MODE.RTZ:
            floats = torch.from_numpy(np.ascontiguousarray(values.view(np.float32)))
            return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        return ORIGINAL(values, source, target, mode)

    interpreter._convert_float = convert


def restore() -> None:
    """The interpreter as Triton ships it."""
    interpreter._convert_float = ORIGINAL
