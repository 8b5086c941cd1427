"""masked_classifier: logits and loss of what a box leaves visible, the one-pass mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanm_kernels.ops.base import Overloads, define
from sanm_kernels.reference import masked_classifier as reference
from sanm_kernels.reference.mixup_views import memory_format
from sanm_kernels.reference.precision import accumulate_dtype


def empty_outputs(
    features: Tensor,
    box: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, ...]:
    """The operator's outputs, not filled."""
    batch, channels, h, w = features.shape
    shapes: list[tuple[int, ...]] = [(batch, weight.shape[0]), (), (batch, channels), (batch, h, w)]
    return tuple(features.new_empty(shape, dtype=accumulate_dtype(features)) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    features, _, targets, weight, bias, *_ = inputs
    logits, _, pooled, visible = output
    ctx.mark_non_differentiable(pooled, visible)
    ctx.save_for_backward(features, weight, logits, targets, pooled, visible)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ops: Overloads, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    features, weight, bias = ops.masked_classifier_backward(*grads[:2], *ctx.saved_tensors)
    bias = None if ctx.bias_dtype is None else bias.to(ctx.bias_dtype)
    return features, None, None, weight, bias, None, None


define(
    "masked_classifier",
    "(Tensor features, Tensor box, Tensor targets, Tensor weight, Tensor? bias, SymInt height, "
    "SymInt width) -> (Tensor logits, Tensor loss, Tensor pooled, Tensor visible)",
    reference.forward,
    fake=empty_outputs,
    setup_context=_setup_context,
    backward=_backward,
    wrt=(0, 3, 4),
    results=2,
)
define(
    "masked_classifier_backward",
    "(Tensor? grad_logits, Tensor? grad_loss, Tensor features, Tensor weight, Tensor logits, "
    "Tensor targets, Tensor pooled, Tensor visible) -> (Tensor, Tensor, Tensor)",
    reference.backward,
    fake=lambda grad_logits, grad_loss, features, weight, logits, targets, pooled, visible: (
        torch.empty_like(features, memory_format=memory_format([features])),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        logits.new_empty(logits.shape[1:]),
    ),
)
