"""Growth of our time with one size at a time, the others fixed; `benchmarks.plot` draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks import bench_fit_label_quality, bench_masked_forward, bench_masked_loss
from benchmarks.common import OURS, Case


def cases() -> Iterator[Case]:
    masked, loss = bench_masked_forward.case, bench_masked_loss.case
    for B in (32, 64, 128, 256, 512, 1024):
        yield _ours(masked(B, 512, 4, 32, 10), "B", B)
    for C in (64, 128, 256, 512, 1024, 2048):
        yield _ours(masked(128, C, 4, 32, 10), "C", C)
    for H in (32, 64, 96, 128, 192, 256):
        yield _ours(masked(32, 512, 4, H, 10), "H·W", H * H)
    for K in (10, 30, 100, 300, 1000, 3000):
        yield _ours(loss(64, K), "K", K)
    for N in (30_000, 100_000, 300_000, 1_000_000, 3_000_000):
        yield _ours(bench_fit_label_quality.case(N), "N", N)


def _ours(case: Case, name: str, size: int) -> Case:
    return replace(case, run={OURS: case.run[OURS]}, axis=(name, size))
