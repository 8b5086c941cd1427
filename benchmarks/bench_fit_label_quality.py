"""fit_label_quality against scikit-learn's mixture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case
from sanm_kernels import fit_label_quality


def cases() -> Iterator[Case]:
    for shape in SHAPES["fit_label_quality"]:
        yield case(*shape)


def case(N: int) -> Case:
    def make(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        wrong = torch.rand(N, generator=g) < 0.4
        spread = torch.randn(N, generator=g)
        return torch.where(wrong, 4 + spread, 0.3 * spread.exp())

    def agree(a: list[Tensor], b: list[Tensor]) -> None:
        torch.testing.assert_close(a[0].double(), b[0].double(), rtol=0, atol=1e-4)

    run = {
        OURS: lambda x: [fit_label_quality(x).clean_prob],
        "scikit-learn": lambda x: [baselines.fit_label_quality_sklearn(x)],
    }
    return Case("fit_label_quality", f"N={N}", make, run, agree=agree, read=4 * N, written=4 * N)
