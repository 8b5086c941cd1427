"""fit_label_quality against scikit-learn's mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case
from sanm_kernels import fit_label_quality


def case(N: int) -> Case:
    def make() -> Tensor:
        wrong = torch.rand(N) < 0.4
        spread = torch.randn(N)
        return torch.where(wrong, 4 + spread, 0.3 * spread.exp())

    def agree(a: list[Tensor], b: list[Tensor]) -> None:
        torch.testing.assert_close(a[0].double(), b[0].double(), rtol=0, atol=1e-4)

    run = {
        OURS: lambda x: [fit_label_quality(x).clean_prob],
        "scikit-learn": lambda x: [baselines.fit_label_quality_sklearn(x)],
    }
    return Case("fit_label_quality", f"N={N}", make, run, 4 * N, 4 * N, agree)
