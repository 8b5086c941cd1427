"""Guessed and refined targets (section 7.2): mean of softmaxes, label blended in, sharpened."""

from __future__ import annotations

import torch
from torch import Tensor

from sanm_kernels.reference import checks
from sanm_kernels.reference.precision import accumulate_dtype, numbers


def check(logits: list[Tensor], labels: Tensor | None, clean_prob: Tensor | None) -> None:
    """Values of the arguments, where values are checked (`checks.enabled`)."""
    if labels is not None and labels.is_floating_point():
        checks.unit_interval(labels.to(accumulate_dtype(logits[0])), "labels")
    elif labels is not None:
        checks.indices(labels, logits[0].shape[1], "labels")
    if clean_prob is not None:  # as it is used
        checks.unit_interval(clean_prob.to(accumulate_dtype(logits[0])), "clean_prob")


def forward(
    logits: list[Tensor], labels: Tensor | None, clean_prob: Tensor | None, exponent: Tensor
) -> Tensor:
    """Targets (B, K) in float32 (float64 for float64 logits).

    logits: (B, K) each; labels (B,) int64 or (B, K) floats with clean_prob (B,), or neither;
    exponent (1,) float64 on the CPU or the logits' device: 1/T.
    """
    check(logits, labels, clean_prob)
    K = logits[0].shape[1]
    dtype = accumulate_dtype(logits[0])
    p = torch.stack([torch.softmax(z.to(dtype), 1) for z in logits]).sum(0) / len(logits)
    if labels is not None and clean_prob is not None:
        if not labels.is_floating_point():
            labels = torch.nn.functional.one_hot(labels, K)
        q = clean_prob.to(dtype)[:, None]
        p = q * labels.to(dtype) + (1 - q) * p
    # the largest becomes 1 before the power, so the sum cannot vanish
    sharp = (p / p.amax(1, keepdim=True)) ** numbers(exponent)[0]
    return (sharp / sharp.sum(1, keepdim=True)).contiguous()
