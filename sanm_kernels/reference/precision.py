"""The dtype that sums are taken in; run-time numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def numbers(x: Tensor) -> list[float] | list[Tensor]:
    """Run-time numbers (k,) as Python's, or as tensors () where reading them would synchronise."""
    return x.tolist() if x.device.type == "cpu" else list(x.unbind())
