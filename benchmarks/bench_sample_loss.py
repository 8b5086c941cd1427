"""sample_loss, forward: the cross-entropy per sample that label quality is fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case, with_compiled
from sanm_kernels import sample_loss


def case(B: int, K: int) -> Case:
    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(B, K), torch.randint(K, (B,))

    run = {
        OURS: lambda x: [sample_loss(*x)],
        **with_compiled(baselines.sample_loss_torch, lambda f, x: [f(*x)]),
    }
    return Case("sample_loss", f"B={B} K={K}", make, run, 4 * B * K + 8 * B, written=4 * B)
