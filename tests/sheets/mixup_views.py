"""mixup_views."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from maker import DTYPES, INDICES, LAYOUTS, Maker
from torch import Tensor

import sanm_kernels as sk
from sheets import OURS, Case, Inputs, Operation, Sheet, with_compiled

LAM = 0.7


def _inputs(B: int = 3, H: int = 13, views: int = 4) -> Inputs:
    made = {f"view{i}": torch.rand(B, 3, H, H) for i in range(views)}
    return made | {"permutation": torch.randperm(views * B)}


def _run(x: Inputs, **options: Any) -> Inputs:
    views = [x[f"view{i}"] for i in range(4)]
    rows = 3 * len(views[0])
    return {"mixed": sk.mixup_views(views, LAM, x["permutation"], rows=rows, **options)}


def _run_on_device(x: Inputs, **options: Any) -> Inputs:
    """All rows of the views of a DivideMix step, with λ where the kernel runs."""
    views = [x[f"view{i}"] for i in range(12)]
    lam = torch.tensor(LAM, device=views[0].device)
    return {"mixed": sk.mixup_views(views, lam, x["permutation"], **options)}


def _random(m: Maker) -> None:
    sizes = [m.integer(0, 4) for _ in range(m.integer(1, 5))]
    shape = m.choice([(), (m.size(50, 30),), (m.size(50, 30), m.size(50, 30)), None, None, None])
    if shape is None:
        shape = m.choice([1, 3, 5]), m.size(40, 15), m.size(40, 15)
    if not m.small and m.chance(0.02):
        shape = (3, m.integer(170, 200), m.integer(170, 200))
    dtype, layout = [m.choice(DTYPES)], [m.choice(LAYOUTS)]
    views = [m.give(m.normal(b, *shape), dtype, grad=True, layouts=layout) for b in sizes]
    if m.chance(0.1):  # the same memory
        views, sizes = views[:1] * len(views), sizes[:1] * len(sizes)
    total, lam = sum(sizes), m.choice([0.0, 1.0, m.real(0, 1)])
    rows = m.integer(0, total)
    partner = m.permutation(total)
    if rows and m.spoiling:
        m.call.wrong, i = "permutation", m.integer(0, rows - 1)
        partner[i] = m.choice([-1, total] + [int(partner[:rows][i - 1])] * (rows > 1))
    m.call.inputs = {"views": views, "permutation": m.give(partner, INDICES)}
    m.call.run = lambda x, backend: sk.mixup_views(
        x["views"], lam, x["permutation"], rows=rows, backend=backend
    )
    m.call.same = ("result", "d ")


def _torch(views: Sequence[Tensor], lam: float, permutation: Tensor, rows: int) -> Tensor:
    """views (b_i, …) → (rows, …): concatenate, gather the partners, interpolate."""
    stacked = torch.cat(list(views))
    return torch.lerp(stacked[permutation[:rows]], stacked[:rows], lam)


def _case(views: int, B: int, C: int, H: int, rows: int) -> Case:
    total = views * B

    def make() -> tuple[list[Tensor], Tensor]:
        tensors = [torch.rand(B, C, H, H) for _ in range(views)]
        return tensors, torch.randperm(total)

    run = {
        OURS: lambda x: [sk.mixup_views(x[0], LAM, x[1], rows=rows)],
        **with_compiled(_torch, lambda f, x: [f(x[0], LAM, x[1], rows)]),
    }
    # Partners come from all rows: a share of those that are not mixed themselves is read too.
    size, needed = 4 * C * H * H, rows + (total - rows) * rows // total
    shape = f"{views} × ({B}, {C}, {H}, {H}) → {rows} rows"
    return Case("mixup_views", shape, make, run, size * needed + 8 * rows, size * rows, rows)


def _operation(make: Any, run: Any, count: int) -> Operation:
    views = tuple(f"view{i}" for i in range(count))
    return Operation("mixup_views", make, run, views, views, {"B": 64, "H": 32})


SHEET = Sheet(
    {"mixup_views": _operation(_inputs, _run, 4)},
    variants={
        "mixup_views, 12 views": _operation(
            functools.partial(_inputs, views=12), _run_on_device, 12
        )
    },
    random=_random,
    share=8,
    case=_case,
    shapes=[(12, 64, 3, 32, 768), (8, 32, 3, 224, 128)],  # views, B, C, H = W, rows
    headline=[(12, 64, 3, 32, 768), (8, 32, 3, 224, 128)],
    compiled=[{"B": 64, "H": 32}, {"B": 64, "H": 224}],
)
