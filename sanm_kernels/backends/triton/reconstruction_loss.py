"""reconstruction_loss (section 5): Σ over the views v of Σ (r − x)² / count_v.

Forward, first launch: a program sums the squares of one sample of one view over its share of rows,
read in the memory order of the reconstruction (`tiles`); images in another memory format are
copied. Second launch: one program adds those partial sums in order and counts the elements, the
boxes' areas times the channels. Backward is one launch: dL/dr = grad·(2/count_v)·(r − x) inside, 0
outside.
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
    triton_dtype,
    wide,
)
from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype

_WALK = ["B", "H", "planes", "step", "width", "rows_each", "r_b", "x_b"]


@triton.jit
def _difference(a, b, at, mask, ACC: tl.constexpr):
    """a[at] − b[at] in ACC; 0 where the mask is false."""
    d = tl.load(a + at, mask=mask, other=0.0).to(ACC)
    return d - tl.load(b + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _bounds(boxes, sample, H, length, step):
    """First and last row and column of the elements of a sample that count."""
    if boxes is None:
        return 0, H, 0, length
    else:
        return tiles.box(boxes + sample * 4, step)


@triton.jit
def _count(boxes, v, B, C, H, W, BLOCK: tl.constexpr):
    """Elements of view v that count: all, or the boxes' areas times C; at least 1, float64."""
    if boxes is None:
        count = (tl.full((), B, tl.float64) * C) * (tl.full((), H, tl.float64) * W)
    else:
        area = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, B, BLOCK):
            b = first + tl.arange(0, BLOCK)
            box = boxes + (v * B + b) * 4
            h = tl.load(box + 2, mask=b < B, other=0) - tl.load(box, mask=b < B, other=0)
            w = tl.load(box + 3, mask=b < B, other=0) - tl.load(box + 1, mask=b < B, other=0)
            area += h * w
        count = tl.sum(area, 0).to(tl.float64) * C
    return tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=_WALK)
def squares_kernel(
    reconstruction,  # (V·B, C, H, W), samples dense
    images,  # (B, C, H, W), samples dense in the same order
    boxes,  # (V, B, 4) int64 or None
    partial,  # (V·B, programs) in ACC, written
    B, H, planes, step, width, rows_each, r_b, x_b,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (v·B + b, part): Σ (r − x)² over its rows of each plane, reading only the box."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = width * VECTOR
    a = reconstruction + sample * r_b * VECTOR
    b = images + (sample % B) * x_b * VECTOR
    y0, y1, j0, j1 = _bounds(boxes, sample, H, length, step)
    last = tl.minimum(part * rows_each + rows_each, H)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for left in range(0, length, COLUMNS):
        j = left + tl.arange(0, COLUMNS)[None, :]
        across = tiles.within(j, j0, j1)
        read = (j < length) & tiles.meets(j, j0, j1, VECTOR)
        for plane in range(0, planes):
            for top in range(part * rows_each, last, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                down = (y < last) & tiles.within(y, y0, y1)
                at = tiles.offset(plane * H + y, length, WIDE) + j
                d = _difference(a, b, at, down & read, ACC)
                d = tl.where(across, d, 0.0)
                total += d * d
    tl.store(partial + sample * tl.num_programs(1) + part, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["V", "B", "C", "H", "W", "each"])
def finish_kernel(
    partial,  # (V, each) in ACC
    boxes,  # (V, B, 4) int64 or None
    loss,  # () in ACC, written
    V, B, C, H, W, each, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: Σ_v Σ partial_v / count_v."""
    total = tl.zeros((), ACC)
    for v in range(0, V):
        view = tl.zeros((BLOCK,), ACC)
        for first in range(0, each, BLOCK):
            i = first + tl.arange(0, BLOCK)
            view += tl.load(partial + v * each + i, mask=i < each, other=0.0)
        count = _count(boxes, v, B, C, H, W, BLOCK)
        total += numeric.divide(tl.sum(view, 0), count.to(ACC))
    tl.store(loss, total)


@triton.jit(do_not_specialize=[*_WALK, "C", "W"])
def reconstruction_backward_kernel(
    grad,  # () in ACC
    reconstruction,  # (V·B, C, H, W), samples dense
    images,  # (B, C, H, W), samples dense in the same order
    boxes,  # (V, B, 4) int64 or None
    result,  # (V·B, C, H, W), dense in the same order, written
    B, C, H, W, planes, step, width, rows_each, r_b, x_b,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (v·B + b, part): its rows of each plane of the gradient."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = _count(boxes, sample // B, B, C, H, W, 256)
    scale = numeric.divide(2 * tl.load(grad), count.to(ACC))
    length = width * VECTOR
    a = reconstruction + sample * r_b * VECTOR
    b = images + (sample % B) * x_b * VECTOR
    out = result + sample * (planes * H) * length
    y0, y1, j0, j1 = _bounds(boxes, sample, H, length, step)
    last = tl.minimum(part * rows_each + rows_each, H)
    for left in range(0, length, COLUMNS):
        j = left + tl.arange(0, COLUMNS)[None, :]
        across = tiles.within(j, j0, j1)
        exists = j < length
        read = exists & tiles.meets(j, j0, j1, VECTOR)
        for plane in range(0, planes):
            for top in range(part * rows_each, last, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                down = (y < last) & tiles.within(y, y0, y1)
                at = tiles.offset(plane * H + y, length, WIDE) + j
                d = _difference(a, b, at, down & read, ACC)
                d = tl.where(across & down, scale * d, 0.0)
                value = numeric.cast(d, result.dtype.element_ty)
                tl.store(out + at, value, mask=(y < last) & exists)


@implements("reconstruction_loss")
def forward(reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> Tensor:
    """reconstruction (V·B, C, H, W), images (B, C, H, W), boxes (V, B, 4) or None → loss ()."""
    batch, channels, height, width = images.shape
    acc = accumulate_dtype(reconstruction)
    loss = reconstruction.new_empty((), dtype=acc)
    samples = reconstruction.shape[0]
    if reconstruction.numel() == 0:
        return loss.zero_()
    if boxes is not None:
        boxes = boxes.contiguous()
    last = is_channels_last(reconstruction)
    rebuilt, originals = tiles.dense(reconstruction, last), tiles.dense(images, last)

    config = configuration("pixels", images[:1].numel())
    walk = tiles.walk(config["TILE"] * 2 // rebuilt.element_size(), last, rebuilt, originals)
    parts, each = tiles.parts(height, walk)
    partial = reconstruction.new_empty(samples, parts, dtype=acc)
    launch(
        squares_kernel, (samples, parts), rebuilt, originals, boxes, partial, batch, height,
        *walk.sizes, each, rebuilt.stride(0) // walk.vector, originals.stride(0) // walk.vector,
        ACC=triton_dtype(acc), WIDE=wide(rebuilt[:1]), num_warps=config["num_warps"],
        **walk.tile,
    )  # fmt: skip
    launch(
        finish_kernel, (1,), partial, boxes, loss, samples // batch, batch, channels, height,
        width, batch * parts, BLOCK=256, ACC=triton_dtype(acc), num_warps=4,
    )  # fmt: skip
    return loss


@implements("reconstruction_loss_backward")
def backward(grad: Tensor, reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> Tensor:
    """grad () → gradient of the reconstruction, in its dtype; channels_last if it is."""
    last = is_channels_last(reconstruction)
    kind = torch.channels_last if last else torch.contiguous_format
    result = torch.empty_like(reconstruction, memory_format=kind)
    if result.numel() == 0:
        return result
    batch, channels, height, width = images.shape
    if boxes is not None:
        boxes = boxes.contiguous()
    rebuilt, originals = tiles.dense(reconstruction, last), tiles.dense(images, last)

    config = configuration("pixels", images[:1].numel())
    walk = tiles.walk(config["TILE"] * 2 // rebuilt.element_size(), last, rebuilt, originals)
    parts, each = tiles.parts(height, walk)
    launch(
        reconstruction_backward_kernel, (reconstruction.shape[0], parts), grad, rebuilt,
        originals, boxes, result, batch, channels, height, width, *walk.sizes, each,
        rebuilt.stride(0) // walk.vector, originals.stride(0) // walk.vector,
        ACC=triton_dtype(grad.dtype), WIDE=wide(rebuilt[:1]), num_warps=config["num_warps"],
        **walk.tile,
    )  # fmt: skip
    return result
