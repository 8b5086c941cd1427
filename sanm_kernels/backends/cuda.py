"""Adapter of the compiled CUDA library.

For tests on machines without a GPU, the environment variable SANM_KERNELS_CUDA_EMULATION names a
library of the same kernels compiled for the host, which run on CPU tensors.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

LIBRARIES = Path(__file__).resolve().parent.parent / "lib"

_loaded: ctypes.CDLL | None = None  # not the emulation, which has no driver to ask about


def load() -> str | None:
    """Load the library where torch has CUDA and a GPU. Returns None, or why it was not loaded.

    Which GPUs it runs on is for :func:`probe` to say.
    """
    global _loaded
    emulation = os.environ.get("SANM_KERNELS_CUDA_EMULATION")
    if emulation:
        path = Path(emulation)
        if not path.is_file():
            return f"SANM_KERNELS_CUDA_EMULATION: there is no {path}"
        return _load(path)
    if torch.version.hip is not None:
        return f"it runs on NVIDIA's GPUs, torch {torch.__version__} is for ROCm"
    path = LIBRARIES / "cuda.so"
    if not path.is_file():
        notes = ("cuda_not_compiled.txt", "not_compiled.txt")  # written by the build
        found = [(LIBRARIES / note).read_text() for note in notes if (LIBRARIES / note).is_file()]
        reason = found[0].strip() if found else "it was never built"
        return f"the compiled library is not in {LIBRARIES}: {reason}"
    if not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        return f"torch {torch.__version__} {built}"
    failure = _load(path)
    if failure is None:
        _loaded = ctypes.CDLL(str(path))
    return failure


def probe(index: int) -> str | None:
    """Ask the CUDA runtime in the library whether its kernels run on GPU `index`, or why not."""
    with torch.cuda.device(index):  # the probe makes it current in any case
        reason: bytes | None = _ask("sanm_cuda_probe", ctypes.c_char_p, index)
    return None if reason is None else reason.decode()


def facts() -> dict[str, str] | None:
    """What the loaded library was built with and for, and what CUDA the driver serves."""
    if _loaded is None:
        return None
    versions = {
        name: _ask(f"sanm_cuda_{name}_version", ctypes.c_int) for name in ("runtime", "driver")
    }
    architectures: bytes = _ask("sanm_cuda_architectures", ctypes.c_char_p)
    texts = {name: f"{n // 1000}.{n % 1000 // 10}" for name, n in versions.items()}
    return texts | {"architectures": architectures.decode()}


def _ask(name: str, result: Any, *arguments: int) -> Any:
    function = getattr(_loaded, name)
    function.restype = result
    return function(*arguments)


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return (
            f"{path.name} does not load with torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None
