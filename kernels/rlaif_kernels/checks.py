"""Input checks shared by the public functions: a ValueError names the argument, what it was and what was expected."""

from importlib.util import find_spec

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """`float32 of shape (3, 4) on cpu`, a plain value as it is, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} of shape {tuple(value.shape)} on {value.device}"
    return repr(value) if value is None or isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def need(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError: `name` is `value`; expected `expected`."""
    if not condition:
        raise ValueError(f"{name} is {describe(value)}; expected {expected}")


def need_tensor(
    name: str, value: object, shape: tuple[int | None, ...], like: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A tensor of this shape (None = any size), on the device of `like`, of one of these dtypes."""
    sizes = str(shape).replace("None", "any")
    expected = f"{' or '.join(_name(dtype) for dtype in dtypes)} of shape {sizes} on {like.device}"
    need(isinstance(value, Tensor), name, value, expected)
    fits = value.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, value.shape, strict=True))
    need(fits and value.dtype in dtypes and value.device == like.device, name, value, expected)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interpreting() -> bool:
    """True when Triton runs its kernels in Python (TRITON_INTERPRET=1), on CPU tensors."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def use_triton(impl: str, example: Tensor, differentiable: bool = True) -> bool:
    """Which path `impl` ("auto", "triton", "torch") means for tensors like `example`.

    `auto` is Triton wherever it can be: CUDA tensors, not float64, and a gradient only where the kernel has one.
    """
    need(impl in ("auto", "triton", "torch"), "impl", impl, '"auto", "triton" or "torch"')
    if impl == "torch":
        return False
    obstacles = []
    if find_spec("triton") is None:
        obstacles.append("triton is not installed")
    if not (example.is_cuda or (impl == "triton" and interpreting())):
        obstacles.append(f"the tensors are on {example.device}")
    if example.dtype == torch.float64:
        obstacles.append("float64 has no Triton kernel")
    if not differentiable:
        obstacles.append("this function has no gradient in Triton")
    if impl == "triton" and obstacles:
        raise ValueError(f'impl="triton" cannot be used: {" and ".join(obstacles)}; use impl="torch" or "auto"')
    return not obstacles
