"""Adapter of the Triton kernels: one module per operator, imported when the backend is loaded.

They run on CUDA tensors and, where the environment says ``TRITON_INTERPRET=1`` before the first
import, on CPU tensors through Triton's interpreter: slowly, for tests and debugging.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

#: The modules of this package that hold operators.
OPERATORS = (
    "fit_label_quality",
    "masked_backward",
    "masked_forward",
    "masked_loss",
    "mixup_views",
    "reconstruction_loss",
    "refine_targets",
    "sample_loss",
)
CAPABILITY = (8, 0)  # the first with bfloat16


def load() -> str | None:
    """Import and register the kernels. Returns None, or why they can't run here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        from sanm_kernels.backends.triton import launch
    except Exception as error:  # whatever a triton of another version, or a broken one, may raise
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if not launch.INTERPRETED:
        if not torch.cuda.is_available():
            built = "sees no GPU" if torch.version.cuda else "was built without CUDA"
            return (
                f"torch {torch.__version__} {built} "
                "(TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
            )
        best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if best < CAPABILITY:
            return (
                f"it needs a GPU of compute capability 8.0, the best here has {best[0]}.{best[1]}"
            )
    for name in OPERATORS:
        importlib.import_module(f"sanm_kernels.backends.triton.{name}")
    return None
