"""Batched image augmentations, for whole batches on their device.

Images are (B, C, H, W) in [0, 1]. Each sample has draws of its own, all from torch's global random
state on the CPU: `torch.manual_seed` repeats them on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .extra import extra
from .registry import Registry

GREY = 0.5  # what moves into view in the published policies


class Policy(NamedTuple):
    """crop: False leaves every view as `plain` is; flip: mirror half of the images; auto: the
    AutoAugment policy of `auto`, if any; affine: `strong` is a small affine map and a change of
    contrast, else weak, then RandAugment(2, 10); released: `strong` and `warmup` as SANM's released
    CIFAR scripts have them."""

    crop: bool = True
    flip: bool = True
    auto: str = ""
    affine: bool = False
    released: bool = False


POLICIES: Registry[Policy] = Registry("augmentation")
POLICIES["none"] = Policy(crop=False)
POLICIES["digits"] = Policy(flip=False, affine=True)
POLICIES["crop"] = Policy()
POLICIES["shift"] = Policy(flip=False)
POLICIES["cifar"] = Policy(auto="cifar10")
POLICIES["released"] = Policy(auto="cifar10", released=True)
POLICIES["photos"] = Policy()
POLICIES["photos-auto"] = Policy(auto="imagenet")


def _view(make: Callable[[Augment, Tensor], Tensor]) -> Callable[[Augment, Tensor], Tensor]:
    """The images that `make` returns, normalised; without gradients, and in float32: autocast would
    round the places that pixels are taken from."""

    @wraps(make)
    @torch.no_grad()
    def view(self: Augment, images: Tensor) -> Tensor:
        if images.shape[2] < self.image_size[0] or images.shape[3] < self.image_size[1]:
            raise ValueError(
                f"images must be at least as large as image_size {self.image_size}, got "
                f"{tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return (make(self, images) - self.mean) / self.std

    return view


class Augment:
    """The views of a training step, by policy: `weak`, `auto`, `strong` and, before label quality
    counts, `warmup`; `plain` for evaluation.

    Every view takes images (B, C, H, W) in [0, 1] and returns them as (B, C, *image_size),
    normalised. weak: a random crop, out of the image where it is larger than image_size, else after
    padding it by an eighth with zeros, and perhaps a flip. auto: weak, then AutoAugment. strong:
    weak, then RandAugment(2, 10), or for digits a small affine map and a change of contrast.
    warmup: weak.

    The policy `released` has the released scripts' own strong and warmup. strong: each of two
    operations on half of the images only, at 1 to 9 tenths of its strength, then a grey square of
    half the sides. warmup: colour jitter and a small affine map after weak; how strong they are is
    not published, so the jitter is torchvision's usual one (0.4, hue 0.1), the map up to 10° and a
    tenth of the sides and of the scale.

    Values stay in [0, 1] before they are normalised, but for that contrast.

    kornia's own AutoAugment and RandAugment draw one sub-policy for the whole batch, always in the
    same direction, and shear by up to 54°. So only its operations and tables are used: each sample
    draws its sub-policy, and each operation runs once on the samples that drew it. Magnitudes are
    the published ones.

    Args:
        policy: a name in `POLICIES`.
        mean, std: of the pixels, per channel (C,).
        image_size: (H, W) of the views.
    """

    def __init__(self, policy: str, mean: Tensor, std: Tensor, image_size: tuple[int, int]) -> None:
        self.policy, self.image_size = POLICIES[policy], image_size
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        if self.policy.crop and not self.policy.affine:
            _operations()  # if kornia is missing, now and not after a warm-up

    def denormalize(self, images: Tensor) -> Tensor:
        """The images in [0, 1] of which these are the normalised ones."""
        return images * self.std + self.mean

    @_view
    def plain(self, images: Tensor) -> Tensor:
        """The centre."""
        return self._centre(images)

    @_view
    def weak(self, images: Tensor) -> Tensor:
        """A random crop, and a flip where the policy has it."""
        return self._crop(images)

    @_view
    def auto(self, images: Tensor) -> Tensor:
        """The weak view, then AutoAugment where the policy has it."""
        images = self._crop(images)
        return _auto(images, self.policy.auto) if self.policy.auto else images

    @_view
    def strong(self, images: Tensor) -> Tensor:
        """The weak view, then RandAugment; or a small affine map and a change of contrast."""
        if not self.policy.crop:
            return self._centre(images)
        if self.policy.released:
            tenths = torch.randint(1, 10, (len(images), 2))
            return _cutout(_rand(self._crop(images), tenths / 10, chance=0.5))
        if not self.policy.affine:
            return _rand(self._crop(images), torch.full((len(images), 2), 10 / 30))
        angle, scale, shear, right, down, gain = torch.rand(6, len(images)).mul(2).sub(1)
        moved = _warp(
            images,
            angle=angle * math.radians(15),
            scale=1 + 0.15 * scale,
            shear_x=0.15 * shear,
            right=right / 8,
            down=down / 8,
        )
        gain = (1 + 0.3 * gain[:, None, None, None]).to(images, non_blocking=True)
        return self._centre(moved) * gain

    @_view
    def warmup(self, images: Tensor) -> Tensor:
        """The weak view, with colour jitter and a small affine map where the policy has them."""
        images = self._crop(images)
        return _move(_jitter(images)) if self.policy.released else images

    def _centre(self, images: Tensor) -> Tensor:
        height, width = self.image_size
        down, right = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, down : down + height, right : right + width]

    def _crop(self, images: Tensor) -> Tensor:
        if not self.policy.crop:
            return self._centre(images)
        height, width = self.image_size
        if images.shape[2:] == self.image_size:
            images = F.pad(images, [max(1, width // 8)] * 2 + [max(1, height // 8)] * 2)
        windows = images.unfold(2, height, 1).unfold(3, width, 1)
        sample = torch.arange(len(images), device=images.device)
        down, right = (
            torch.randint(n, (len(images),)).to(images.device, non_blocking=True)
            for n in windows.shape[2:4]
        )
        images = windows[sample, :, down, right]
        if not self.policy.flip:
            return images
        mirrored = (torch.rand(len(images)) < 0.5).to(images.device, non_blocking=True)
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _warp(
    images: Tensor,
    *,
    angle: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
    right: Tensor | float = 0.0,
    down: Tensor | float = 0.0,
    background: float = 0.0,
) -> Tensor:
    """Images (B, C, H, W) turned by angle (radians), zoomed, sheared and moved by shares of their
    sides; each is one value or one per image (B,)."""
    given = (angle, scale, shear_x, shear_y, right, down)
    angle, scale, shear_x, shear_y, right, down = (
        torch.as_tensor(value, dtype=torch.float32).expand(len(images)) for value in given
    )
    cos, sin = angle.cos() / scale, angle.sin() / scale
    aspect = images.shape[2] / images.shape[3]
    rows = (
        *(cos - sin * shear_y, (cos * shear_x - sin) * aspect, -2 * right),
        *((sin + cos * shear_y) / aspect, sin * shear_x + cos, -2 * down),
    )
    matrix = torch.stack(rows, 1).view(-1, 2, 3).to(images, non_blocking=True)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


@cache
def _operations() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Of images (B, C, H, W), magnitudes (B,) in [0, 1], and the same with random signs."""
    with extra():
        import kornia.enhance as enhance
    saturate = enhance.adjust_saturation_with_gray_subtraction
    return {
        "identity": lambda x, m, s: x,
        "rotate": lambda x, m, s: _warp(x, angle=s * math.radians(30), background=GREY),
        "shear_x": lambda x, m, s: _warp(x, shear_x=0.3 * s, background=GREY),
        "shear_y": lambda x, m, s: _warp(x, shear_y=0.3 * s, background=GREY),
        "translate_x": lambda x, m, s: _warp(x, right=150 / 331 * s, background=GREY),
        "translate_y": lambda x, m, s: _warp(x, down=150 / 331 * s, background=GREY),
        "brightness": lambda x, m, s: enhance.adjust_brightness_accumulative(x, 1 + 0.9 * s),
        "contrast": lambda x, m, s: enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * s),
        "color": lambda x, m, s: saturate(x, 1 + 0.9 * s) if x.shape[1] == 3 else x,
        "sharpness": lambda x, m, s: enhance.sharpness(x, 1 + 0.9 * s),
        "posterize": lambda x, m, s: enhance.posterize(x, (8 - 4 * m).round().long()),
        "solarize": lambda x, m, s: enhance.solarize(x, 1 - m),
        # kornia turns a channel of one value black, Pillow leaves it
        "auto_contrast": lambda x, m, s: torch.where(
            x.amax((2, 3), True) > x.amin((2, 3), True), enhance.normalize_min_max(x), x
        ),
        "equalize": lambda x, m, s: enhance.equalize(x),
        "invert": lambda x, m, s: 1 - x,
    }


@cache
def _table(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of an AutoAugment policy: operation, probability and magnitude, (25, 2) each."""
    with extra():
        from kornia.augmentation.auto.autoaugment import autoaugment
    policy = getattr(autoaugment, f"{name}_policy")
    known = list(_operations())
    operation = [[known.index(name) for name, _, _ in pair] for pair in policy]
    probability = [[chance for _, chance, _ in pair] for pair in policy]
    magnitude = [[(level or 0) / 9 for _, _, level in pair] for pair in policy]
    return torch.tensor(operation), torch.tensor(probability), torch.tensor(magnitude)


def _auto(images: Tensor, name: str) -> Tensor:
    """AutoAugment (Cubuk et al., 2019): one of 25 pairs of operations for each image."""
    operation, probability, magnitude = _table(name)
    pick = torch.randint(len(operation), (len(images),))
    happens = torch.rand(len(images), 2) < probability[pick]
    return _apply(images, operation[pick] * happens, magnitude[pick])  # operation 0: none


def _rand(images: Tensor, magnitude: Tensor, chance: float = 1.0) -> Tensor:
    """RandAugment (Cubuk et al., 2020): for each image operations of the magnitudes (B, n) in
    [0, 1], each of them with probability `chance`."""
    known = len(_operations()) - 1  # inversion, the last one, is AutoAugment's alone
    operation = torch.randint(known, magnitude.shape)
    if chance < 1:
        operation *= torch.rand(magnitude.shape) < chance
    return _apply(images, operation, magnitude)


def _cutout(images: Tensor) -> Tensor:
    """A grey square of half the sides about any pixel: 16×16 of 32×32, less at the edges."""
    inside = []
    for side in images.shape[2:]:
        start = torch.randint(side, (len(images), 1)) - side // 4
        place = torch.arange(side)
        inside.append((place >= start) & (place < start + side // 2))
    hidden = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(hidden.to(images.device, non_blocking=True), GREY, images)


def _jitter(images: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed by up to 0.4 each and, of colour, hue by 0.1."""
    with extra():
        import kornia.enhance as enhance
    factors = torch.rand(4, len(images)).mul(2).sub(1)
    brightness, contrast, saturation, hue = factors.to(images, non_blocking=True)
    images = enhance.adjust_brightness_accumulative(images, 1 + 0.4 * brightness)
    images = enhance.adjust_contrast_with_mean_subtraction(images, 1 + 0.4 * contrast)
    if images.shape[1] == 3:
        images = enhance.adjust_saturation_with_gray_subtraction(images, 1 + 0.4 * saturation)
        images = enhance.adjust_hue(images, 0.2 * math.pi * hue)
    return images.clamp(0, 1)


def _move(images: Tensor) -> Tensor:
    """Turned by up to 10°, moved by a tenth of the sides, scaled by a tenth."""
    angle, scale, right, down = torch.rand(4, len(images)).mul(2).sub(1)
    return _warp(
        images,
        angle=angle * math.radians(10),
        scale=1 + 0.1 * scale,
        right=0.1 * right,
        down=0.1 * down,
        background=GREY,
    )


def _apply(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Operations (B, n) of their magnitudes (B, n), one after the other."""
    images = images.clone()
    signed = magnitude * (torch.randint(2, magnitude.shape) * 2 - 1)
    for step in range(operation.shape[1]):
        for index, function in enumerate(_operations().values()):
            rows = (operation[:, step] == index).nonzero()[:, 0]
            if index and len(rows):
                m, s = (
                    value[rows, step].to(images, non_blocking=True) for value in (magnitude, signed)
                )
                there = rows.to(images.device, non_blocking=True)
                images[there] = function(images[there], m, s).clamp(0, 1)
    return images
