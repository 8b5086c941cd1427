"""Sections 2 to 5 of the method: ratio, box, masked views and targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sanm_kernels.reference import activation, checks, draws
from sanm_kernels.reference.modulation import modulate
from sanm_kernels.reference.precision import accumulate_dtype

CONSTANT, UNIFORM, MEAN, PIXEL = range(4)  # codes of MaskConfig.fill


class Settings(NamedTuple):
    """What the kernels know of a MaskConfig; the operators take it as one list of floats."""

    views: int  # 1: max, 2: min, 3: both
    shared: bool  # the views share one draw of area and aspect
    centered: bool  # box centred on the peak, else the peak is its top-left corner
    quantize: bool
    clamp: bool  # label drop limited to t[j*]
    fill: int
    area_scale: float
    ratio_low: float
    ratio_high: float
    ratio_gamma: float
    aspect_low: float
    aspect_high: float
    fill_value: Sequence[float]  # one, or one per channel

    def numbers(self) -> list[float]:
        return [*map(float, self[:-1]), *self.fill_value]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Settings:
        views, *flags, fill = numbers[:6]
        return cls._make(
            (int(views), *map(bool, flags), int(fill), *numbers[6:12], list(numbers[12:]))
        )

    @property
    def view_count(self) -> int:
        return 2 if self.views == 3 else 1

    @property
    def draw_sets(self) -> int:
        return 1 if self.shared else self.view_count


def activation_stats(
    features: Tensor, height: int, width: int, quantize: bool
) -> tuple[Tensor, Tensor]:
    """features (B, C, h, w) → statistics (5, B) and peak and trough (2, B, 2) int32."""
    e = activation.energy(features)
    return activation.statistics(e), activation.locate(e, height, width, quantize)


def forward(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    draws_: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
    images: Tensor | None,
    height: int,
    width: int,
    num_classes: int,
    settings: list[float],
) -> tuple[Tensor, ...]:
    """All of `masked_forward`; shapes and outputs as in `ops/masked_forward.py`."""
    s = Settings.of(settings)
    check(targets, clean_prob, draws_, num_classes)

    e = activation.energy(features)
    stats = activation.statistics(e)
    positions = activation.locate(e, height, width, s.quantize)

    channels = 0 if images is None else images.shape[1]
    batch = features.shape[0]
    index = torch.arange(batch, device=features.device) if sample_index is None else sample_index
    if draws_ is None:
        assert seed is not None
        count = 2 * s.draw_sets + (s.view_count * channels if s.fill == UNIFORM else 0)
        draws_ = draws.uniforms(count, index, seed)
    ratio, boxes = place(positions, clean_prob, draws_, height, width, s)

    if not targets.is_floating_point():
        targets = torch.nn.functional.one_hot(targets, num_classes).float()
    new_targets = torch.stack([modulate(targets, r, s.clamp) for r in ratio])

    views = features.new_empty(0)
    if images is not None:
        views = mask(images, boxes, draws_, seed, index, s)

    return stats, positions, ratio, boxes, new_targets, views


def check(targets: Tensor, clean_prob: Tensor, draws_: Tensor | None, num_classes: int) -> None:
    """The values of masked_forward's arguments, where values are checked."""
    checks.unit_interval(clean_prob, "clean_prob")
    if draws_ is not None:
        checks.unit_interval(draws_, "draws", open_end=True)
    if targets.is_floating_point():
        checks.finite(targets, "targets")
    else:
        checks.indices(targets, num_classes, "targets")


def place(
    positions: Tensor, clean_prob: Tensor, draws_: Tensor, height: int, width: int, s: Settings
) -> tuple[Tensor, Tensor]:
    """Section 2: ratios (draw sets, B) float32 and boxes (views, B, 4) int32.

    positions (2, B, 2), clean_prob (B,) float32, draws (B, D) float64. Draws are float64, all that
    follows float32 with each step rounded, but the root, which is float64's.
    """
    device = draws_.device
    limit = torch.tensor([height, width], device=device)
    ratios, sizes = [], []
    for k in range(s.draw_sets):
        area_draw, aspect_draw = draws_[:, 2 * k], draws_[:, 2 * k + 1]
        a = (s.ratio_low + (s.ratio_high - s.ratio_low) * area_draw).float()
        aspect = (s.aspect_low + (s.aspect_high - s.aspect_low) * aspect_draw).float()
        gamma = torch.tensor(s.ratio_gamma, dtype=torch.float32, device=device)
        ratio = a + gamma * (1 - clean_prob)
        area = ratio * float(height * width) * s.area_scale
        sides = torch.stack([area * aspect, area / aspect], -1)
        size = sides.double().sqrt().round().long()
        ratios.append(ratio)
        sizes.append(torch.minimum(size.clamp(min=1), limit))
    kinds = [k for k in (0, 1) if s.views >> k & 1]  # 0: at the peak, 1: at the trough
    boxes = []
    for view, kind in enumerate(kinds):
        size = sizes[0 if s.shared else view]
        corner = positions[kind].long()
        if s.centered:
            corner = corner - size // 2
        corner = torch.minimum(corner.clamp(min=0), limit - size)
        boxes.append(torch.cat([corner, corner + size], 1).int())
    return torch.stack(ratios), torch.stack(boxes)


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """Which pixels a half-open box (B, 4) holds: (B, 1, H, W) bool."""
    y = torch.arange(height, device=box.device)
    x = torch.arange(width, device=box.device)
    rows = (y >= box[:, 0, None]) & (y < box[:, 2, None])
    columns = (x >= box[:, 1, None]) & (x < box[:, 3, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def mask(
    images: Tensor, boxes: Tensor, draws_: Tensor, seed: Tensor | None, index: Tensor, s: Settings
) -> Tensor:
    """Section 3: the views of images (B, C, H, W) stacked as (views·B, C, H, W).

    Fills are computed in float64, then rounded to float32 and to the images' dtype (for float64
    images not rounded). channels_last stays channels_last; all else becomes contiguous.
    """
    channels, height, width = images.shape[1:]
    channels_last = is_channels_last(images)
    views = []
    for view, box in enumerate(boxes):
        kind = view if s.views == 3 else s.views - 1
        if s.fill == CONSTANT:
            fill = torch.tensor(s.fill_value, dtype=torch.float64, device=images.device)
            fill = fill.view(1, -1, 1, 1)
        elif s.fill == UNIFORM:
            first = 2 * s.draw_sets + view * channels
            fill = draws_[:, first : first + channels, None, None]
        elif s.fill == MEAN:
            fill = images.double().mean((2, 3), keepdim=True)
        else:
            assert seed is not None
            fill = draws.normals(channels * height * width, 1 + kind, index, seed)
            fill = fill.view(images.shape)
        if images.dtype != torch.float64:
            fill = fill.float()
        views.append(torch.where(inside(box, height, width), fill.to(images.dtype), images))
    result = torch.cat(views)
    return result.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor is stored channels last; one that is both ways counts as contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def modulate_backward(grad: Tensor, targets: Tensor, ratio: Tensor, clamp: bool) -> Tensor:
    """Gradient of the targets (B, K) from that of the modulated ones (draw sets, B, K).

    t' differs from t by constants, except where the drop is t[j*] itself: there t'[j*] is 0 and
    every other target holds t[j*]/(K − 1).
    """
    dtype = accumulate_dtype(targets)
    g = grad.to(dtype)
    top, j = targets.max(1, keepdim=True)
    j = _first_maximum(targets) if targets.shape[0] else j
    total = torch.zeros(targets.shape, dtype=dtype, device=targets.device)
    for gv, r in zip(g, ratio, strict=True):
        own = gv.gather(1, j)
        others = (gv.sum(1, keepdim=True) - own) / (targets.shape[1] - 1)
        emptied = clamp & (top.to(dtype) < r[:, None])
        total = total + gv + torch.zeros_like(gv).scatter(1, j, (others - own) * emptied)
    return total.to(targets.dtype)


def _first_maximum(x: Tensor) -> Tensor:
    order = torch.arange(x.shape[1], device=x.device).expand_as(x)
    return torch.where(x == x.amax(1, keepdim=True), order, x.shape[1]).amin(1, keepdim=True)


def masked_views_backward(grad: Tensor, boxes: Tensor, mean_fill: bool) -> Tensor:
    """Gradient of the images (B, C, H, W) from that of the views (views·B, C, H, W).

    A pixel outside a box passes its gradient on; with the mean fill, each pixel of a channel also
    gets 1/(H·W) of what arrives inside the box.
    """
    height, width = grad.shape[2:]
    total = torch.zeros_like(grad[: boxes.shape[1]], dtype=accumulate_dtype(grad))
    for g, box in zip(grad.view(boxes.shape[0], -1, *grad.shape[1:]), boxes, strict=True):
        hidden = inside(box, height, width)
        total = total + torch.where(hidden, 0, g)
        if mean_fill:
            total = total + torch.where(hidden, g, 0).to(total.dtype).sum((2, 3), keepdim=True) / (
                height * width
            )
    return total.to(grad.dtype)
