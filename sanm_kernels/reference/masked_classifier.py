"""The one-pass classifier (section 5): what a box leaves visible, pooled, classified and scored."""

from __future__ import annotations

import torch
from torch import Tensor

from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype


def forward(
    features: Tensor,
    box: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = Σ v·F / Σ v, logits = z·Wᵀ + bias, loss = −Σ t·log softmax / B.

    features (B, C, h, w), box (B, 4) in pixels of (height, width), targets (B, K), weight (K, C),
    bias (K,) → logits (B, K), loss (), z (B, C), v / Σ v (B, h, w).
    """
    batch, _, h, w = features.shape
    dtype = accumulate_dtype(features)
    visible = visibility(box, h, w, height, width, dtype)
    pooled = torch.einsum("bchw,bhw->bc", features.to(dtype), visible)
    logits = pooled @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    rows = -(targets.to(dtype) * torch.log_softmax(logits, 1)).sum(1)
    return logits, rows.sum() / max(batch, 1), pooled, visible


def visibility(box: Tensor, h: int, w: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """v / Σv (B, h, w): v is the share of a cell's area, in image coordinates, outside the box.

    All zeros where nothing is visible.
    """
    box = box.to(dtype)

    def overlap(low: Tensor, high: Tensor, cells: int, size: int) -> Tensor:  # (B,) → (B, cells)
        edges = torch.arange(cells + 1, dtype=dtype, device=box.device) * (size / cells)
        hidden = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
        return hidden.clamp(min=0) / (size / cells)

    rows = overlap(box[:, 0], box[:, 2], h, height)
    columns = overlap(box[:, 1], box[:, 3], w, width)
    v = (1 - rows[:, :, None] * columns[:, None, :]).clamp(min=0)
    total = v.sum((1, 2), keepdim=True)
    return torch.where(total > 0, v / total, torch.zeros_like(v))


def backward(
    grad_logits: Tensor | None,
    grad_loss: Tensor | None,
    features: Tensor,
    weight: Tensor,
    logits: Tensor,
    targets: Tensor,
    pooled: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features (B, C, h, w), weight (K, C) and bias (K,) in the one-pass mode.

    dlogits = (softmax·Σt' − t')·grad_loss/B + grad_logits; dz = dlogits·W; dF = dz ⊗ v/Σv.
    """
    d = torch.zeros_like(logits)
    if grad_loss is not None:
        t = targets.to(logits.dtype)
        residual = torch.softmax(logits, 1) * t.sum(1, keepdim=True) - t
        d = residual * (grad_loss / max(logits.shape[0], 1))
    if grad_logits is not None:
        d = d + grad_logits
    dz = d @ weight.to(d.dtype)
    df = dz[:, :, None, None] * visible[:, None]
    if is_channels_last(features):
        df = df.contiguous(memory_format=torch.channels_last)
    return df.to(features.dtype), (d.T @ pooled).to(weight.dtype), d.sum(0)
