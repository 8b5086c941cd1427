"""Correctly rounded arithmetic for Triton kernels, the same compiled and interpreted.

Triton's `/` on float32 is an approximation, its `tl.fma` is not fused in the interpreter, and its
compiler contracts a·b + c by default (`launch.options` turns this off). Most functions here are
one correctly rounded operation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

_FUSED = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """A run-time argument annotated tl.float64 as a tensor (); the interpreter passes a float."""
    return tl.full((), x, DTYPE)


@triton.jit
def number(numbers, i: tl.constexpr, value):
    """Run-time number i () float64: numbers[i] if they are on the device, else the argument."""
    if numbers is None:
        return scalar(value, tl.float64)
    else:
        return tl.load(numbers + i)


@triton.jit
def divide(a, b):
    """a / b rounded once, float32 or float64."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(a):
    """√a rounded once, float32 or float64."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def log(a):
    """ln a in float64: tl.log on float32 is inaccurate near 1. For few elements."""
    return tl.log(a.to(tl.float64))


@triton.jit
def fma(a, b, c):
    """float32 a·b + c rounded once.

    Interpreted: the float64 product is exact, the float64 sum is rounded to odd (its last bit set
    if it is inexact), and rounding that to float32 is then free of double rounding.
    """
    if _FUSED:
        return tl.fma(a, b, c)
    else:
        p = a.to(tl.float64) * b.to(tl.float64)
        z = c.to(tl.float64)
        s = p + z
        t = s - p
        error = (p - (s - t)) + (z - t)  # Knuth's two-sum: s + error = p + c exactly
        bits = s.to(tl.int64, bitcast=True)
        even = (error != 0) & ((bits & 1) == 0)
        step = tl.where((error > 0) == (s > 0), 1, -1).to(tl.int64)
        odd = tl.where(even, bits + step, bits)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def round_even(x):
    """The nearest integer to a float64 0 ≤ x < 2⁵², ties to even."""
    return (x + 4503599627370496.0) - 4503599627370496.0


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x as DTYPE, rounded to nearest, ties to even: the interpreter truncates to bfloat16."""
    if (tl.bfloat16 == DTYPE) and (not _FUSED):
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, up, bits).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def total(values, count, BLOCK: tl.constexpr):
    """Σ of `count` float64 values, in an order that BLOCK determines."""
    result = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        result += tl.load(values + i, mask=i < count, other=0.0)
    return tl.sum(result, 0)


@triton.jit
def softmax_normalizer(
    logits,  # (·, K)
    b,  # (ROWS,) int64
    exists,  # (ROWS,)
    K, z_b, z_k, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of rows b: the maximum and Σ e^(z − maximum), in ACC. NaN propagates to the sum.

    Tiles are accumulated elementwise and reduced after the loop: one reduction per row, and triton
    3.7's compiler fails on a reduction inside a loop whose result is used twice. The sum is
    compensated (Knuth's two-sum): next to the largest term, the small terms of a long row would be
    rounded away.
    """
    highest = tl.full((ROWS, CLASSES), -float("inf"), ACC)
    for first in range(0, K, CLASSES):
        k = (first + tl.arange(0, CLASSES)).to(tl.int64)[None, :]
        inside = exists[:, None] & (k < K)
        z = tl.load(logits + b[:, None] * z_b + k * z_k, mask=inside, other=-float("inf")).to(ACC)
        highest = tl.maximum(highest, z)
    top = tl.max(highest, 1)
    power = tl.zeros((ROWS, CLASSES), ACC)
    lost = tl.zeros((ROWS, CLASSES), ACC)
    for first in range(0, K, CLASSES):
        k = (first + tl.arange(0, CLASSES)).to(tl.int64)[None, :]
        inside = exists[:, None] & (k < K)
        z = tl.load(logits + b[:, None] * z_b + k * z_k, mask=inside, other=0.0).to(ACC)
        term = tl.where(inside, tl.exp(z - top[:, None]), 0.0)
        more = power + term
        added = more - power
        lost += (power - (more - added)) + (term - added)
        power = more
    return top, tl.sum(power.to(tl.float64) + lost.to(tl.float64), 1).to(ACC)
