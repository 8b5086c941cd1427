"""The one-pass classifier: features outside a box are pooled and classified, with cross-entropy.

A program pools its sample's features, z = Σ_p v_p·F_p / Σ v; logits are a matrix product and the
loss a few torch operations on (B, K). Gradients: d = (softmax·Σt' − t')·grad_loss/B + grad_logits,
dW = dᵀ·z, dF = (d·W) ⊗ v/Σv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric, tiles
from sanm_kernels.backends.triton.launch import (
    configuration,
    implements,
    launch,
    power_of_2,
    triton_dtype,
    wide,
)
from sanm_kernels.ops.masked_classifier import empty_outputs
from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.mixup_views import memory_format
from sanm_kernels.reference.precision import accumulate_dtype


@triton.jit(do_not_specialize=["C", "h", "w", "H", "W", "f_b", "width"])
def pool_kernel(
    features,  # (B, C, h, w), samples dense
    boxes,  # (B, 4) int32
    pooled,  # (B, C) in ACC, written
    visible,  # (B, h·w) in ACC, written
    C, h, w, H, W, f_b,
    width,  # h·w if CHANNELS_FIRST, else C, in vectors
    CHANNELS_FIRST: tl.constexpr, VECTOR: tl.constexpr, CELLS: tl.constexpr,
    CHANNELS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program b: v, the share of each cell's area outside the box, and z = Σ v·F / Σ v."""
    b = tl.program_id(0).to(tl.int64)
    n = h * w
    box = boxes + b * 4
    step_y = (H.to(tl.float64) / h.to(tl.float64)).to(ACC)
    step_x = (W.to(tl.float64) / w.to(tl.float64)).to(ACC)
    y0 = tl.load(box).to(ACC)
    x0 = tl.load(box + 1).to(ACC)
    y1 = tl.load(box + 2).to(ACC)
    x1 = tl.load(box + 3).to(ACC)
    total = tl.zeros((), ACC)
    for first in range(0, n, CELLS):
        p = first + tl.arange(0, CELLS)
        y = (p // w).to(ACC) * step_y
        x = (p % w).to(ACC) * step_x
        rows = tl.maximum(tl.minimum(y1, y + step_y) - tl.maximum(y0, y), 0.0) / step_y
        columns = tl.maximum(tl.minimum(x1, x + step_x) - tl.maximum(x0, x), 0.0) / step_x
        v = tl.where(p < n, tl.maximum(1.0 - rows * columns, 0.0), 0.0)
        tl.store(visible + b * n + p, v, mask=p < n)
        total += tl.sum(v, 0)
    tl.debug_barrier()
    for first in range(0, n, CELLS):
        p = first + tl.arange(0, CELLS)
        v = tl.load(visible + b * n + p, mask=p < n, other=0.0)
        share = tl.where(total > 0, numeric.divide(v, tl.where(total > 0, total, 1.0) + v * 0), 0.0)
        tl.debug_barrier()
        tl.store(visible + b * n + p, share, mask=p < n)
    tl.debug_barrier()
    f = features + b * f_b * VECTOR
    length = width * VECTOR
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        z = tl.zeros((CHANNELS,), ACC)
        for first in range(0, n, CELLS):
            p = first + tl.arange(0, CELLS)
            share = tl.load(visible + b * n + p, mask=p < n, other=0.0)
            if CHANNELS_FIRST:
                at = tiles.offset(c[:, None], length, WIDE) + p[None, :]
                inside = (c < C)[:, None] & (p < length)[None, :]
                v = tl.load(f + at, mask=inside, other=0.0).to(ACC)
                z += tl.sum(v * share[None, :], 1)
            else:
                at = tiles.offset(p[:, None], length, WIDE) + c[None, :]
                inside = (p < n)[:, None] & (c < length)[None, :]
                v = tl.load(f + at, mask=inside, other=0.0).to(ACC)
                z += tl.sum(v * share[:, None], 0)
        tl.store(pooled + b * C + c, z, mask=c < C)


@implements("masked_classifier")
def forward(
    features: Tensor,
    box: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, ...]:
    """Logits (B, K), loss (), pooled (B, C) and visible (B, h, w)."""
    outputs = empty_outputs(features, box, targets, weight, bias, height, width)
    logits, loss, pooled, visible = outputs
    batch, channels, h, w = features.shape
    acc = accumulate_dtype(features)
    cells = min(power_of_2(h * w), 256)
    last = is_channels_last(features[:1])
    source = tiles.dense(features, last)
    length = channels if last else h * w
    v = tiles.vector(source, rows=length)

    config = configuration("masked_forward", channels * h * w)
    launch(
        pool_kernel, (batch,), source, box.contiguous(), pooled, visible, channels, h, w, height,
        width, source.stride(0) // v, length // v, CHANNELS_FIRST=not last, VECTOR=v, CELLS=cells,
        CHANNELS=max(min(power_of_2(channels), config["TILE"] // cells), 1),
        ACC=triton_dtype(acc), WIDE=wide(source[:1]), num_warps=config["num_warps"],
    )  # fmt: skip
    if bias is None:
        torch.mm(pooled, weight.to(acc).T, out=logits)
    else:
        torch.addmm(bias.to(acc), pooled, weight.to(acc).T, out=logits)
    rows = (targets.to(acc) * torch.log_softmax(logits, 1)).sum(1)
    loss.copy_(-rows.sum() / max(batch, 1))
    return outputs


@triton.jit(do_not_specialize=["B", "K"])
def logits_backward_kernel(
    grad_logits,  # (B, K) or None
    grad_loss,  # () or None
    logits,  # (B, K) in ACC
    targets,  # (B, K)
    result,  # (B, K) in ACC, written
    B, K, g_b, g_k, t_b, t_k, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program b: d = (softmax·Σt' − t')·grad_loss/B + grad_logits of row b."""
    b = tl.program_id(0).to(tl.int64)
    z = logits + b * K
    top = -float("inf")
    mass = tl.zeros((), tl.float64)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        top = tl.maximum(top, tl.max(tl.load(z + k, mask=k < K, other=-float("inf")), 0))
        t = tl.load(targets + b * t_b + k * t_k, mask=k < K, other=0.0).to(ACC)
        mass += tl.sum(t, 0).to(tl.float64)
    total = tl.zeros((), tl.float64)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        e = tl.exp(tl.load(z + k, mask=k < K, other=-float("inf")) - top)
        total += tl.sum(e, 0).to(tl.float64)
    mass, total = mass.to(ACC), total.to(ACC)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        d = tl.zeros((CLASSES,), ACC)
        if grad_loss is not None:
            p = tl.exp(tl.load(z + k, mask=k < K, other=-float("inf")) - top) / total
            t = tl.load(targets + b * t_b + k * t_k, mask=k < K, other=0.0).to(ACC)
            d = (p * mass - t) * (tl.load(grad_loss) / B)
        if grad_logits is not None:
            d += tl.load(grad_logits + b * g_b + k * g_k, mask=k < K, other=0.0)
        tl.store(result + b * K + k, d, mask=k < K)


@triton.jit(do_not_specialize=["A", "N", "group", "width", "size"])
def features_backward_kernel(
    first,  # (B, A) in ACC
    second,  # (B, N) in ACC
    result,  # (B, A, N), written
    A, N, group, width, size,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, part): ROWS · group rows of the outer product of first[b] and second[b].

    `group` rows are written as one row of `width` vectors, so that each starts at a vector.
    """
    b = tl.program_id(0).to(tl.int64)
    length = width * VECTOR
    end = tiles.offset(size, VECTOR, WIDE)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    for left in range(0, length, COLUMNS):
        j = left + tl.arange(0, COLUMNS)[None, :]
        at = tiles.offset(y, length, WIDE) + j
        exists = (j < length) & (at < end)
        row = y * group + j // N
        value = tl.load(first + b * A + row, mask=exists, other=0.0)
        value *= tl.load(second + b * N + j % N)
        tl.store(result + b * end + at, numeric.cast(value, result.dtype.element_ty), mask=exists)


@implements("masked_classifier_backward")
def backward(
    grad_logits: Tensor | None,
    grad_loss: Tensor | None,
    features: Tensor,
    weight: Tensor,
    logits: Tensor,
    targets: Tensor,
    pooled: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features (B, C, h, w), weight (K, C) and bias (K,) in the one-pass mode."""
    batch, channels, h, w = features.shape
    classes = logits.shape[1]
    d = torch.empty_like(logits)
    acc = triton_dtype(logits.dtype)

    config = configuration("rows", classes)
    launch(
        logits_backward_kernel, (batch,), grad_logits, grad_loss, logits, targets, d, batch,
        classes, *(0, 0) if grad_logits is None else grad_logits.stride(), *targets.stride(),
        CLASSES=min(power_of_2(classes), config["TILE"]), ACC=acc,
        num_warps=config["num_warps"],
    )  # fmt: skip
    dz = d @ weight.to(d.dtype)
    df = torch.empty_like(features, memory_format=memory_format([features]))
    last = is_channels_last(df)

    # dF = dz ⊗ v in memory order
    first, second = (visible, dz) if last else (dz, visible)
    outer_rows, length = (h * w, channels) if last else (channels, h * w)

    config = configuration("pixels", channels * h * w)
    v = tiles.vector(df)
    group = tiles.group(length, v)
    columns = min(power_of_2(group * length), 1024, config["TILE"])
    groups = -(-outer_rows // group)
    rows = max(min(config["TILE"] // columns, power_of_2(groups)), 1)
    launch(
        features_backward_kernel, (batch, -(-groups // rows)), first, second, df, outer_rows,
        length, group, group * length // v, channels * h * w // v, VECTOR=v, ROWS=rows,
        COLUMNS=columns, WIDE=wide(df[:1]), num_warps=config["num_warps"],
    )  # fmt: skip
    return df, (d.T @ pooled).to(weight.dtype), d.sum(0)
