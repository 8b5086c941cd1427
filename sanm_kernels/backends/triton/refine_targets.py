"""refine_targets (section 7.2): p = q·label + (1 − q)·mean of softmaxes, then p^(1/T) / Σ p^(1/T).

A program processes a tile of rows. Logits are read three times: for each view's maximum, for its
Σ e^(z − max), and for p. p is stored in the result, is replaced by y = (p / max p)^(1/T), divided
before the power so that the sum cannot underflow to 0, and then by y / Σ y.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric
from sanm_kernels.backends.triton.launch import (
    configuration,
    implements,
    launch,
    row_tile,
    run_time,
    triton_dtype,
)
from sanm_kernels.reference.precision import accumulate_dtype


@triton.jit
def _normalize(
    logits,  # (B, K) of one view
    statistics,  # (B, 2) in ACC, written: maximum, 1 / Σ e^(z − maximum)
    b,  # (ROWS,) int64
    B, K, z_b, z_k, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The normalisation of one view's softmax of these rows."""
    top, total = numeric.softmax_normalizer(logits, b, b < B, K, z_b, z_k, ROWS, CLASSES, ACC)
    tl.store(statistics + 2 * b, top, mask=b < B)
    tl.store(statistics + 2 * b + 1, numeric.divide(total * 0 + 1, total), mask=b < B)


@triton.jit(do_not_specialize=["B", "K"])
def refine_targets_kernel(
    logits,  # tuple of (B, K)
    strides,  # tuple of ints: z_b and z_k of each view, one after the other
    labels,  # (B,) int64 or (B, K) floats, or None
    clean_prob,  # (B,) floats, or None
    statistics,  # workspace (V, B, 2) in ACC
    result,  # (B, K) in ACC, written
    numbers,  # (1,) float64: 1/T; or None: then it is `exponent`
    B, K, y_b, y_k, q_b, exponent: tl.float64,
    SOFT: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS rows from i·ROWS on. A label outside [0, K) gives NaN."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    views: tl.constexpr = len(logits)
    for v in tl.static_range(views):
        _normalize(logits[v], statistics + 2 * v * B.to(tl.int64), b, B, K, strides[2 * v],
                   strides[2 * v + 1], ROWS, CLASSES, ACC)  # fmt: skip
    tl.debug_barrier()  # a phase reads what other threads wrote in the previous one
    largest = tl.zeros((ROWS,), ACC)
    for first in range(0, K, CLASSES):
        k = (first + tl.arange(0, CLASSES)).to(tl.int64)[None, :]
        inside = (b < B)[:, None] & (k < K)
        p = tl.zeros((ROWS, CLASSES), ACC)
        for v in tl.static_range(views):
            offsets = b[:, None] * strides[2 * v] + k * strides[2 * v + 1]
            z = tl.load(logits[v] + offsets, mask=inside, other=0.0).to(ACC)
            own = statistics + 2 * (v * B.to(tl.int64) + b)
            top = tl.load(own, mask=b < B, other=0.0)
            scale = tl.load(own + 1, mask=b < B, other=0.0)
            p += tl.exp(z - top[:, None]) * scale[:, None]
        p = numeric.divide(p, p * 0 + views)
        if labels is not None:
            if SOFT:
                offsets = b[:, None] * y_b + k * y_k
                t = tl.load(labels + offsets, mask=inside, other=0.0).to(ACC)
            else:
                y = tl.load(labels + b * y_b, mask=b < B, other=0)[:, None]
                t = tl.where(k == y, 1.0, 0.0).to(ACC)
                t = tl.where((y >= 0) & (y < K), t, float("nan"))
            q = tl.load(clean_prob + b * q_b, mask=b < B, other=0.0).to(ACC)[:, None]
            p = q * t + (1.0 - q) * p
        largest = tl.maximum(largest, tl.max(tl.where(inside, p, 0.0), 1))
        tl.store(result + b[:, None] * K + k, p, mask=inside)
    tl.debug_barrier()
    total = tl.zeros((ROWS,), tl.float64)
    power = numeric.number(numbers, 0, exponent)
    for first in range(0, K, CLASSES):
        k = (first + tl.arange(0, CLASSES)).to(tl.int64)[None, :]
        inside = (b < B)[:, None] & (k < K)
        p = tl.load(result + b[:, None] * K + k, mask=inside, other=0.0)
        x = numeric.divide(p, p * 0 + largest[:, None])
        y = x * x
        if power != 2.0:
            y = tl.where(x == 0, 0.0, tl.exp(power * numeric.log(x)))
            y = tl.where(x == 1, 1.0, y).to(ACC)  # ∞·log 1 would be NaN
        total += tl.sum(tl.where(inside, y, 0.0), 1).to(tl.float64)
        tl.debug_barrier()  # all threads have read the tile
        tl.store(result + b[:, None] * K + k, y, mask=inside)
    whole = total.to(ACC)[:, None]
    tl.debug_barrier()
    for first in range(0, K, CLASSES):
        k = (first + tl.arange(0, CLASSES)).to(tl.int64)[None, :]
        inside = (b < B)[:, None] & (k < K)
        y = tl.load(result + b[:, None] * K + k, mask=inside, other=0.0)
        tl.debug_barrier()
        y = numeric.divide(y, y * 0 + whole)
        tl.store(result + b[:, None] * K + k, y, mask=inside)


@implements("refine_targets")
def forward(
    logits: list[Tensor], labels: Tensor | None, clean_prob: Tensor | None, exponent: Tensor
) -> Tensor:
    """Arguments and result as in `reference/refine_targets.py`."""
    batch, classes = logits[0].shape
    acc = accumulate_dtype(logits[0])
    result = logits[0].new_empty((batch, classes), dtype=acc)
    statistics = logits[0].new_empty((len(logits), batch, 2), dtype=acc)
    if labels is None or clean_prob is None:
        labels = clean_prob = None
    numbers, values = run_time(exponent)

    config = configuration("rows", classes)
    tile = row_tile(config, batch, classes)
    launch(
        refine_targets_kernel, (-(-batch // tile["ROWS"]),), tuple(logits),
        tuple(s for z in logits for s in z.stride()), labels, clean_prob, statistics, result,
        numbers, batch, classes,
        *((0, 0) if labels is None else (labels.stride(0), labels.stride(-1))),
        0 if clean_prob is None else clean_prob.stride(0), *values,
        SOFT=labels is not None and labels.is_floating_point(), ACC=triton_dtype(acc), **tile,
    )  # fmt: skip
    return result
