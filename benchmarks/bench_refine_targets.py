"""refine_targets of four predictions (two views, two networks), blended with the labels."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case, with_compiled
from sanm_kernels import refine_targets


def case(B: int, K: int) -> Case:
    def make() -> tuple[list[Tensor], Tensor, Tensor]:
        logits = [torch.randn(B, K) for _ in range(4)]
        return logits, torch.randint(K, (B,)), torch.rand(B)

    run = {
        OURS: lambda x: [refine_targets(x[0], labels=x[1], clean_prob=x[2])],
        **with_compiled(baselines.refine_targets_torch, lambda f, x: [f(*x, 0.5)]),
    }
    read, written = 4 * 4 * B * K + 12 * B, 4 * B * K
    return Case("refine_targets", f"4 × ({B}, {K})", make, run, read, written)
