"""Decoders, which rebuild an image from a feature map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Rebuilds images (B, Cin, H, W) from feature maps (B, C, h, w).

    Each stage convolves 3×3 and resizes bilinearly, by at most a factor of two. Sizes go from
    (h, w) to (H, W) in geometric steps, so any pair of sizes works, and since resizing leaves no
    gaps (strided transposed convolutions with small kernels do), every output pixel depends on
    the map. Normalised within each sample, the result does not depend on how a batch is spread
    over processes or accumulated.

    Args:
        map_shape: (C, h, w) of the feature map.
        image_shape: (Cin, H, W) of the images.
        width: channels of the last stage; each earlier stage has twice as many, up to C.
    """

    def __init__(
        self, map_shape: Sequence[int], image_shape: Sequence[int], width: int = 32
    ) -> None:
        super().__init__()
        (channels, *size), (image_channels, *image_size) = map_shape, image_shape
        if min(*map_shape, *image_shape) < 1:
            raise ValueError(
                f"map_shape and image_shape must be positive, got {map_shape} and {image_shape}"
            )
        growth = [full / small for full, small in zip(image_size, size, strict=True)]
        stages = max(1, *(math.ceil(abs(math.log2(g)) - 1e-9) for g in growth))
        self.map_shape, self.image_shape = tuple(map_shape), tuple(image_shape)
        self.sizes = [
            tuple(round(s * g ** (i / stages)) for s, g in zip(size, growth, strict=True))
            for i in range(1, stages + 1)
        ]
        widths = [channels] + [min(channels, width << (stages - 1 - i)) for i in range(stages)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
                nn.GroupNorm(math.gcd(fan_out, 8), fan_out),
                nn.LeakyReLU(0.1, inplace=True),
            )
            for fan_in, fan_out in pairwise(widths)
        )
        self.output = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        _check_map(self.map_shape, features)
        for size, stage in zip(self.sizes, self.stages, strict=True):
            features = F.interpolate(stage(features), size, mode="bilinear", align_corners=False)
        images: Tensor = self.output(features)
        return images


class LinearDecoder(nn.Module):
    """Transposed convolutions and nothing between them, each doubling both sides: three from the
    4×4 cells of PreAct ResNet-18 to 32×32 pixels, as SANM's released CIFAR script has it.

    Kernels are 4×4, so that every pixel depends on the map. Channels are halved by each stage.

    Args:
        map_shape: (C, h, w) of the feature map.
        image_shape: (Cin, H, W) of the images; H/h = W/w is a power of two, at least 2.
    """

    def __init__(self, map_shape: Sequence[int], image_shape: Sequence[int]) -> None:
        super().__init__()
        (channels, *size), (image_channels, *image_size) = map_shape, image_shape
        stages = max(1, round(math.log2(max(image_size) / max(1, *size))))
        if [side << stages for side in size] != image_size:
            raise ValueError(
                "image_shape must be map_shape's sides times 2, 4, 8, … for a linear decoder, got "
                f"{tuple(image_shape)} and {tuple(map_shape)}"
            )
        self.map_shape, self.image_shape = tuple(map_shape), tuple(image_shape)
        widths = [max(1, channels >> i) for i in range(stages)] + [image_channels]
        self.stages = nn.Sequential(
            *(nn.ConvTranspose2d(fan_in, out, 4, 2, 1) for fan_in, out in pairwise(widths))
        )

    def forward(self, features: Tensor) -> Tensor:
        _check_map(self.map_shape, features)
        images: Tensor = self.stages(features)
        return images


def _check_map(map_shape: tuple[int, ...], features: Tensor) -> None:
    if tuple(features.shape[1:]) != map_shape:
        raise ValueError(
            f"features must be (B, {', '.join(map(str, map_shape))}), the map the decoder was "
            f"built for; got {tuple(features.shape)}"
        )


DECODERS: dict[str, Callable[[Sequence[int], Sequence[int]], nn.Module]] = {
    "resize": Decoder,
    "linear": LinearDecoder,
}
