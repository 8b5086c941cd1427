"""Checks of values, as distinct from shapes and dtypes, which the public functions check.

They run always on CPU tensors. On other devices a check would synchronise, so there they run only
with ``SANM_KERNELS_CHECK=1`` in the environment.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def enabled(x: Tensor) -> bool:
    """Whether the values of `x` are to be checked."""
    return x.device.type == "cpu" or os.environ.get("SANM_KERNELS_CHECK") == "1"


def _require(x: Tensor, ok: Tensor, name: str, expected: str) -> None:
    if bool(ok.all()):
        return
    where = tuple(int(i) for i in (~ok).nonzero()[0])
    raise ValueError(f"{name}: expected {expected}, got {x[where].item()} at index {list(where)}")


def unit_interval(x: Tensor, name: str, *, open_end: bool = False) -> None:
    """Every element of `x` lies in [0, 1], or in [0, 1) if `open_end`; NaN does not."""
    if enabled(x):
        top = x < 1 if open_end else x <= 1
        _require(x, (x >= 0) & top, name, "values in [0, 1)" if open_end else "values in [0, 1]")


def finite(x: Tensor, name: str) -> None:
    """No element of `x` is NaN or infinite."""
    if enabled(x):
        _require(x, torch.isfinite(x), name, "finite values")


def count(x: int, most: int, name: str) -> None:
    """0 ≤ x ≤ most: for calls in which a trace did not know the numbers."""
    if not 0 <= x <= most:
        raise ValueError(f"{name}: expected a number in [0, {most}], got {x}")


def entries(permutation: Tensor | None, rows: int, name: str) -> None:
    """A permutation has an entry for each of the rows."""
    if permutation is not None and len(permutation) < rows:
        raise ValueError(f"{name}: expected at least {rows} entries, got {len(permutation)}")


def indices(x: Tensor, size: int, name: str, ignore: int | None = None) -> None:
    """Every element of `x` lies in [0, size) or equals `ignore`."""
    if enabled(x):
        ok = (x >= 0) & (x < size)
        if ignore is not None:
            ok |= x == ignore
        _require(x, ok, name, f"indices in [0, {size})")
