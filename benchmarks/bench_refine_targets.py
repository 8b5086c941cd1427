"""refine_targets of four predictions (two views, two networks), blended with the labels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case, with_compiled
from sanm_kernels import refine_targets


def cases() -> Iterator[Case]:
    for shape in SHAPES["refine_targets"]:
        yield case(*shape)


def case(B: int, K: int) -> Case:
    def make(seed: int) -> tuple:
        g = torch.Generator().manual_seed(seed)
        logits = [torch.randn(B, K, generator=g) for _ in range(4)]
        return logits, torch.randint(K, (B,), generator=g), torch.rand(B, generator=g)

    run = {
        OURS: lambda x: [refine_targets(x[0], labels=x[1], clean_prob=x[2])],
        **with_compiled(baselines.refine_targets_torch, lambda f, x: [f(*x, 0.5)]),
    }
    return Case("refine_targets", f"4 × ({B}, {K})", make, run,
                read=4 * 4 * B * K + 12 * B, written=4 * B * K)
