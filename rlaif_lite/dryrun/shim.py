"""The shim that a torch without CUDA needs: built once per version of torch, loaded before torch is imported."""

import ctypes
import importlib.util
import os
from pathlib import Path

from ..errors import StageError

SOURCE = Path(__file__).parent / "guard.cpp"


def build() -> Path | None:
    """The shim's library, compiled where it is not there yet; None where torch has CUDA and needs none.

    Raises StageError where it cannot be compiled, and for a torch with CUDA that sees no GPU."""
    import torch
    from torch.utils import cpp_extension

    if torch.backends.cuda.is_built():
        if not torch.cuda.is_available():  # its own hooks ask for a device, and the shim cannot take their place
            raise StageError(
                f"This torch ({torch.__version__}) has CUDA and sees no GPU, so a dry run cannot run backward passes. "
                "Run it where there is a GPU, or in an environment of its own with a torch without CUDA: "
                f"`pip install torch=={torch.__version__.partition('+')[0]}+cpu "
                "--index-url https://download.pytorch.org/whl/cpu`."
            )
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "rlaif-lite" / f"dry-run-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cpp_extension.load("guard", [str(SOURCE)], build_directory=str(folder), is_python_module=False)
    except (RuntimeError, OSError) as error:
        raise StageError(
            f"This torch ({torch.__version__}) has no CUDA, so a dry run needs a small shim, and the shim cannot be "
            f"built: {str(error).strip().splitlines()[0]}\nInstall a C++ compiler and ninja, or use a torch with CUDA "
            "where there is a GPU, which needs no shim."
        ) from error
    return folder / "guard.so"


def install(library: Path) -> None:
    """Load the shim. It must happen before torch is imported: torch looks for CUDA's hooks only once."""
    torch = importlib.util.find_spec("torch")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library)).install()
