"""reconstruction_loss (section 5): Σ over the views v of Σ (r − x)² / count_v.

Forward, first launch: a program sums the squares of one sample of one view over its share of rows,
read in the memory order of the reconstruction. Second launch: one program adds those partial sums
in order and counts the elements, the boxes' areas times the channels. Backward is one launch:
dL/dr = grad·(2/count_v)·(r − x) inside, 0 elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric
from sanm_kernels.backends.triton.launch import (
    implements,
    launch,
    launch_tuned,
    power_of_2,
    triton_dtype,
)
from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype


@triton.jit
def _tile(r0, j0, C, H, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channel, row and column (int64) of a tile's elements; rows and columns as in memory."""
    r = (r0 + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    j = (j0 + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
    if CHANNELS_LAST:
        return r, j, j % C + r * 0, r, j // C
    else:
        return r, j, r // H, r % H, j


@triton.jit
def _inside(boxes, sample, r, j, y, x, rows, length):
    """Which elements of the tile exist and, with boxes, lie in the sample's."""
    inside = (r < rows) & (j < length)
    if boxes is not None:
        box = boxes + sample * 4
        inside &= (y >= tl.load(box)) & (y < tl.load(box + 2))
        inside &= (x >= tl.load(box + 1)) & (x < tl.load(box + 3))
    return inside


@triton.jit
def _difference(a, b, inside, ACC: tl.constexpr):
    """*a − *b in ACC; 0 where not inside."""
    d = tl.load(a, mask=inside, other=0.0).to(ACC)
    return d - tl.load(b, mask=inside, other=0.0).to(ACC)


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


@triton.jit(do_not_specialize=["B", "C", "H", "W", "rows_each"])
def squares_kernel(
    reconstruction,  # (V·B, C, H, W)
    images,  # (B, C, H, W)
    boxes,  # (V, B, 4) int64 or None
    partial,  # (V·B, programs) in ACC, written
    B, C, H, W, rows_each, r_b, r_c, r_h, r_w, x_b, x_c, x_h, x_w,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (v·B + b, part): Σ (r − x)² over its rows."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = H if CHANNELS_LAST else C * H
    length = W * C if CHANNELS_LAST else W
    last = tl.minimum(part * rows_each + rows_each, rows)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for r0 in range(part * rows_each, last, ROWS):
        for j0 in range(0, length, COLUMNS):
            r, j, c, y, x = _tile(r0, j0, C, H, CHANNELS_LAST, ROWS, COLUMNS)
            inside = _inside(boxes, sample, r, j, y, x, last, length)
            a = reconstruction + sample * r_b + c * r_c + y * r_h + x * r_w
            b = images + (sample % B) * x_b + c * x_c + y * x_h + x * x_w
            d = _difference(a, b, inside, ACC)
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


@triton.jit(do_not_specialize=["B", "C", "H", "W", "rows_each"])
def reconstruction_backward_kernel(
    grad,  # () in ACC
    reconstruction,  # (V·B, C, H, W)
    images,  # (B, C, H, W)
    boxes,  # (V, B, 4) int64 or None
    result,  # (V·B, C, H, W), written
    B, C, H, W, rows_each, r_b, r_c, r_h, r_w, x_b, x_c, x_h, x_w, d_b, d_c, d_h, d_w,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (v·B + b, part): its rows of the gradient."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = _count(boxes, sample // B, B, C, H, W, 256)
    scale = numeric.divide(2 * tl.load(grad), count.to(ACC))
    rows = H if CHANNELS_LAST else C * H
    length = W * C if CHANNELS_LAST else W
    last = tl.minimum(part * rows_each + rows_each, rows)
    for r0 in range(part * rows_each, last, ROWS):
        for j0 in range(0, length, COLUMNS):
            r, j, c, y, x = _tile(r0, j0, C, H, CHANNELS_LAST, ROWS, COLUMNS)
            inside = _inside(boxes, sample, r, j, y, x, last, length)
            a = reconstruction + sample * r_b + c * r_c + y * r_h + x * r_w
            b = images + (sample % B) * x_b + c * x_c + y * x_h + x * x_w
            d = _difference(a, b, inside, ACC)
            d = tl.where(inside, scale * d, 0.0)
            out = result + sample * d_b + c * d_c + y * d_h + x * d_w
            value = numeric.cast(d, result.dtype.element_ty)
            tl.store(out, value, mask=(r < last) & (j < length))


def _shape(config: dict[str, int], x: Tensor, last: bool) -> tuple[int, int, dict[str, int | bool]]:
    """Programs per sample, rows of each, and the tile for images of x's shape."""
    _, channels, height, width = x.shape
    rows, length = (height, width * channels) if last else (height * channels, width)
    columns = min(power_of_2(length), 256)
    tile = config["TILE"] // 4  # 64-bit offsets into three tensors take many registers
    columns = min(columns, tile)
    tile_rows = max(min(tile // columns, power_of_2(rows)), 1)
    parts = min(-(-rows // tile_rows), 8)
    return parts, -(-rows // parts), {
        "CHANNELS_LAST": last, "ROWS": tile_rows, "COLUMNS": columns,
        "num_warps": config["num_warps"],
    }  # fmt: skip


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

    def go(config: dict[str, int]) -> None:
        parts, each, tile = _shape(config, images, last)
        partial = reconstruction.new_empty(samples, parts, dtype=acc)
        launch(
            squares_kernel, (samples, parts), reconstruction, images, boxes, partial, batch,
            channels, height, width, each, *reconstruction.stride(), *images.stride(),
            ACC=triton_dtype(acc), **tile,
        )  # fmt: skip
        launch(
            finish_kernel, (1,), partial, boxes, loss, samples // batch, batch, channels, height,
            width, batch * parts, BLOCK=256, ACC=triton_dtype(acc), num_warps=4,
        )  # fmt: skip

    launch_tuned("pixels", images[:1].numel(), reconstruction, go)
    return loss


@implements("reconstruction_loss_backward")
def backward(grad: Tensor, reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> Tensor:
    """grad () → gradient of the reconstruction, in its dtype; channels_last if that is."""
    last = is_channels_last(reconstruction)
    kind = torch.channels_last if last else torch.contiguous_format
    result = torch.empty_like(reconstruction, memory_format=kind)
    if result.numel() == 0:
        return result
    batch, channels, height, width = images.shape
    if boxes is not None:
        boxes = boxes.contiguous()

    def go(config: dict[str, int]) -> None:
        parts, each, tile = _shape(config, images, last)
        launch(
            reconstruction_backward_kernel, (reconstruction.shape[0], parts), grad, reconstruction,
            images, boxes, result, batch, channels, height, width, each, *reconstruction.stride(),
            *images.stride(), *result.stride(), ACC=triton_dtype(grad.dtype), **tile,
        )  # fmt: skip

    launch_tuned("pixels", images[:1].numel(), reconstruction, go)
    return result
