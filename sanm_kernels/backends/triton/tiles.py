"""How kernels traverse images: in memory order, by accesses of 128 bits per thread.

A dense image (C, H, W) is `planes` matrices of H rows and `length` columns: C matrices (H, W) if it
is contiguous, one (H, W·C) if it is channels_last. A box covers rows y0 … y1 and columns
x0·step … x1·step of each, step = 1 or C, so that no loop needs a division of its index.

Triton vectorises accesses if it can prove that address and mask are multiples of the vector. So
launchers pass sizes and strides in vectors, and kernels multiply by the constant VECTOR: the
largest power of 2, up to 128 bits of elements, that divides all of them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton.launch import power_of_2


def dense(x: Tensor, last: bool) -> Tensor:
    """x (B, C, H, W), copied unless each sample is contiguous, or channels_last if `last`."""
    kind = torch.channels_last if last else torch.contiguous_format
    return x if x[:1].is_contiguous(memory_format=kind) else x.contiguous(memory_format=kind)


def vector(*tensors: Tensor, rows: int = 0) -> int:
    """VECTOR for the samples of dense tensors (B, …), and for rows of `rows` elements."""
    bits = max(16 // x.element_size() for x in tensors)
    return math.gcd(bits, rows, *(n for x in tensors for n in (x[:1].numel(), x.stride(0))))


@functools.lru_cache(64)  # it takes as long as the launch
def group(n: int, vector: int, most: int = 1024) -> int:
    """How many rows of n elements to join into one of whole vectors, which fills a power of 2 well.

    At most `most` elements if possible; the first that fills three quarters.
    """
    least = vector // math.gcd(n, vector)

    def fill(rows: int) -> float:
        return rows * n / (-(-rows * n // most) * most if rows * n > most else power_of_2(rows * n))

    candidates = range(least, max(most // n, least) + 1, least)
    return next((rows for rows in candidates if fill(rows) >= 0.75), max(candidates, key=fill))


class Walk(NamedTuple):
    """The matrices of an image, and the tile that a program processes at a time."""

    planes: int
    step: int
    length: int
    vector: int
    tile: dict[str, int]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Run-time arguments: planes, step, length in vectors."""
        return self.planes, self.step, self.length // self.vector


def walk(pixels: int, last: bool, *images: Tensor) -> Walk:
    """For dense images (·, C, H, W), with tiles of at most `pixels` elements."""
    _, channels, height, width = images[0].shape
    planes, step = (1, channels) if last else (channels, 1)
    length = width * step
    columns = min(power_of_2(length), 256, pixels)
    rows = max(min(pixels // columns, power_of_2(height)), 1)
    v = vector(*images, rows=length)
    return Walk(planes, step, length, v, {"VECTOR": v, "ROWS": rows, "COLUMNS": columns})


class Parts(NamedTuple):
    """Programs that share the rows of a sample, and rows of each."""

    programs: int
    rows: int


def parts(height: int, walk: Walk, most: int = 8) -> Parts:
    """At most `most` programs, of at least one tile's rows each."""
    programs = min(-(-height // walk.tile["ROWS"]), most)
    return Parts(programs, -(-height // programs))


@triton.jit
def box(corners, step):
    """First and last row and column of a box: corners (4,) are y0, x0, y1, x1."""
    y0, x0 = tl.load(corners).to(tl.int32), tl.load(corners + 1).to(tl.int32)
    y1, x1 = tl.load(corners + 2).to(tl.int32), tl.load(corners + 3).to(tl.int32)
    return y0, y1, x0 * step, x1 * step


@triton.jit
def within(i, low, high):
    """low ≤ i < high."""
    return (i >= low) & (i < high)


@triton.jit
def meets(i, low, high, VECTOR: tl.constexpr):
    """Whether the vector that contains element i has an element within: a mask of whole vectors."""
    start = i // VECTOR * VECTOR
    return (start + VECTOR > low) & (start < high)


@triton.jit
def offset(row, length, WIDE: tl.constexpr):
    """The offset of a row; WIDE: in 64 bits, for large samples."""
    if WIDE:
        row = row.to(tl.int64)
    return row * length
