"""Counter-based random numbers: Philox 4×32-10 (Salmon et al., SC 2011), in plain torch.

A draw depends on the seed, the sample's global index and its own number, and on nothing else: not
on the batch, its order, the rank or the device. The counter's words are (number, stream, index low,
index high) and the key is (seed low, seed high). Stream 0 holds the uniforms of a sample, streams 1
and 2 the pixel noise of its max and min view.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(number: Tensor, stream: int, index: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Four words in [0, 2³²) as int64, of the shape that number and index broadcast to.

    number int64 in [0, 2³²), index int64 ≥ 0, seed int64 () or (1,).
    """
    number, index = torch.broadcast_tensors(number, index)
    c0, c1 = number & _MASK, torch.full_like(number, stream)
    c2, c3 = index & _MASK, (index >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrap modulo 2⁶⁴
        c0, c1, c2, c3 = (
            ((b >> 32) & _MASK) ^ c1 ^ k0,
            b & _MASK,
            ((a >> 32) & _MASK) ^ c3 ^ k1,
            a & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(count: int, index: Tensor, seed: Tensor) -> Tensor:
    """(B, count) float64 in [0, 1), multiples of 2⁻³²; index (B,) int64, seed () int64."""
    blocks = torch.arange((count + 3) // 4, device=index.device)
    words = torch.stack(philox(blocks[None, :], 0, index[:, None], seed), -1)
    return words.flatten(1)[:, :count].double() * 2.0**-32


def normals(count: int, stream: int, index: Tensor, seed: Tensor) -> Tensor:
    """(B, count) float64 from N(0, 1) by Box and Muller's transform, one Philox block each.

    Only +, −, ×, ÷ and √ on float64, each rounded once, so that every backend agrees.
    """
    w0, w1, _, _ = philox(
        torch.arange(count, device=index.device)[None], stream, index[:, None], seed
    )
    radius = _sqrt(_log((w0.double() + 0.5) * 2.0**-32) * -2.0)
    return radius * _cos_turn(w1)


def _sqrt(x: Tensor) -> Tensor:
    """√x for x > 0, rounded once: torch's own may be a neighbour of that (on the CPU, with MKL).

    One step of Newton's from there, with y² to twice the digits by Dekker's product.
    """
    y = x.sqrt()
    high = y * (2.0**27 + 1)
    high = high - (high - y)
    low = y - high
    square = y * y
    error = ((high * high - square) + 2 * high * low) + low * low  # y² = square + error
    return y + ((x - square) - error) / (2 * y)


def _log(x: Tensor) -> Tensor:
    """ln x = e·ln 2 + 2·artanh(s), s = (m − 1)/(m + 1), for x = m·2ᵉ with m in [√½, √2)."""
    m, e = torch.frexp(x)
    low = m < math.sqrt(0.5)
    m = torch.where(low, m * 2, m)
    e = e.double() - low.double()
    s = (m - 1) / (m + 1)
    s2 = s * s
    p = torch.full_like(s, 1 / 17)
    for n in (15, 13, 11, 9, 7, 5, 3, 1):
        p = p * s2 + 1 / n
    return e * math.log(2) + p * (s * 2)


def _cos_turn(w: Tensor) -> Tensor:
    """cos(2π·w/2³²): the two high bits give the quadrant, the Taylor series the rest of it."""
    quadrant, f = w >> 30, (w & 0x3FFFFFFF).double() * 2.0**-30
    x = f * (math.pi / 2)
    x2 = x * x
    cos, sin = torch.ones_like(x), torch.ones_like(x)
    for n in (18, 16, 14, 12, 10, 8, 6, 4, 2):
        cos = 1 - cos * x2 / (n * (n - 1))
        sin = 1 - sin * x2 / (n * (n + 1))
    value = torch.where(quadrant % 2 == 1, sin * x, cos)
    return torch.where((quadrant == 1) | (quadrant == 2), -value, value)
