"""fit_label_quality: the clean probability of every sample from its loss; not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sanm_kernels.ops.base import define
from sanm_kernels.reference import fit_label_quality as reference
from sanm_kernels.reference.precision import accumulate_dtype


def _fake(
    losses: Tensor,
    history: Tensor | None,
    uniforms: list[float],
    max_iter: int,
    tol: float,
    reg_covar: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(losses)
    return (
        losses.new_empty(losses.shape[0], dtype=dtype),
        *(losses.new_empty(2, dtype=torch.float64) for _ in range(3)),
        losses.new_empty((), dtype=torch.int64),
        losses.new_empty((), dtype=torch.bool),
        losses.new_empty((), dtype=torch.bool),
    )


define(
    "fit_label_quality",
    "(Tensor losses, Tensor? history, float[] uniforms, int max_iter, float tol, float reg_covar, "
    "bool normalize) -> (Tensor clean_prob, Tensor means, Tensor variances, Tensor weights, "
    "Tensor n_iter, Tensor converged, Tensor degenerate)",
    reference.forward,
    fake=_fake,
    check=lambda losses, history, *settings: reference.check(losses, history),
)
