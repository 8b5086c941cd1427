"""masked_loss: the whole training loss on rows of logits, differentiable in the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanm_kernels.ops.base import Overloads, define
from sanm_kernels.reference import masked_loss as reference
from sanm_kernels.reference.precision import accumulate_dtype


def empty_outputs(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """The operator's outputs, not filled."""
    n, K = logits.shape
    dtype = accumulate_dtype(logits)
    shapes: list[tuple[Any, ...]] = [(), (), (), (), (), (n,), (n, 2), (K,)]
    counts = logits.new_empty(2, dtype=torch.int64)
    return (*(logits.new_empty(shape, dtype=dtype) for shape in shapes), counts)


def _check(
    logits: Tensor,
    targets: Tensor,
    ratio: Tensor | None,
    permutation: Tensor | None,
    prior: Tensor | None,
    *settings: Any,
) -> None:
    reference.check(logits, targets, ratio, permutation, prior, ignore_index=settings[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, num_labeled, clamp, ignore_index, mean = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[6:])
    ctx.save_for_backward(*tensors, *output[6:])
    ctx.arguments = (num_labeled, clamp, ignore_index, mean)


def _backward(ops: Overloads, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    gradient = ops.masked_loss_backward(*grads[:6], *ctx.saved_tensors, *ctx.arguments)
    return (gradient, *[None] * 9)


INPUTS = (
    "Tensor logits, Tensor targets, Tensor? ratio, Tensor? permutation, Tensor? prior, "
    "Tensor scalars, "
)
SETTINGS = "SymInt num_labeled, bool clamp, int ignore_index, bool mean"

define(
    "masked_loss",
    f"({INPUTS}{SETTINGS}) -> (Tensor total, Tensor labeled, Tensor unlabeled, "
    "Tensor prior_penalty, Tensor confidence, Tensor per_sample, Tensor normalizer, Tensor p_mean, "
    "Tensor counts)",
    reference.forward,
    fake=empty_outputs,
    setup_context=_setup_context,
    backward=_backward,
    results=6,
    check=_check,
)
define(
    "masked_loss_backward",
    "(Tensor? grad_total, Tensor? grad_labeled, Tensor? grad_unlabeled, Tensor? grad_prior, "
    "Tensor? grad_confidence, Tensor? grad_per_sample, "
    f"{INPUTS}Tensor normalizer, Tensor p_mean, Tensor counts, {SETTINGS}) -> Tensor",
    reference.backward,
    fake=lambda *args: torch.empty_like(args[6], memory_format=torch.contiguous_format),
)
