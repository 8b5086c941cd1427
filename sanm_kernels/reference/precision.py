"""The dtype that sums are taken in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
