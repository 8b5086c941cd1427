"""mixup_views, forward: the mixed batch without concatenating the views."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case, with_compiled
from sanm_kernels import mixup_views

LAM = 0.7


def cases() -> Iterator[Case]:
    for shape in SHAPES["mixup_views"]:
        yield case(*shape)


def case(count: int, B: int, C: int, H: int, rows: int) -> Case:
    def make(seed: int) -> tuple[list[Tensor], Tensor]:
        g = torch.Generator().manual_seed(seed)
        views = [torch.rand(B, C, H, H, generator=g) for _ in range(count)]
        return views, torch.randperm(count * B, generator=g)

    run = {
        OURS: lambda x: [mixup_views(x[0], LAM, x[1], rows=rows)],
        **with_compiled(baselines.mixup_views_torch, lambda f, x: [f(x[0], LAM, x[1], rows)]),
    }
    row = 4 * C * H * H
    # Partners come from all views: of the rows that are not mixed themselves a share is read too.
    read = rows + (count * B - rows) * rows // (count * B)
    return Case("mixup_views", f"{count} × ({B}, {C}, {H}, {H}), {rows} rows", make, run,
                read=row * read + 8 * rows, written=row * rows)
