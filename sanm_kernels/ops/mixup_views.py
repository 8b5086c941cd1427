"""mixup_views: rows of several views mixed by a permutation, differentiable in the views."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanm_kernels.ops.base import Overloads, define
from sanm_kernels.reference import mixup_views as reference


def _fake(views: list[Tensor], lam: Tensor, permutation: Tensor, rows: int) -> Tensor:
    return torch.empty(
        (rows, *views[0].shape[1:]),
        dtype=views[0].dtype,
        device=views[0].device,
        memory_format=reference.memory_format(views),
    )


def _fake_backward(
    grad: Tensor, lam: Tensor, permutation: Tensor, sizes: list[int]
) -> list[Tensor]:
    kind = reference.memory_format([grad])
    return [
        torch.empty((b, *grad.shape[1:]), dtype=grad.dtype, device=grad.device, memory_format=kind)
        for b in sizes
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    views, lam, permutation, _ = inputs
    ctx.save_for_backward(lam, permutation)
    ctx.sizes = [v.shape[0] for v in views]


def _backward(ops: Overloads, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return ops.mixup_views_backward(grad, *ctx.saved_tensors, ctx.sizes), None, None, None


define(
    "mixup_views",
    "(Tensor[] views, Tensor lam, Tensor permutation, SymInt rows) -> Tensor",
    reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    check=lambda views, lam, permutation, rows: reference.check(
        permutation, sum(len(v) for v in views), rows
    ),
)
define(
    "mixup_views_backward",
    "(Tensor grad, Tensor lam, Tensor permutation, SymInt[] sizes) -> Tensor[]",
    reference.backward,
    fake=_fake_backward,
)
