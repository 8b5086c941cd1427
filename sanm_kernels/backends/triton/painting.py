"""Sections 2 to 4 of the method inside one program: box, views and targets of one sample."""

from __future__ import annotations

import triton
import triton.language as tl

from sanm_kernels.backends.triton import draws, numeric, tiles


@triton.jit
def draw(given, number, index, seed):
    """The sample's uniforms `number`: given by the caller, or from Philox."""
    if given is not None:
        return tl.load(given + number)
    else:
        return draws.uniform(number, index, seed)


@triton.jit
def _side(square, limit):
    """round(√square), ties to even, clamped to 1 … limit; the root in float64."""
    side = numeric.round_even(tl.sqrt(square.to(tl.float64)))
    return tl.minimum(tl.maximum(side, 1.0), limit.to(tl.float64)).to(tl.int32)


@triton.jit
def size(
    area_draw, aspect_draw, clean_prob, H, W,
    ratio_low, ratio_high, ratio_gamma, aspect_low, aspect_high, area_scale,
):  # fmt: skip
    """Ratio r = a + γ·(1 − q), and the box's height = √(A·s), width = √(A/s), A = κ·r·H·W.

    Draws are interpolated in float64; then float32, each step rounded once.
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
    """First row or column of a box of this side at the position, shifted to lie inside."""
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
def uniforms(out, given, first, count, index, seed, BLOCK: tl.constexpr):
    """out[k] = the sample's uniform `first + k`, for k < count."""
    for k0 in range(0, count, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        value = draw(given, first + tl.minimum(k, count - 1), index, seed)
        tl.store(out + k, value, mask=k < count)


@triton.jit
def means(
    image,  # of one sample: `planes` planes of `size` vectors, each with `step` channels
    out,  # workspace (planes · step,) float64, written
    planes, step, size,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sample's mean per channel, in float64.

    A plane is read in blocks of whole pixels, so that an element of a block is always of the same
    channel.
    """
    slot = tl.arange(0, BLOCK)
    each = BLOCK // (step * VECTOR) * step * VECTOR
    length = tiles.offset(size, VECTOR, WIDE)
    for plane in range(0, planes):
        total = tl.zeros((BLOCK,), tl.float64)
        for block in range(0, tl.cdiv(length, each)):
            at = tiles.offset(block, each, WIDE) + slot
            inside = (slot < each) & (at < length)
            at += tiles.offset(plane, length, WIDE)
            total += tl.load(image + at, mask=inside, other=0.0).to(tl.float64)
        for c in range(0, step):
            own = tl.sum(tl.where(slot % step == c, total, 0.0), 0)
            tl.store(out + plane * step + c, own / (length // step).to(tl.float64))


@triton.jit
def _fill(fills, c, FILL: tl.constexpr, DTYPE: tl.constexpr):
    """The fill of channels c in the image's dtype; unused with FILL 3, the pixel noise."""
    if FILL == 3:
        return tl.full((), 0.0, DTYPE)
    else:
        fill = tl.load(fills + c)
        if tl.float64 != DTYPE:
            fill = fill.to(tl.float32)
        return numeric.cast(fill, DTYPE)


@triton.jit
def _hide(v, hidden, fill, FILL: tl.constexpr):
    if FILL == 3:  # left to `noise`, after the copy
        return v
    else:
        return tl.where(hidden, fill, v)


@triton.jit
def paint(
    image,  # (Cin, H, W) of one sample, dense
    out,  # the sample's first view, dense in the same order
    view_stride,  # elements from the first view to the second
    boxes,  # (V, 4) of the sample
    fills,  # float64: of channel c of view v at c·fill_stride + v·fill_view
    fill_stride, fill_view, first, last, planes, H, length, step,
    VIEWS: tl.constexpr,  # 1: max, 2: min, 3: both
    FILL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Copies rows `first` to `last` of every plane into every view, each view's box filled."""
    COUNT: tl.constexpr = 2 if VIEWS == 3 else 1
    TYPE: tl.constexpr = out.dtype.element_ty
    other = boxes + 4 * (COUNT - 1)
    for left in range(0, length, COLUMNS):
        j = left + tl.arange(0, COLUMNS)[None, :]
        for plane in range(0, planes):
            c = plane
            if CHANNELS_LAST:
                c = j % step
            # of the first view and of the second, or the first again
            y0, y1, j0, j1 = tiles.box(boxes, step)
            y2, y3, j2, j3 = tiles.box(other, step)
            fill0 = _fill(fills, c * fill_stride, FILL, TYPE)
            fill1 = _fill(fills, c * fill_stride + fill_view, FILL, TYPE)
            for top in range(first, last, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                at = tiles.offset(plane * H + y, length, WIDE) + j
                inside = (y < last) & (j < length)
                v = tl.load(image + at, mask=inside)
                hidden = tiles.within(y, y0, y1) & tiles.within(j, j0, j1)
                tl.store(out + at, _hide(v, hidden, fill0, FILL), mask=inside)
                if COUNT == 2:
                    hidden = tiles.within(y, y2, y3) & tiles.within(j, j2, j3)
                    tl.store(out + view_stride + at, _hide(v, hidden, fill1, FILL), mask=inside)


@triton.jit
def noise(
    out, view_stride,  # as in paint
    boxes,  # (V, 4) of the sample
    index, seed, first, last, planes, H, length, step,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """N(0, 1) into the part of every view's box that lies in rows `first` to `last`.

    Random numbers need many registers: tiles are small.
    """
    COUNT: tl.constexpr = 2 if VIEWS == 3 else 1
    for view in tl.static_range(COUNT):
        y0, y1, j0, j1 = tiles.box(boxes + 4 * view, step)
        bottom = tl.minimum(y1, last)
        for plane in range(0, planes):
            for top in range(tl.maximum(y0, first), bottom, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                for left in range(j0, j1, COLUMNS):
                    j = left + tl.arange(0, COLUMNS)[None, :]
                    number = ((plane + j % step) * H + y) * (length // step) + j // step
                    stream = index * 0 + (1 + view if VIEWS == 3 else VIEWS)
                    value = draws.normal(number, stream, index, seed)
                    if out.dtype.element_ty != tl.float64:
                        value = value.to(tl.float32)
                    at = tiles.offset(plane * H + y, length, WIDE) + j
                    tl.store(out + view * view_stride + at,
                             numeric.cast(value, out.dtype.element_ty),
                             mask=(y < bottom) & (j < j1))  # fmt: skip
