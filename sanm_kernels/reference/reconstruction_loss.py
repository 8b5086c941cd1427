"""Reconstruction loss (section 5): Σ over the views of the mean squared error to the image."""

from __future__ import annotations

import torch
from torch import Tensor

from sanm_kernels.reference import checks
from sanm_kernels.reference.mixup_views import memory_format
from sanm_kernels.reference.precision import accumulate_dtype


def _views(reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as (V, B, C, H, W) and (B, C, H, W) in the type that sums are taken in."""
    dtype = accumulate_dtype(reconstruction)
    views = len(reconstruction) // max(len(images), 1) if boxes is None else len(boxes)
    return reconstruction.reshape(views, *images.shape).to(dtype), images.to(dtype)


def check(boxes: Tensor | None, H: int, W: int) -> None:
    """Every box (…, 4) = y0, x0, y1, x1 lies inside the image and does not end before it starts."""
    if boxes is not None and checks.enabled(boxes):
        y0, x0, y1, x1 = boxes.unbind(-1)
        ok = (y0 >= 0) & (y0 <= y1) & (y1 <= H) & (x0 >= 0) & (x0 <= x1) & (x1 <= W)
        if not bool(ok.all()):
            first = [int(i) for i in (~ok).nonzero()[0]]
            raise ValueError(
                f"boxes: expected 0 ≤ y0 ≤ y1 ≤ {H} and 0 ≤ x0 ≤ x1 ≤ {W}, "
                f"got {boxes[tuple(first)].tolist()} at index {first}"
            )


def _hidden(boxes: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """For (V, B, C, H, W): which elements count (broadcastable), and how many in each view (V,)."""
    V, B, C, H, W = shape
    if boxes is None:
        return torch.ones((), dtype=torch.bool), torch.full((V,), B * C * H * W)
    y0, x0, y1, x1 = boxes[..., None].unbind(2)
    y, x = torch.arange(H, device=boxes.device), torch.arange(W, device=boxes.device)
    inside_y, inside_x = (y0 <= y) & (y < y1), (x0 <= x) & (x < x1)
    area = inside_y.sum(2) * inside_x.sum(2)
    mask = inside_y[:, :, None, :, None] & inside_x[:, :, None, None, :]
    return mask, area.sum(1) * C


def forward(reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> Tensor:
    """The loss (), in float32 (float64 for a float64 reconstruction).

    reconstruction (V·B, C, H, W), views stacked in order; images (B, C, H, W); boxes (V, B, 4)
    int64 y0, x0, y1, x1 half open: only the elements inside count, or None: all do.
    """
    check(boxes, *images.shape[2:])
    r, x = _views(reconstruction, images, boxes)
    mask, count = _hidden(boxes, r.shape)
    square = torch.where(mask.to(r.device), (r - x).square(), 0)
    return (square.sum((1, 2, 3, 4)) / count.to(r.device).clamp(min=1)).sum()


def backward(grad: Tensor, reconstruction: Tensor, images: Tensor, boxes: Tensor | None) -> Tensor:
    """dL/dr = grad·(2/count_v)·(r − x) where it counts, else 0.

    In the dtype of `reconstruction`; channels_last if that is, else contiguous.
    """
    r, x = _views(reconstruction, images, boxes)
    mask, count = _hidden(boxes, r.shape)
    scale = (2 * grad / count.to(r.device).clamp(min=1)).view(-1, 1, 1, 1, 1)
    result = torch.where(mask.to(r.device), scale * (r - x), 0).reshape(reconstruction.shape)
    kind = memory_format([reconstruction])
    return torch.empty_like(reconstruction, memory_format=kind).copy_(result)
