"""sample_loss: per-sample cross-entropy, differentiable in the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanm_kernels.ops.base import Overloads, define
from sanm_kernels.reference import sample_loss as reference
from sanm_kernels.reference.precision import accumulate_dtype


def _fake(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(logits)
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((rows, 2), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _backward(ops: Overloads, ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
    logits, labels, normalizer = ctx.saved_tensors
    return ops.sample_loss_backward(grad, logits, labels, normalizer), None


define(
    "sample_loss",
    "(Tensor logits, Tensor labels) -> (Tensor loss, Tensor normalizer)",
    reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    results=1,
    check=reference.check,
)
define(
    "sample_loss_backward",
    "(Tensor grad, Tensor logits, Tensor labels, Tensor normalizer) -> Tensor",
    reference.backward,
    fake=lambda grad, logits, labels, normalizer: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
)
