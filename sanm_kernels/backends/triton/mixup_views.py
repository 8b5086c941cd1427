"""mixup_views (section 7): out_i = λ·v_i + (1 − λ)·v_π(i), v the stack of several view tensors.

The views are never concatenated: a program, one chunk of one row, selects the two tensors that
contain its rows. Two rounded products and one rounded sum: bitwise equal to the reference. Backward
is a gather too: row i of the stack gets λ·g_i + (1 − λ)·g_j where π(j) = i; π is inverted first, by
a scatter of row indices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric
from sanm_kernels.backends.triton.launch import (
    configuration,
    implements,
    launch,
    power_of_2,
    run_time,
    triton_dtype,
)
from sanm_kernels.reference import checks
from sanm_kernels.reference.mixup_views import memory_format


@triton.jit
def _row(views, starts, row, size):
    """Pointer to a row of the stack; starts[i] is the first row of views[i]."""
    pointer = views[0]
    first = row * 0
    for i in tl.static_range(1, len(views)):
        here = row >= starts[i]
        pointer = tl.where(here, views[i], pointer)
        first = tl.where(here, starts[i], first)
    return pointer + (row - first).to(tl.int64) * size


@triton.jit(do_not_specialize=["total"])
def mixup_views_kernel(
    views,  # tuple of (b_i, size) dense rows
    starts,  # tuple of int: the first row of each view in the stack
    permutation,  # (≥ rows,) int64
    out,  # (rows, size), written
    size, total, stride,
    numbers,  # (1,) float64: λ; or None: then λ is `lam`
    lam: tl.float64,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk). A partner outside the stack gives NaN."""
    row = tl.program_id(0)
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partner = tl.load(permutation + row.to(tl.int64) * stride)
    known = (partner >= 0) & (partner < total)
    own = _row(views, starts, row, size)
    other = _row(views, starts, tl.where(known, partner, 0).to(tl.int32), size)
    x = tl.load(own + j, mask=j < size, other=0.0).to(ACC)
    y = tl.load(other + j, mask=j < size, other=0.0).to(ACC)
    y = tl.where(known, y, float("nan"))
    share = numeric.number(numbers, 0, lam)
    mixed = share.to(ACC) * x + (1.0 - share).to(ACC) * y
    row_out = out + row.to(tl.int64) * size
    tl.store(row_out + j, numeric.cast(mixed, out.dtype.element_ty), mask=j < size)


@triton.jit(do_not_specialize=["rows", "total"])
def invert_kernel(
    permutation,  # (≥ rows,) int64
    source,  # (total,) int32, filled with `rows`, written
    rows, total, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """source[π(i)] = i for i < rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(permutation + i.to(tl.int64) * stride, mask=i < rows, other=0)
    tl.store(source + p, i, mask=(i < rows) & (p >= 0) & (p < total))


@triton.jit(do_not_specialize=["rows"])
def mixup_views_backward_kernel(
    grad,  # (rows, size) dense
    source,  # (total,) int32: the output that a row of the stack is partner of, or `rows`
    grads,  # tuple of (b_i, size), written
    starts,  # tuple of int
    size, rows,
    numbers,  # (1,) float64: λ; or None: then λ is `lam`
    lam: tl.float64,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (row of the stack, chunk)."""
    row = tl.program_id(0)
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partner = tl.load(source + row)
    own = grad + row.to(tl.int64) * size
    other = grad + partner.to(tl.int64) * size
    x = tl.load(own + j, mask=j < tl.where(row < rows, size, 0), other=0.0).to(ACC)
    y = tl.load(other + j, mask=j < tl.where(partner < rows, size, 0), other=0.0).to(ACC)
    share = numeric.number(numbers, 0, lam)
    mixed = share.to(ACC) * x + (1.0 - share).to(ACC) * y
    result = _row(grads, starts, row, size)
    tl.store(result + j, numeric.cast(mixed, grad.dtype.element_ty), mask=j < size)


def _starts(sizes: list[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


@implements("mixup_views")
def forward(views: list[Tensor], lam: Tensor, permutation: Tensor, rows: int) -> Tensor:
    """views (b_i, …), lam (1,) float64, permutation (≥ rows,) → (rows, …)."""
    sizes = [v.shape[0] for v in views]
    checks.count(rows, sum(sizes), "rows")
    checks.entries(permutation, rows, "permutation")
    kind = memory_format(views)
    first = views[0]
    shape = (rows, *first.shape[1:])
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=kind)
    size = out[:1].numel()
    acc = torch.float64 if out.dtype == torch.float64 else torch.float32
    filled = [v.contiguous(memory_format=kind) for v in views if v.shape[0]]
    starts = _starts([s for s in sizes if s])
    numbers, values = run_time(lam)

    config = configuration("pixels", size)
    block = min(config["TILE"], power_of_2(size))
    launch(
        mixup_views_kernel, (rows, -(-size // block)), tuple(filled), starts, permutation, out,
        size, sum(sizes), permutation.stride(0), numbers, *values, BLOCK=block,
        ACC=triton_dtype(acc), num_warps=config["num_warps"],
    )  # fmt: skip
    return out


@implements("mixup_views_backward")
def backward(grad: Tensor, lam: Tensor, permutation: Tensor, sizes: list[int]) -> list[Tensor]:
    """grad (rows, …) → the views' gradients (b_i, …)."""
    kind = memory_format([grad])
    rows, total = grad.shape[0], sum(sizes)
    result = [
        torch.empty((b, *grad.shape[1:]), dtype=grad.dtype, device=grad.device, memory_format=kind)
        for b in sizes
    ]
    size = grad[:1].numel() if rows else 0
    if size == 0:  # no row was mixed
        return [r.zero_() for r in result]
    dense = grad.contiguous(memory_format=kind)
    source = torch.full((total,), rows, dtype=torch.int32, device=grad.device)
    launch(invert_kernel, (-(-rows // 256),), permutation, source, rows, total,
           permutation.stride(0), BLOCK=256, num_warps=4)  # fmt: skip
    filled = tuple(r for r in result if r.shape[0])
    starts = _starts([s for s in sizes if s])
    acc = torch.float64 if grad.dtype == torch.float64 else torch.float32
    numbers, values = run_time(lam)

    config = configuration("pixels", size)
    block = min(config["TILE"], power_of_2(size))
    launch(
        mixup_views_backward_kernel, (total, -(-size // block)), dense, source, filled, starts,
        size, rows, numbers, *values, BLOCK=block, ACC=triton_dtype(acc),
        num_warps=config["num_warps"],
    )  # fmt: skip
    return result
