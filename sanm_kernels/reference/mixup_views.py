"""Mixture of rows of several views (section 7): out_i = λ·v_i + (1 − λ)·v_π(i), v their stack."""

from __future__ import annotations

import torch
from torch import Tensor

from sanm_kernels.reference import checks
from sanm_kernels.reference.precision import numbers


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def memory_format(tensors: list[Tensor]) -> torch.memory_format:
    """channels_last if every non-empty tensor is that and not contiguous too; else contiguous."""
    kind = torch.channels_last
    filled = [x for x in tensors if x.shape[0] > 0]
    if filled and all(
        x.dim() == 4 and x.is_contiguous(memory_format=kind) and not x.is_contiguous()
        for x in filled
    ):
        return kind
    return torch.contiguous_format


def check(permutation: Tensor, total: int, rows: int) -> None:
    """The values of mixup_views' permutation of `total` rows, where values are checked."""
    partner = permutation[:rows]
    checks.indices(partner, total, "permutation")
    if checks.enabled(partner) and len(partner.unique()) != rows:
        raise ValueError(f"permutation: expected its first {rows} entries to be distinct")


def forward(views: list[Tensor], lam: Tensor, permutation: Tensor, rows: int) -> Tensor:
    """The first `rows` mixed rows (rows, …), in the views' dtype and memory format.

    views: (b_i, …) each, M rows together; lam (1,) float64 on the CPU or the views' device;
    permutation (≥ rows,) int64, its first `rows` entries distinct and in [0, M).
    """
    total = sum(len(v) for v in views)
    checks.count(rows, total, "rows")
    checks.entries(permutation, rows, "permutation")
    check(permutation, total, rows)
    partner = permutation[:rows]
    stacked = torch.cat(views)
    x, y = _compute(stacked[:rows]), _compute(stacked[partner])
    (share,) = numbers(lam)
    mixed = (share * x + (1 - share) * y).to(stacked.dtype)
    return mixed.contiguous(memory_format=memory_format(views))


def backward(grad: Tensor, lam: Tensor, permutation: Tensor, sizes: list[int]) -> list[Tensor]:
    """The views' gradients: λ·g_i (i < rows) + (1 − λ)·g_j (where π(j) = i), a gather per row.

    grad (rows, …); sizes: rows of each view → (b_i, …) each, in the memory format of `grad`.
    """
    rows, total = len(grad), sum(sizes)
    (share,) = numbers(lam)
    g = _compute(grad)
    # row i of the stack went to output i and to output source[i]; `rows` stands for none
    source = torch.full((total,), rows, dtype=torch.int64, device=grad.device)
    source[permutation[:rows]] = torch.arange(rows, device=grad.device)
    g = torch.cat([g, torch.zeros_like(g[:1]) if rows else g.new_zeros((1, *g.shape[1:]))])
    own = torch.arange(total, device=grad.device).clamp(max=rows)
    stacked = (share * g[own] + (1 - share) * g[source]).to(grad.dtype)
    kind = memory_format([grad])
    return [part.clone(memory_format=kind) for part in stacked.split(sizes)]
