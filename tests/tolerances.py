"""The one tolerance policy: an error may be twice that of plain torch in the same dtype.

Both errors are taken against the same computation in float64. A few roundings of the largest value
are allowed on top, so that a lucky eager result is no trap.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

#: Kernels compiled for a sanitizer add term after term, not in vectors, which is less accurate.
SLACK = 64 if os.environ.get("SANM_TEST_CPU_LIBRARIES") else 1


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    what: str = "result",
    roundings: float = 4.0,
    scale: float = 0.0,
) -> None:
    """`actual` is as accurate as the policy asks.

    Args:
        actual: the result under test.
        exact: the same thing computed in float64.
        eager: the same thing computed by plain torch in the dtype of the inputs.
        roundings: how many ulps of the largest magnitude are allowed on top.
        scale: the magnitude of the terms of a sum, where they cancel to something smaller.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert eager.shape == exact.shape
    if exact.numel() == 0:
        return
    exact = exact.double()
    assert torch.equal(torch.isfinite(actual), torch.isfinite(exact)), f"{what}: not finite alike"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    exact, got, base = exact[finite], actual.double()[finite], eager.double()[finite]
    scale = max(exact.abs().max().item(), scale)
    error = (got - exact).abs().max().item()
    allowed = 2 * (base - exact).abs().nan_to_num(0).max().item()
    allowed += SLACK * roundings * torch.finfo(actual.dtype).eps * max(scale, 1e-30)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_parallel(actual: Tensor, exact: Tensor, what: str = "gradient") -> None:
    """Two gradients also agree as vectors: relative L2 distance within 8 ulps times √n… of 1."""
    a, b = actual.double().flatten(), exact.double().flatten()
    norm = b.norm().item()
    distance = (a - b).norm().item()
    limit = 64 * torch.finfo(actual.dtype).eps
    assert distance <= limit * max(norm, 1e-30), f"{what}: relative L2 distance {distance / norm}"
