"""masked_forward with the official semantics: boxes, both masked views, modulated targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case, close, with_compiled
from sanm_kernels import MaskConfig, MaskedForward, masked_forward

CONFIG = MaskConfig.official_cifar()


def case(B: int, C: int, h: int, H: int, K: int) -> Case:
    def make() -> tuple[tuple[Tensor, ...], MaskedForward]:
        activity = torch.rand(B, 1, h, h)  # clear peaks, as trained networks have
        inputs = (
            torch.randn(B, C, h, h).relu_().mul_(activity),
            torch.softmax(4 * torch.randn(B, K), 1),
            torch.rand(B),
            torch.rand(B, 3, H, H),
            torch.rand(B, CONFIG.num_draws(3), dtype=torch.float64),
        )
        return inputs, full(inputs, None)

    def full(inputs: tuple[Tensor, ...], out: MaskedForward | None) -> MaskedForward:
        features, targets, clean_prob, images, draws = inputs
        return masked_forward(
            features, targets, clean_prob, images=images, draws=draws, config=CONFIG, out=out
        )

    def ours(inputs: tuple[Tensor, ...], out: MaskedForward | None) -> Sequence[Tensor]:
        result = full(inputs, out)
        return result.targets_max, result.images_max, result.images_min

    run = {
        OURS: lambda x: ours(*x),
        "ours, new outputs": lambda x: ours(x[0], None),
        "OpenCV": lambda x: baselines.masked_forward_opencv(*x[0]),
        **with_compiled(baselines.masked_forward_torch, lambda f, x: f(*x[0])),
        "kornia": lambda x: erased(baselines.random_erasing_kornia, x[0]),
        "timm": lambda x: erased(baselines.random_erasing_timm, x[0]),
    }
    image = B * 3 * H * H
    read, written = 4 * (B * C * h * h + image + B * K), 4 * (2 * image + B * K)
    shape = f"B={B} C={C} h={h} H={H} K={K}"
    less = frozenset({"kornia", "timm"})  # random places, and labels as they were
    return Case("masked_forward", shape, make, run, read, written, agree, less)


def erased(function: Callable[[Tensor], Tensor], inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """The targets as they are, and two views of the images, each with a random box erased."""
    _, targets, _, images, _ = inputs
    return targets, function(images), function(images)


def agree(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Targets agree, and of at least 95 % of the samples both views.

    Where a sample's maximum falls on level 255 or 254 is decided by the last bit, and with it which
    pixel is the first of the highest level. torch's interpolation rounds otherwise than OpenCV's,
    which the official semantics, and so ours, follow to the bit.
    """
    close(a[:1], b[:1])
    same = [torch.isclose(x, y).flatten(1).all(1) for x, y in zip(a[1:], b[1:], strict=True)]
    share = (same[0] & same[1]).float().mean().item()
    assert share >= 0.95, f"only {share:.0%} of the samples agree"
