"""Sections 2 to 4 of the method inside one program: box, views and targets of one sample."""

from __future__ import annotations

import triton
import triton.language as tl

from sanm_kernels.backends.triton import draws, numeric


@triton.jit
def draw(given, number, index, seed):
    """The sample's uniforms of these numbers: the caller's, or Philox's."""
    if given is not None:
        return tl.load(given + number)
    else:
        return draws.uniform(number, index, seed)


@triton.jit
def _side(square, limit):
    """round(√square), halves to even, within 1 … limit; the root is float64's."""
    side = numeric.round_even(tl.sqrt(square.to(tl.float64)))
    return tl.minimum(tl.maximum(side, 1.0), limit.to(tl.float64)).to(tl.int32)


@triton.jit
def size(
    area_draw, aspect_draw, clean_prob, H, W,
    ratio_low, ratio_high, ratio_gamma, aspect_low, aspect_high, area_scale,
):  # fmt: skip
    """Ratio r = a + γ·(1 − q), and the box's height = √(A·s), width = √(A/s), A = κ·r·H·W.

    Draws are float64, all that follows float32 with each step rounded once.
    """
    low = numeric.scalar(ratio_low, tl.float64)
    a = (low + (numeric.scalar(ratio_high, tl.float64) - low) * area_draw).to(tl.float32)
    ratio = a + numeric.scalar(ratio_gamma, tl.float32) * (1.0 - clean_prob)
    low = numeric.scalar(aspect_low, tl.float64)
    aspect = (low + (numeric.scalar(aspect_high, tl.float64) - low) * aspect_draw).to(tl.float32)
    area = ratio * (H.to(tl.int64) * W).to(tl.float32)
    area = area * numeric.scalar(area_scale, tl.float32)
    return ratio, _side(area * aspect, H), _side(numeric.divide(area, aspect), W)


@triton.jit
def corner(position, side, limit, CENTERED: tl.constexpr):
    """First row or column of a box of this side at the position, moved to lie inside."""
    low = position
    if CENTERED:
        low = position - side // 2
    return tl.minimum(tl.maximum(low, 0), limit - side)


@triton.jit
def first_argmax(row, K, stride, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """The largest of the K elements of a row, in ACC, and its first index."""
    best = tl.full((), -float("inf"), ACC)
    top = K
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        t = tl.load(row + k * stride, mask=k < K, other=-float("inf")).to(ACC)
        high = tl.max(t, 0)
        where = tl.min(tl.where((t == high) & (k < K), k, K), 0)
        top = tl.where(high > best, where, top)
        best = tl.maximum(best, high)
    return best, top


@triton.jit
def modulate(
    targets,  # row of K floats, stride stride_k, or one int64
    new,  # row of K, written
    ratio, K, stride_k,
    SOFT: tl.constexpr, CLAMP: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """t'[j*] = t[j*] − d, t'[k] = t[k] + d/(K − 1), j* first argmax, d = r or min(r, t[j*])."""
    if SOFT:
        best, top = first_argmax(targets, K, stride_k, CLASSES, ACC)
    else:
        top = tl.load(targets)
        best = tl.full((), 1.0, ACC)
    d = ratio.to(ACC)
    if CLAMP:
        d = tl.minimum(d, best)
    gain = numeric.divide(d, (K - 1).to(ACC))
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        if SOFT:
            t = tl.load(targets + k * stride_k, mask=k < K, other=0.0).to(ACC)
        else:
            t = tl.zeros((CLASSES,), ACC)
        moved = tl.where(k == top, best - d, t + gain)
        tl.store(new + k, numeric.cast(moved, new.dtype.element_ty), mask=k < K)


@triton.jit
def means(
    image,  # (Cin, H, W) of one sample
    out,  # workspace (Cin,) float64, written
    Cin, H, W, stride_c, stride_h, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sample's mean per channel, in float64."""
    for channel in range(0, Cin):
        c = tl.full((), channel, tl.int64 if WIDE else tl.int32)
        total = tl.zeros((ROWS, COLUMNS), tl.float64)
        for y0 in range(0, H, ROWS):
            y = y0 + tl.arange(0, ROWS)[:, None]
            if WIDE:
                y = y.to(tl.int64)
            for x0 in range(0, W, COLUMNS):
                x = x0 + tl.arange(0, COLUMNS)[None, :]
                if WIDE:
                    x = x.to(tl.int64)
                offsets = c * stride_c + y * stride_h + x * stride_w
                total += tl.load(image + offsets, mask=(y < H) & (x < W), other=0.0).to(tl.float64)
        mean = tl.sum(tl.sum(total, 1), 0) / (H.to(tl.int64) * W).to(tl.float64)
        tl.store(out + channel, mean)


@triton.jit
def paint(
    image,  # (Cin, H, W) of one sample
    out,  # the sample's first view, dense; the second view lies `view_stride` elements on
    view_stride,
    boxes,  # (V, 4) of the sample at stride box_stride
    box_stride,
    fills,  # float64: CONSTANT (1 or Cin,), MEAN (Cin,); UNIFORM: the given draws' row or None
    fill_stride, first_fill, index, seed, first, last, Cin, H, W,
    stride_c, stride_h, stride_w,
    VIEWS: tl.constexpr,  # 1: max, 2: min, 3: both
    FILL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of `out`: rows are the image's, columns x·Cin + c; else rows are
    #                               c·H + y, columns x
    DENSE: tl.constexpr,  # the image lies in memory as `out` does
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Copies rows `first` to `last` of the image into every view, each view's box filled."""
    COUNT: tl.constexpr = 2 if VIEWS == 3 else 1
    length = W * Cin if CHANNELS_LAST else W
    for r0 in range(first, last, ROWS):
        r = r0 + tl.arange(0, ROWS)[:, None]
        if WIDE:
            r = r.to(tl.int64)
        for j0 in range(0, length, COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)[None, :]
            if WIDE:
                j = j.to(tl.int64)
            if CHANNELS_LAST:
                y = r
                x = j // Cin
                c = j % Cin
            else:
                c = r // H
                y = r % H
                x = j
            here = r * length + j
            inside = (r < last) & (j < length)
            if DENSE:
                v = tl.load(image + here, mask=inside)
            else:
                v = tl.load(image + (c * stride_c + y * stride_h + x * stride_w), mask=inside)
            for view in tl.static_range(COUNT):
                box = boxes + view * box_stride
                y0 = tl.load(box)
                x0 = tl.load(box + 1)
                y1 = tl.load(box + 2)
                x1 = tl.load(box + 3)
                hidden = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
                if FILL == 1:  # one uniform draw per sample, view and channel
                    fill = draw(fills, first_fill + view * Cin + c, index, seed)
                elif FILL == 3:  # N(0, 1) per element
                    fill = tl.zeros((ROWS, COLUMNS), tl.float64)
                    if tl.max(tl.max(hidden.to(tl.int32), 1), 0) > 0:
                        number = (c * H + y) * W + x
                        fill = draws.normal(
                            number, index * 0 + (1 + view if VIEWS == 3 else VIEWS), index, seed
                        )
                else:
                    fill = tl.load(fills + c * fill_stride)
                if out.dtype.element_ty != tl.float64:
                    fill = fill.to(tl.float32)
                painted = tl.where(hidden, numeric.cast(fill, out.dtype.element_ty), v)
                tl.store(out + view * view_stride + here, painted, mask=inside)
