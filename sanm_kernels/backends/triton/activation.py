"""Section 1 of the method inside one program: energy, statistics, peak and trough of one sample.

The energy map E (n = h·w cells) is in a global workspace of the program, so that bilinear
upsampling can gather from it; `tl.debug_barrier` separates stores from loads.

Peak and trough of the upsampled map U (H, W) are found without storing U. Its rows y form h + 1
segments that share the cells they are interpolated between; in a segment every column is
fma(b − a, t, a) with a and b fixed and t growing with y, so it is monotone, and so is the
quantisation. The extremes of U are therefore on first or last rows of segments; and the pixels of a
column that reach the extreme level, if any, are the first or the last rows of the segment, so that
the first of them is the segment's first row or is found by bisection. All (segment, column) pairs
are searched in parallel, and the smallest y·W + x is the first pixel in row-major order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanm_kernels.backends.triton import numeric, tiles


@triton.jit
def energy(
    features,  # of one sample: (C, n) if CHANNELS_FIRST, else (n, C), the first `channels` of C
    e,  # workspace (n,) in ACC, written; with GROUP > 1 (1 + GROUP, n)
    n,
    channels,
    width,  # GROUP · n or C, in vectors
    size,  # channels · n in vectors
    CHANNELS_FIRST: tl.constexpr,
    GROUP: tl.constexpr,  # channels whose cells make one row
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a sample need 64 bits
):
    """E[p] = Σ_c F[c, p]², accumulated in ACC.

    Channels first, a column of the matrix with GROUP channels per row is one cell, so no index is
    divided. With GROUP > 1 the sums of the columns are then added by cell.
    """
    length = width * VECTOR
    if CHANNELS_FIRST:
        end = tiles.offset(size, VECTOR, WIDE)
        columns = e
        if GROUP > 1:
            columns = e + n
        rows = (channels + GROUP - 1) // GROUP
        for left in range(0, length, COLUMNS):
            j = left + tl.arange(0, COLUMNS)[None, :]
            total = tl.zeros((ROWS, COLUMNS), ACC)
            for top in range(0, rows, ROWS):
                at = tiles.offset(top + tl.arange(0, ROWS)[:, None], length, WIDE) + j
                f = tl.load(features + at, mask=(j < length) & (at < end), other=0.0).to(ACC)
                total += f * f
            i = left + tl.arange(0, COLUMNS)
            tl.store(columns + i, tl.sum(total, 0), mask=i < length)
        if GROUP > 1:
            tl.debug_barrier()
            for first in range(0, n, COLUMNS):
                p = first + tl.arange(0, COLUMNS)
                cell = tl.zeros((COLUMNS,), ACC)
                for k in tl.static_range(GROUP):
                    cell += tl.load(columns + k * n + p, mask=p < n, other=0.0)
                tl.store(e + p, cell, mask=p < n)
    else:
        for top in range(0, n, ROWS):
            p = top + tl.arange(0, ROWS)
            total = tl.zeros((ROWS, COLUMNS), ACC)
            for left in range(0, channels, COLUMNS):
                c = left + tl.arange(0, COLUMNS)[None, :]
                at = tiles.offset(p[:, None], length, WIDE) + c
                inside = (p[:, None] < n) & (c < channels // VECTOR * VECTOR)
                f = tl.load(features + at, mask=inside, other=0.0).to(ACC)
                total += f * f
            tl.store(e + p, tl.sum(total, 1), mask=p < n)


@triton.jit
def statistics(e, n, CELLS: tl.constexpr, ACC: tl.constexpr):
    """Maximum, minimum, mean, standard deviation, entropy of e (n,); whether all are finite.

    The sums of tiles are accumulated in float64: a large map has thousands of tiles.
    """
    high = -float("inf")
    low = float("inf")
    total = tl.zeros((), tl.float64)
    strange = 0
    for first in range(0, n, CELLS):
        p = first + tl.arange(0, CELLS)
        v = tl.load(e + p, mask=p < n, other=0.0)
        high = tl.maximum(high, tl.max(tl.where(p < n, v, -float("inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(p < n, v, float("inf")), 0))
        total += tl.sum(v, 0).to(tl.float64)
        # in float32, in which positions are computed
        strange += tl.sum(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1), 0)
    total = total.to(ACC)
    mean = numeric.divide(total, n.to(ACC))
    square = tl.zeros((), tl.float64)
    entropy = tl.zeros((), tl.float64)
    for first in range(0, n, CELLS):
        p = first + tl.arange(0, CELLS)
        v = tl.load(e + p, mask=p < n, other=0.0)
        square += tl.sum(tl.where(p < n, (v - mean) * (v - mean), 0.0), 0).to(tl.float64)
        share = v / total
        term = tl.where(v == 0, 0.0, share * numeric.log(share).to(ACC))
        entropy -= tl.sum(term, 0).to(tl.float64)
    std = numeric.root(numeric.divide(square.to(ACC), n.to(ACC)))
    entropy = entropy.to(ACC) / numeric.log(tl.maximum(n, 2).to(ACC)).to(ACC)
    entropy = tl.where((n == 1) | (total == 0), 1.0, entropy).to(ACC)
    nan = total != total
    high = tl.where(nan, total, high)
    low = tl.where(nan, total, low)
    return high, low, mean, std, entropy, strange == 0


@triton.jit
def norm(e, n):
    """max(‖e‖₂, 1e-12) in float32 in the prescribed order: eight interleaved partial sums of
    rounded products, added in order, then the tail by fused multiply-add."""
    lane = tl.arange(0, 8)
    lanes = tl.zeros((8,), tl.float32)
    whole = n - n % 8
    for first in range(0, whole, 8):
        v = tl.load(e + first + lane).to(tl.float32)
        lanes += v * v
    total = tl.sum(tl.where(lane == 0, lanes, 0.0), 0)  # one term: exact
    for k in tl.static_range(1, 8):
        total += tl.sum(tl.where(lane == k, lanes, 0.0), 0)
    for k in range(whole, n):
        v = tl.load(e + k).to(tl.float32)
        total = numeric.fma(v, v, total)
    return tl.maximum(numeric.root(total), 1e-12)


@triton.jit
def _place(pixel, n, N):
    """The coordinate of a pixel of N in units of n cells, in float64."""
    return (pixel.to(tl.float64) + 0.5) * (n.to(tl.float64) / N.to(tl.float64)) - 0.5


@triton.jit
def _fraction(pixel, n, N):
    """The weight of the second of a pixel's two cells, float32; 0 beyond the outer cells."""
    x = _place(pixel, n, N)
    cell = tl.floor(x)
    return tl.where((cell < 0) | (cell >= n - 1), 0.0, x - cell).to(tl.float32)


@triton.jit
def _rows(e, scale, row, x, h, w, W, finite):
    """Horizontally interpolated values of cell rows `row` (S, 1) at columns x (1, X)."""
    place = _place(x, w, W)
    left = tl.minimum(tl.maximum(tl.floor(place), 0.0), (w - 1).to(tl.float64)).to(tl.int32)
    right = tl.minimum(left + 1, w - 1)
    ok = (x < tl.where(finite, W, 0)) & (row < h)  # a map that is not finite is read as 0
    a = numeric.divide(tl.load(e + row * w + left, mask=ok, other=0.0).to(tl.float32), scale)
    b = numeric.divide(tl.load(e + row * w + right, mask=ok, other=0.0).to(tl.float32), scale)
    return numeric.fma(b - a, _fraction(x, w, W) + a * 0, a)


@triton.jit
def _value(a, b, y, h, H):
    """U at rows y between the row values a and b."""
    return numeric.fma(b - a, _fraction(y, h, H) + a * 0, a)


@triton.jit
def _level(u, low, span, QUANTIZE: tl.constexpr):
    """The level of a pixel: floor(255·(u − low)/span), or u itself."""
    if QUANTIZE:
        return tl.floor(numeric.divide(255.0 * (u - low), span + u * 0))
    else:
        return u


@triton.jit
def _first(a, b, y0, y1, x, h, W, H, wanted, low, span, BITS, QUANTIZE: tl.constexpr):
    """Smallest y·W + x over pairs (segment, column) of pixels whose level is `wanted`.

    a, b (S, X): the pairs' row values; y0, y1 (S, 1): the segments' first and last rows.
    """
    begin = y0 + x * 0
    end = y1 + x * 0
    at_begin = _level(_value(a, b, begin, h, H), low, span, QUANTIZE) == wanted
    at_end = _level(_value(a, b, end, h, H), low, span, QUANTIZE) == wanted
    end = tl.where(at_begin, begin, end)
    for _ in range(0, BITS):  # begin does not qualify (or is the answer), end does
        middle = (begin + end) // 2
        there = _level(_value(a, b, middle, h, H), low, span, QUANTIZE) == wanted
        begin = tl.where(there, begin, middle)
        end = tl.where(there, middle, end)
    found = (at_begin | at_end) & (y0 <= y1) & (x < W)
    none = 2147483647
    return tl.min(tl.min(tl.where(found, end * W + x, none), 1), 0)


@triton.jit
def locate(
    e,  # workspace (h·w,), the energy map
    finite,  # a map that is not finite is treated as flat
    h,
    w,
    H,
    W,
    BITS,  # bit length of H
    QUANTIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Peak and trough as y·W + x."""
    scale = 1.0
    if QUANTIZE:
        scale = tl.where(finite, norm(e, h * w), 1.0)
    s = tl.arange(0, SEGMENTS)
    # Segment s holds the rows between cells s − 1 and s; its first row by bisection: y0 is the
    # number of rows whose cell is smaller.
    y0 = s * 0
    y1 = s * 0
    for bit in range(0, BITS):
        step = 1 << (BITS - 1 - bit)
        try0 = y0 + step
        y0 = tl.where((try0 <= H) & (tl.floor(_place(try0 - 1, h, H)) < s - 1), try0, y0)
        try1 = y1 + step
        y1 = tl.where((try1 <= H) & (tl.floor(_place(try1 - 1, h, H)) < s), try1, y1)
    y1 = tl.where(s == h, H, y1) - 1  # the last segment has all remaining rows
    y1 = tl.where(s > h, -1, y1)[:, None]
    y0 = tl.where(s == 0, 0, y0)[:, None]
    above = tl.maximum(s - 1, 0)[:, None]
    below = tl.minimum(s, h - 1)[:, None]

    high = -float("inf")
    low = float("inf")
    for first in range(0, W, COLUMNS):
        x = first + tl.arange(0, COLUMNS)[None, :]
        a = _rows(e, scale, above, x, h, w, W, finite)
        b = _rows(e, scale, below, x, h, w, W, finite)
        there = (y0 <= y1) & (x < W)
        u0 = _value(a, b, y0 + x * 0, h, H)
        u1 = _value(a, b, y1 + x * 0, h, H)
        top = tl.where(there, tl.maximum(u0, u1), -float("inf"))
        bottom = tl.where(there, tl.minimum(u0, u1), float("inf"))
        high = tl.maximum(high, tl.max(tl.max(top, 1), 0))
        low = tl.minimum(low, tl.min(tl.min(bottom, 1), 0))
    span = (high - low) + 1e-12
    wanted_high = _level(high, low, span, QUANTIZE)
    wanted_low = _level(low, low, span, QUANTIZE)
    peak = 2147483647
    trough = 2147483647
    for first in range(0, W, COLUMNS):
        x = first + tl.arange(0, COLUMNS)[None, :]
        a = _rows(e, scale, above, x, h, w, W, finite)
        b = _rows(e, scale, below, x, h, w, W, finite)
        peak = tl.minimum(
            peak, _first(a, b, y0, y1, x, h, W, H, wanted_high, low, span, BITS, QUANTIZE)
        )
        trough = tl.minimum(
            trough, _first(a, b, y0, y1, x, h, W, H, wanted_low, low, span, BITS, QUANTIZE)
        )
    return peak, trough
