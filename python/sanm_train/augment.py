"""Batched image augmentations in plain torch: one call transforms the whole batch, on its device.

Images are (B, C, H, W) in [0, 1]; every result is normalised with the data set's mean and standard
deviation. Empty space is filled with the data set's background.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Augment:
    """Weak and strong augmentation.

    Args:
        mean, std: per channel (C,).
        flip: mirror images left to right half of the time (not for digits or text).
        background: value of the pixels that move in from outside the image.
        generator: source of all draws.
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        *,
        flip: bool = False,
        background: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        self.flip, self.background, self.generator = flip, background, generator

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def denormalize(self, images: Tensor) -> Tensor:
        return images * self.std + self.mean

    def weak(self, images: Tensor) -> Tensor:
        """Shift by up to an eighth of the image, then perhaps flip."""
        batch, _, height, width = images.shape
        reach = max(1, round(max(height, width) / 8))
        padded = F.pad(images, [reach] * 4, value=self.background)
        shift = torch.randint(2 * reach + 1, (2, batch, 1), generator=self.generator)
        rows = shift[0] + torch.arange(height)
        columns = shift[1] + torch.arange(width)
        if self.flip:
            columns = torch.where(self._uniform(batch, 1) < 0.5, columns.flip(1), columns)
        sample = torch.arange(batch)[:, None, None]
        moved = padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return self.normalize(moved.contiguous())

    def strong(self, images: Tensor) -> Tensor:
        """Rotate (±15°), scale (±15 %), shear (±0.15), shift (±1/8), contrast (±30 %), flip."""
        batch = len(images)
        angle, scale, shear, right, down, gain, mirror = self._uniform(7, batch).mul(2).sub(1)
        angle, scale, shear = angle * math.radians(15), 1 + 0.15 * scale, 0.15 * shear
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = [cos, shear * cos - sin, right / 4, sin, shear * sin + cos, down / 4]
        matrix = torch.stack(rows, 1).view(batch, 2, 3)
        if self.flip:
            matrix[:, 0] = torch.where(mirror[:, None] < 0, -matrix[:, 0], matrix[:, 0])
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False).to(images.dtype)
        moved = F.grid_sample(images - self.background, grid, align_corners=False)
        return self.normalize(moved * (1 + 0.3 * gain[:, None, None, None]) + self.background)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)
