"""Per-sample cross-entropy (section 6 of the method): l_i = −log softmax(z_i)[y_i]."""

from __future__ import annotations

import torch
from torch import Tensor

from sanm_kernels.reference import checks


def check(logits: Tensor, labels: Tensor) -> None:
    """The values of sample_loss's arguments, where values are checked."""
    checks.indices(labels, logits.shape[1], "labels")


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (B,), and the rows' (max, log-sum of exp(z − max)) (B, 2) for backward.

    logits (B, K); labels (B,) int64 in [0, K). In float32 (float64 for float64 logits). Maximum and
    log-sum are kept apart: their rounded sum would cost large logits their digits.
    """
    check(logits, labels)
    z = logits if logits.dtype == torch.float64 else logits.float()
    top = z.amax(1, keepdim=True)
    log_sum = (z - top).exp().sum(1, keepdim=True).log()
    loss = log_sum - (z.gather(1, labels[:, None]) - top)
    return loss[:, 0], torch.cat([top, log_sum], 1)


def backward(grad: Tensor, logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    """dl_i/dz_ik = p_ik − [k = y_i], times grad (B,); the result has the dtype of `logits`."""
    z = logits.to(normalizer.dtype)
    p = torch.exp(z - normalizer[:, :1] - normalizer[:, 1:])
    p = p.scatter_add(1, labels[:, None], torch.full_like(p[:, :1], -1.0))
    return (p * grad[:, None]).to(logits.dtype).contiguous()
