"""Adapter of the compiled CUDA library.

For tests on machines without a GPU, the environment variable SANM_KERNELS_CUDA_EMULATION names a
library of the same kernels compiled for the host, which run on CPU tensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARIES = Path(__file__).resolve().parent.parent / "lib"
CAPABILITY = (8, 0)  # the oldest architecture that the library is built for


def load() -> str | None:
    """Load the library where torch has CUDA and a GPU. Returns None, or why it was not loaded."""
    emulation = os.environ.get("SANM_KERNELS_CUDA_EMULATION")
    if emulation:
        path = Path(emulation)
        if not path.is_file():
            return f"SANM_KERNELS_CUDA_EMULATION: there is no {path}"
        return _load(path)
    path = LIBRARIES / "cuda.so"
    if not path.is_file():
        notes = ("cuda_not_compiled.txt", "not_compiled.txt")  # written by the build
        found = [(LIBRARIES / note).read_text() for note in notes if (LIBRARIES / note).is_file()]
        reason = found[0].strip() if found else "it was never built"
        return f"the compiled library is not in {LIBRARIES}: {reason}"
    if not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        return f"torch {torch.__version__} {built}"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if best < CAPABILITY:
        return f"it needs a GPU of compute capability 8.0, the best here has {best[0]}.{best[1]}"
    return _load(path)


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return (
            f"{path.name} does not load with torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None
