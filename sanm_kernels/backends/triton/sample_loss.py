"""sample_loss (section 6): l_i = −log softmax(z_i)[y_i] = log Σ e^(z − max) − (z_y − max).

A program processes a tile of rows and sweeps twice over their classes: for the maximum, and for the
sum. Maximum and log Σ are stored separately: in their sum a large maximum would round log Σ away.
Backward is one sweep: dz_k = (p_k − [k = y])·g, with p computed from both.
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
    row_tile,
    triton_dtype,
)
from sanm_kernels.reference.precision import accumulate_dtype


@triton.jit(do_not_specialize=["B", "K"])
def sample_loss_kernel(
    logits,  # (B, K)
    labels,  # (B,) int64
    loss,  # (B,) in ACC, written
    normalizer,  # (B, 2) in ACC, written: maximum, log-sum
    B, K, z_b, z_k, y_b, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS rows from i·ROWS on. A label outside [0, K) gives NaN."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y = tl.load(labels + b * y_b, mask=b < B, other=0)
    top, total = numeric.softmax_normalizer(logits, b, b < B, K, z_b, z_k, ROWS, CLASSES, ACC)
    log_sum = numeric.log(total).to(ACC)
    known = (y >= 0) & (y < K)
    own = tl.load(logits + b * z_b + y * z_k, mask=(b < B) & known, other=0.0).to(ACC)
    value = tl.where(known, log_sum - (own - top), float("nan"))
    tl.store(loss + b, value, mask=b < B)
    tl.store(normalizer + 2 * b, top, mask=b < B)
    tl.store(normalizer + 2 * b + 1, log_sum, mask=b < B)


@triton.jit(do_not_specialize=["B", "K"])
def sample_loss_backward_kernel(
    grad,  # (B,) in ACC
    logits,  # (B, K)
    labels,  # (B,) int64
    normalizer,  # (B, 2) in ACC
    result,  # (B, K), written
    B, K, g_b, z_b, z_k, y_b, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (i, j): a tile of rows and classes."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    inside = (b < B)[:, None] & (k < K)[None, :]
    y = tl.load(labels + b * y_b, mask=b < B, other=0)
    g = tl.load(grad + b * g_b, mask=b < B, other=0.0)
    top = tl.load(normalizer + 2 * b, mask=b < B, other=0.0)
    log_sum = tl.load(normalizer + 2 * b + 1, mask=b < B, other=0.0)
    offsets = b[:, None] * z_b + k[None, :].to(tl.int64) * z_k
    z = tl.load(logits + offsets, mask=inside, other=0.0).to(ACC)
    p = tl.exp(z - top[:, None] - log_sum[:, None])
    p = (p - tl.where(k[None, :] == y[:, None], 1.0, 0.0)) * g[:, None]
    value = numeric.cast(p, result.dtype.element_ty)
    tl.store(result + b[:, None] * K + k[None, :], value, mask=inside)


@implements("sample_loss")
def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, K), labels (B,) → losses (B,), normalizer (B, 2)."""
    batch, classes = logits.shape
    acc = accumulate_dtype(logits)
    loss = logits.new_empty(batch, dtype=acc)
    normalizer = logits.new_empty((batch, 2), dtype=acc)

    config = configuration("rows", classes)
    tile = row_tile(config, batch, classes)
    launch(
        sample_loss_kernel, (-(-batch // tile["ROWS"]),), logits, labels, loss, normalizer,
        batch, classes, *logits.stride(), labels.stride(0), ACC=triton_dtype(acc), **tile,
    )  # fmt: skip
    return loss, normalizer


@implements("sample_loss_backward")
def backward(grad: Tensor, logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    """grad (B,) → gradient of the logits (B, K), in their dtype."""
    batch, classes = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)

    config = configuration("rows", classes)
    tile = row_tile(config, batch, classes)
    grid = (-(-batch // tile["ROWS"]), -(-classes // tile["CLASSES"]))
    launch(
        sample_loss_backward_kernel, grid, grad, logits, labels, normalizer.contiguous(),
        result, batch, classes, grad.stride(0), *logits.stride(), labels.stride(0),
        ACC=triton_dtype(normalizer.dtype), **tile,
    )  # fmt: skip
    return result
