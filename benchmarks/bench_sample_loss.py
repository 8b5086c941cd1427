"""sample_loss, forward: the cross-entropy per sample that label quality is fitted to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case, with_compiled
from sanm_kernels import sample_loss


def cases() -> Iterator[Case]:
    for shape in SHAPES["sample_loss"]:
        yield case(*shape)


def case(B: int, K: int) -> Case:
    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(B, K, generator=g), torch.randint(K, (B,), generator=g)

    run = {
        OURS: lambda x: [sample_loss(*x)],
        **with_compiled(baselines.sample_loss_torch, lambda f, x: [f(*x)]),
    }
    return Case("sample_loss", f"B={B} K={K}", make, run, read=4 * B * K + 8 * B, written=4 * B)
