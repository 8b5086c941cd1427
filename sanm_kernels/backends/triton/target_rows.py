"""Rows of targets as masked_loss needs them, modulated and mixed on the fly (sections 4 and 7)."""

from __future__ import annotations

import triton
import triton.language as tl

from sanm_kernels.backends.triton import numeric


@triton.jit
def _start(i, s_1, s_2, t_0, t_1, t_2):
    """Offset of target row i of (s_0, s_1, s_2, K) with strides (t_0, t_1, t_2)."""
    outer = i // s_2
    return outer // s_1 * t_0 + outer % s_1 * t_1 + i % s_2 * t_2


@triton.jit
def _modulation(
    rows,  # (ROWS,) pointers to rows of K floats, or to an int64 each
    ratio,  # (M,) in ACC or None
    i,  # (ROWS,) int64: the rows' numbers
    exists,  # (ROWS,)
    K, t_k,
    SOFT: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Per row: the first argmax j*, its new target, and what every other target gains."""
    top = tl.full((ROWS,), -1, tl.int64)
    best = tl.full((ROWS,), 1.0, ACC)
    drop = tl.zeros((ROWS,), ACC)
    if not SOFT:
        top = tl.load(rows, mask=exists, other=0)
    elif ratio is not None:
        best = tl.full((ROWS,), -float("inf"), ACC)
        for first in range(0, K, CLASSES):
            k = first + tl.arange(0, CLASSES)[None, :]
            inside = exists[:, None] & (k < K)
            t = tl.load(rows[:, None] + k.to(tl.int64) * t_k, mask=inside, other=-float("inf"))
            t = t.to(ACC)
            high = tl.max(t, 1)
            where = tl.min(tl.where(inside & (t == high[:, None]), k, K), 1)
            top = tl.where(high > best, where.to(tl.int64), top)
            best = tl.maximum(best, high)
    if ratio is not None:
        drop = tl.load(ratio + i, mask=exists, other=0.0).to(ACC)
        if CLAMP:
            drop = tl.minimum(drop, best)
    gain = numeric.divide(drop, tl.zeros((ROWS,), ACC) + tl.maximum(K - 1, 1).to(ACC))
    return top, best - drop, gain


@triton.jit
def _modulated(
    rows, exists, k, K, t_k, modulation,
    MODULATED: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Targets (ROWS, CLASSES) of the rows and of classes k (1, CLASSES); 0 outside."""
    top, peak, gain = modulation
    inside = exists[:, None] & (k < K)
    if SOFT:
        t = tl.load(rows[:, None] + k.to(tl.int64) * t_k, mask=inside, other=0.0).to(ACC)
        if MODULATED:
            t = tl.where(k == top[:, None], peak[:, None], t + gain[:, None])
    else:
        t = tl.where(k == top[:, None], peak[:, None], gain[:, None])
    return tl.where(inside, t, 0.0)


@triton.jit
def partners(permutation, b, exists, M):
    """The rows in [0, M) that rows b are mixed with, and whether π is in range."""
    if permutation is None:
        return b, exists
    else:
        partner = tl.load(permutation + b, mask=exists, other=0)
        known = (partner >= 0) & (partner < M)
        return tl.where(known, partner, 0), known


@triton.jit
def counting(targets, b, partner, exists, t_2, ignore_index, MIXED: tl.constexpr):
    """Which rows of class indices count: neither their own label nor the partner's is ignored."""
    valid = exists & (tl.load(targets + b * t_2, mask=exists, other=0) != ignore_index)
    if MIXED:
        valid &= tl.load(targets + partner * t_2, mask=exists, other=0) != ignore_index
    return valid


@triton.jit
def tile(
    targets, ratio, permutation, start, last, K, M, ignore_index, s_1, s_2, t_0, t_1, t_2, t_k,
    SOFT: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The tile of rows from `start`: their indices, masks of existing and of counting rows, poison;
    then pointers to their targets and their modulation, and the same for their partners.

    Poison is NaN for a row whose label or partner is out of range, which a kernel cannot report.
    """
    b = (start + tl.arange(0, ROWS)).to(tl.int64)
    exists = b < last
    partner, known = partners(permutation, b, exists, M)
    valid, sound = exists, known
    own_rows = targets + _start(b, s_1, s_2, t_0, t_1, t_2)
    own = _modulation(own_rows, ratio, b, exists, K, t_k, SOFT, CLAMP, ROWS, CLASSES, ACC)
    other_rows, other = own_rows, own
    if permutation is not None:
        other_rows = targets + _start(partner, s_1, s_2, t_0, t_1, t_2)
        other = _modulation(other_rows, ratio, partner, exists, K, t_k, SOFT, CLAMP, ROWS, CLASSES,
                            ACC)  # fmt: skip
    if not SOFT:
        valid = counting(targets, b, partner, exists, t_2, ignore_index,
                             permutation is not None)  # fmt: skip
        sound &= (own[0] >= 0) & (own[0] < K) & (other[0] >= 0) & (other[0] < K)
    poison = tl.where(sound | (valid == 0), 0.0, float("nan")).to(ACC)
    return b, exists, valid, poison, own_rows, own, other_rows, other


@triton.jit
def mixed(
    own_rows, own, other_rows, other, exists, k, K, t_k, share,
    MODULATED: tl.constexpr, MIXED: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """t = λ·t'_b + (1 − λ)·t'_partner: (ROWS, CLASSES); `share` is λ () float64."""
    t = _modulated(own_rows, exists, k, K, t_k, own, MODULATED, SOFT, ACC)
    if MIXED:
        u = _modulated(other_rows, exists, k, K, t_k, other, MODULATED, SOFT, ACC)
        t = share.to(ACC) * t + (1.0 - share).to(ACC) * u
    return t
