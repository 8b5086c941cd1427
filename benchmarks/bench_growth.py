"""Our time as one size grows and the others stay; `benchmarks.plot` draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks import bench_fit_label_quality, bench_masked_forward, bench_masked_loss
from benchmarks.common import OURS, Case


def cases() -> Iterator[Case]:
    masked, loss = bench_masked_forward.case, bench_masked_loss.case
    series = [
        *((masked(B, 512, 4, 32, 10), "B", B) for B in (32, 64, 128, 256, 512, 1024)),
        *((masked(128, C, 4, 32, 10), "C", C) for C in (64, 128, 256, 512, 1024, 2048)),
        *((masked(32, 512, 4, H, 10), "H·W", H * H) for H in (32, 64, 96, 128, 192, 256)),
        *((loss(64, K), "K", K) for K in (10, 30, 100, 300, 1000, 3000)),
        *((bench_fit_label_quality.case(N), "N", N) for N in (30_000, 300_000, 3_000_000)),
    ]
    for case, name, size in series:
        yield replace(case, run={OURS: case.run[OURS]}, axis=(name, size))
