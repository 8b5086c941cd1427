"""Counter-based random numbers in Triton kernels: those of `sanm_kernels/reference/draws.py`.

Philox 4×32-10 is Triton's own; its words are converted by +, −, ×, ÷ and √ on float64 alone, each
correctly rounded, so that all backends are bitwise equal.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(number, stream, index, seed):
    """Philox's four uint32 words for the counter (number, stream, index low, index high)."""
    c0 = number.to(tl.uint32)
    zero = c0 * 0
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return tl.philox(seed, c0, zero + stream.to(tl.uint32), zero + low, zero + high)


@triton.jit
def uniform(number, index, seed):
    """The sample's uniforms `number` (any shape): float64 in [0, 1), multiples of 2⁻³²."""
    a, b, c, d = _words(number // 4, index * 0, index, seed)
    lane = number % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return word.to(tl.float64) * 2.3283064365386963e-10  # 2⁻³²


@triton.jit
def normal(number, stream, index, seed):
    """N(0, 1) in float64 by the Box–Muller transform, one Philox block per number."""
    a, b, _, _ = _words(number, stream, index, seed)
    # ln x for x = m·2ᵉ with m in [√½, √2): ln m = 2·artanh(s), s = (m − 1)/(m + 1)
    x = (a.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    bits = x.to(tl.int64, bitcast=True)
    e = (bits >> 52) - 1022
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = m < 0.7071067811865476
    m = tl.where(low, m * 2, m)
    e = e - low.to(tl.int64)
    s = (m - 1) / (m + 1)
    s2 = s * s
    p = s * 0 + (s * 0 + 1) / 17
    for k in tl.static_range(8):
        p = p * s2 + (s * 0 + 1) / (15 - 2 * k)
    ln = e.to(tl.float64) * 0.6931471805599453 + p * (s * 2)
    radius = tl.sqrt(ln * -2.0)
    # cos(2π·b/2³²): the two high bits give the quadrant, the Taylor series the rest of it
    quadrant = b >> 30
    y = (b & 0x3FFFFFFF).to(tl.float64) * 9.313225746154785e-10 * 1.5707963267948966  # 2⁻³⁰·π/2
    y2 = y * y
    cos = y * 0 + 1
    sin = y * 0 + 1
    for k in tl.static_range(9):
        n = 18 - 2 * k
        cos = 1 - cos * y2 / (y * 0 + n * (n - 1))
        sin = 1 - sin * y2 / (y * 0 + n * (n + 1))
    value = tl.where(quadrant % 2 == 1, sin * y, cos)
    value = tl.where((quadrant == 1) | (quadrant == 2), -value, value)
    return radius * value
