"""refine_targets: guessed and sharpened targets; not differentiable."""

from __future__ import annotations

from torch import Tensor

from sanm_kernels.ops.base import define
from sanm_kernels.reference import refine_targets as reference
from sanm_kernels.reference.precision import accumulate_dtype


def _fake(
    logits: list[Tensor], labels: Tensor | None, clean_prob: Tensor | None, exponent: Tensor
) -> Tensor:
    dtype = accumulate_dtype(logits[0])
    return logits[0].new_empty(logits[0].shape, dtype=dtype)


define(
    "refine_targets",
    "(Tensor[] logits, Tensor? labels, Tensor? clean_prob, Tensor exponent) -> Tensor",
    reference.forward,
    fake=_fake,
    check=lambda logits, labels, clean_prob, exponent: reference.check(logits, labels, clean_prob),
)
