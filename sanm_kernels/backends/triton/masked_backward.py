"""Gradients of masked_forward: in the targets, the images, and the one-pass classifier's inputs.

- Targets: t' = t + constants, but where the drop is t[j*] itself (clamped), t'[j*] = 0 and every
  other target holds t[j*]/(K − 1), so j* gets the mean of the others' gradients instead of its own.
- Images: a pixel outside a view's box passes its gradient on; with the mean fill each pixel of a
  channel also gets 1/(H·W) of what arrives inside the box.
- Classifier: d = (softmax·Σt' − t')·grad_loss/B + grad_logits; dW = dᵀ·z, dF = (d·W) ⊗ v/Σv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric, painting, tiles
from sanm_kernels.backends.triton.launch import (
    configuration,
    implements,
    launch,
    power_of_2,
    triton_dtype,
    wide,
)
from sanm_kernels.ops.masked_forward import Spec
from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype


@triton.jit(do_not_specialize=["B", "K", "S"])
def modulate_backward_kernel(
    grad,  # (S, B, K)
    targets,  # (B, K)
    ratio,  # (S, B) float32
    result,  # (B, K), written
    B, K, S, g_s, g_b, g_k, t_b, t_k,
    CLAMP: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program b: row b."""
    b = tl.program_id(0).to(tl.int64)
    best, top = painting.first_argmax(targets + b * t_b, K, t_k, CLASSES, ACC)
    extra = tl.zeros((), ACC)  # what j* gets on top of its own gradients
    for s in range(0, S):
        row = grad + s * g_s + b * g_b
        total = tl.zeros((), ACC)
        for first in range(0, K, CLASSES):
            k = first + tl.arange(0, CLASSES)
            total += tl.sum(tl.load(row + k * g_k, mask=k < K, other=0.0).to(ACC), 0)
        own = tl.load(row + top * g_k).to(ACC)
        if CLAMP:
            emptied = best < tl.load(ratio + s * B + b)
            others = (total - own) / (K - 1)
            extra += tl.where(emptied, others - own, 0.0)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        value = tl.zeros((CLASSES,), ACC)
        for s in range(0, S):
            g = tl.load(grad + s * g_s + b * g_b + k * g_k, mask=k < K, other=0.0)
            value += g.to(ACC)
        value += tl.where(k == top, extra, 0.0)
        tl.store(result + b * K + k, numeric.cast(value, result.dtype.element_ty), mask=k < K)


@implements("modulate_backward")
def modulate_backward(grad: Tensor, targets: Tensor, ratio: Tensor, clamp: bool) -> Tensor:
    """Gradient of the targets (B, K) from that of the modulated ones (S, B, K)."""
    sets, batch, classes = grad.shape
    result = targets.new_empty(targets.shape)

    config = configuration("rows", classes)
    launch(
        modulate_backward_kernel, (batch,), grad, targets, ratio.contiguous(), result, batch,
        classes, sets, *grad.stride(), *targets.stride(), CLAMP=clamp,
        CLASSES=min(power_of_2(classes), config["TILE"]),
        ACC=triton_dtype(accumulate_dtype(targets)), num_warps=config["num_warps"],
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["B", "H", "W", "step", "width", "g_b"])
def hidden_means_kernel(
    grad,  # (V·B, Cin, H, W), samples dense
    boxes,  # (V, B, 4) int32
    means,  # (B, Cin) in ACC, written
    B, H, W, step, width, g_b,
    VIEWS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, c): what arrives inside the boxes of sample b in channel c, over H·W."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = width * VECTOR
    plane = tl.where(step > 1, 0, c)
    mean = tl.zeros((), ACC)
    for v in tl.static_range(VIEWS):
        g = grad + (v * B + b) * g_b * VECTOR
        y0, y1, j0, j1 = tiles.box(boxes + (v * B + b) * 4, step)
        total = tl.zeros((ROWS, COLUMNS), ACC)
        for left in range(j0 // VECTOR * VECTOR, j1, COLUMNS):
            j = left + tl.arange(0, COLUMNS)[None, :]
            own = tiles.within(j, j0, j1) & (j % step == c - plane)
            for top in range(y0, y1, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                at = tiles.offset(plane * H + y, length, WIDE) + j
                read = (y < y1) & tiles.meets(j, j0, j1, VECTOR)
                value = tl.load(g + at, mask=read, other=0.0).to(ACC)
                total += tl.where(own, value, 0.0)
        mean += tl.sum(tl.sum(total, 1), 0) / (H.to(ACC) * W.to(ACC))
    tl.store(means + b * tl.num_programs(1) + c, mean)


@triton.jit(do_not_specialize=["B", "H", "planes", "step", "width", "rows_each", "g_b"])
def views_backward_kernel(
    grad,  # (V·B, Cin, H, W), samples dense
    boxes,  # (V, B, 4) int32
    means,  # (B, Cin) in ACC with the mean fill, else None
    result,  # (B, Cin, H, W), dense in the same order, written
    B, H, planes, step, width, rows_each, g_b,
    VIEWS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, part): its rows of each plane of sample b."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = width * VECTOR
    last = tl.minimum(part * rows_each + rows_each, H)
    out = result + b * (planes * H) * length
    for left in range(0, length, COLUMNS):
        j = left + tl.arange(0, COLUMNS)[None, :]
        for plane in range(0, planes):
            if means is not None:
                c = plane
                if CHANNELS_LAST:
                    c = j % step
                mean = tl.load(means + b * (planes * step) + c)
            for top in range(part * rows_each, last, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                at = tiles.offset(plane * H + y, length, WIDE) + j
                exists = (y < last) & (j < length)
                total = tl.zeros((ROWS, COLUMNS), ACC)
                for v in tl.static_range(VIEWS):
                    sample = v * B + b
                    y0, y1, j0, j1 = tiles.box(boxes + sample * 4, step)
                    value = tl.load(grad + sample * g_b * VECTOR + at, mask=exists, other=0.0)
                    hidden = tiles.within(y, y0, y1) & tiles.within(j, j0, j1)
                    total += tl.where(hidden, 0.0, value.to(ACC))
                if means is not None:
                    total += mean
                tl.store(out + at, numeric.cast(total, result.dtype.element_ty), mask=exists)


@implements("masked_views_backward")
def masked_views_backward(grad: Tensor, boxes: Tensor, mean_fill: bool) -> Tensor:
    """Gradient of the images (B, Cin, H, W) from that of the views (V·B, Cin, H, W)."""
    views, batch = boxes.shape[:2]
    _, channels, height, width = grad.shape
    result = torch.empty_like(grad[:batch])
    last = is_channels_last(result)
    grad, out, boxes = tiles.dense(grad, last), tiles.dense(result, last), boxes.contiguous()
    acc = accumulate_dtype(grad)
    means = grad.new_empty(batch, channels, dtype=acc) if mean_fill else None

    config = configuration("pixels", channels * height * width)
    walk = tiles.walk(config["TILE"], last, grad, out)
    meta = {"VIEWS": views, "ACC": triton_dtype(acc), "WIDE": wide(out[:1]),
            "num_warps": config["num_warps"], **walk.tile}  # fmt: skip
    stride = grad.stride(0) // walk.vector
    if means is not None:
        launch(hidden_means_kernel, (batch, channels), grad, boxes, means, batch, height, width,
               *walk.sizes[1:], stride, **meta)  # fmt: skip
    parts = tiles.parts(height, walk)
    launch(
        views_backward_kernel, (batch, parts.programs), grad, boxes, means, out, batch, height,
        *walk.sizes, parts.rows, stride, CHANNELS_LAST=last, **meta,
    )  # fmt: skip
    return out if out is result else result.copy_(out)


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

    `group` rows are written as one of `width` vectors, so that each begins at a whole vector.
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


@implements("classifier_backward")
def classifier_backward(
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
    spec = Spec(tuple(features.shape), features.dtype, is_channels_last(features))
    df = spec.empty(features.device)

    # dF = dz ⊗ v in the order of memory
    first, second = (visible, dz) if spec.channels_last else (dz, visible)
    outer_rows, length = (h * w, channels) if spec.channels_last else (channels, h * w)

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
