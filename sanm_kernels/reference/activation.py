"""Section 1 of the method: energy of a feature map, its statistics, its peak and its trough.

From the energy on everything is float32 arithmetic of a prescribed order, each step rounded once,
so that every backend finds the same two pixels from the same energy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sanm_kernels.reference.precision import accumulate_dtype


def energy(features: Tensor) -> Tensor:
    """E[b,y,x] = Σ_c F[b,c,y,x]²: (B, C, h, w) → (B, h, w) in the accumulation dtype.

    The order of summation is torch's own for contiguous and for channels_last maps; other strides
    are copied to contiguous first.
    """
    f = features.to(accumulate_dtype(features))
    if not f.is_contiguous() and not f.is_contiguous(memory_format=torch.channels_last):
        f = f.contiguous()
    return (f * f).sum(1)


def statistics(e: Tensor) -> Tensor:
    """(5, B): maximum, minimum, mean, standard deviation (of the population) and entropy of E.

    Entropy is −Σ p·ln p / ln(h·w) with p = E/ΣE: 0 for one spike, 1 for a flat map, which a map of
    zeros and a map of one cell count as.
    """
    e = e.flatten(1)
    cells = e.shape[1]
    total = e.sum(1)
    p = e / total[:, None]
    entropy = -torch.special.xlogy(p, p).sum(1) / math.log(max(cells, 2))
    if cells == 1:
        entropy = torch.ones_like(entropy)
    entropy = torch.where(total == 0, torch.ones_like(entropy), entropy)
    mean = e.mean(1)
    std = (e - mean[:, None]).square().mean(1).sqrt()
    return torch.stack([e.amax(1), e.amin(1), mean, std, entropy])


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a·b + c rounded once, exactly.

    The float64 product is exact. The float64 sum is rounded to odd (its last bit is set where the
    sum is inexact), after which rounding to float32 can't go wrong a second time.
    """
    p, c = a.double() * b.double(), c.double()
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # Knuth's two-sum: s + error = p + c exactly
    bits = s.view(torch.int64)
    even = (error != 0) & (bits & 1 == 0)
    step = torch.where((error > 0) == (s > 0), 1, -1)
    return torch.where(even, bits + step, bits).view(torch.float64).float()


def resize_table(n: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear weights from n to `size` pixels: left cells, right cells (int64), fractions."""
    x = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * (n / size) - 0.5
    left = x.floor()
    t = (x - left).float()
    t = torch.where((left < 0) | (left >= n - 1), torch.zeros_like(t), t)
    left = left.long().clamp(0, n - 1)
    return left, (left + 1).clamp(max=n - 1), t


def upsample(e: Tensor, height: int, width: int) -> Tensor:
    """U (B, H, W) of E (B, h, w), float32: half-pixel centres, edge clamp, no antialiasing.

    Horizontally fma(b − a, t, a), then vertically the same.
    """
    left, right, t = resize_table(e.shape[2], width, e.device)
    a, b = e[:, :, left], e[:, :, right]
    rows = fma(b - a, t.expand_as(a), a)
    left, right, t = resize_table(e.shape[1], height, e.device)
    a, b = rows[:, left], rows[:, right]
    return fma(b - a, t[:, None].expand_as(a), a)


def normalize(e: Tensor) -> Tensor:
    """E / max(‖E‖₂, 1e-12) for E (B, n) float32, in the prescribed order of summation.

    Eight interleaved partial sums of products rounded before they are added, the eight added in
    order, then the last n mod 8 elements by fused multiply-add.
    """
    n = e.shape[1]
    whole = n - n % 8
    lanes = torch.zeros(e.shape[0], 8, dtype=e.dtype, device=e.device)
    for i in range(0, whole, 8):
        lanes = lanes + e[:, i : i + 8] * e[:, i : i + 8]
    total = lanes[:, 0]
    for k in range(1, 8):
        total = total + lanes[:, k]
    for i in range(whole, n):
        total = fma(e[:, i], e[:, i], total)
    # float32's correctly rounded root: float64 has more than twice its digits.
    norm = total.double().sqrt().float().clamp(min=1e-12)
    return e / norm[:, None]


def locate(e: Tensor, height: int, width: int, quantize: bool) -> Tensor:
    """Peak and trough in image pixels: (B, h, w) → (2, B, 2) int32 rows (y, x).

    Of the upsampled map, or with `quantize` of floor(255·(U − min U)/(max U − min U + 1e-12));
    ties go to the first pixel in row-major order. A map that is not finite counts as flat: both
    are then (0, 0).
    """
    e = e.float()
    finite = torch.isfinite(e).flatten(1).all(1)
    e = torch.where(finite[:, None, None], e, torch.zeros_like(e))
    if quantize:
        e = normalize(e.flatten(1)).view_as(e)
    u = upsample(e, height, width).flatten(1)
    if quantize:
        low = u.amin(1, keepdim=True)
        u = (255 * (u - low) / ((u.amax(1, keepdim=True) - low) + 1e-12)).floor()
    first = torch.stack(
        [_first(u == u.amax(1, keepdim=True)), _first(u == u.amin(1, keepdim=True))]
    )
    return torch.stack([first // width, first % width], -1).int()


def _first(mask: Tensor) -> Tensor:
    """Column of the first True in every row: (B, n) → (B,) int64; 0 where there is none."""
    order = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, order, mask.shape[1]).amin(1) % mask.shape[1]
