"""reconstruction_loss: squared error of the rebuilt views, differentiable in the reconstruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanm_kernels.ops.base import Overloads, define
from sanm_kernels.reference import reconstruction_loss as reference
from sanm_kernels.reference.mixup_views import memory_format
from sanm_kernels.reference.precision import accumulate_dtype


def _fake(reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(reconstruction)
    return reconstruction.new_empty((), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ops: Overloads, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return ops.reconstruction_loss_backward(grad, *ctx.saved_tensors), None, None


define(
    "reconstruction_loss",
    "(Tensor reconstruction, Tensor images, Tensor? boxes) -> Tensor",
    reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    check=lambda reconstruction, images, boxes: reference.check(boxes, *images.shape[2:]),
)
define(
    "reconstruction_loss_backward",
    "(Tensor grad, Tensor reconstruction, Tensor images, Tensor? boxes) -> Tensor",
    reference.backward,
    fake=lambda grad, reconstruction, images, boxes: torch.empty_like(
        reconstruction, memory_format=memory_format([reconstruction])
    ),
)
