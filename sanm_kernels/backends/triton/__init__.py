"""Adapter of the Triton kernels: this package's modules, imported when the backend is loaded.

They run on CUDA tensors and, where the environment says ``TRITON_INTERPRET=1`` before the first
import, on CPU tensors through Triton's interpreter: slowly, for tests and debugging.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import torch

CAPABILITY = (8, 0)  # the first with bfloat16


def load() -> str | None:
    """Import and register the kernels. Returns None, or why they can't run here.

    :func:`probe` checks each GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        from sanm_kernels.backends.triton import launch
    except Exception as error:  # another version of triton, or a broken one, may raise anything
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if not launch.INTERPRETED and not torch.cuda.is_available():
        has_gpus = torch.version.cuda or torch.version.hip
        built = "sees no GPU" if has_gpus else "was built without CUDA"
        return (
            f"torch {torch.__version__} {built} "
            "(TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        )
    register()
    return None


def register() -> None:
    """Import every module of this package: those of operators register their kernels."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def probe(index: int) -> str | None:
    """None if the kernels run on GPU `index`, else the reason. Not checked for AMD GPUs."""
    from sanm_kernels.backends.triton import launch

    if launch.INTERPRETED or torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(index)
    if found >= CAPABILITY:
        return None
    return f"it needs compute capability 8.0, GPU {index} has {found[0]}.{found[1]}"
