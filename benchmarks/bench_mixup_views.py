"""mixup_views, forward: the mixed batch without concatenating the views."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case, with_compiled
from sanm_kernels import mixup_views

LAM = 0.7


def case(views: int, B: int, C: int, H: int, rows: int) -> Case:
    total = views * B

    def make() -> tuple[list[Tensor], Tensor]:
        tensors = [torch.rand(B, C, H, H) for _ in range(views)]
        return tensors, torch.randperm(total)

    run = {
        OURS: lambda x: [mixup_views(x[0], LAM, x[1], rows=rows)],
        **with_compiled(baselines.mixup_views_torch, lambda f, x: [f(x[0], LAM, x[1], rows)]),
    }
    # Partners come from all rows: a share of those that are not mixed themselves is read too.
    size, needed = 4 * C * H * H, rows + (total - rows) * rows // total
    shape = f"{views} × ({B}, {C}, {H}, {H}) → {rows} rows"
    return Case("mixup_views", shape, make, run, size * needed + 8 * rows, size * rows)
