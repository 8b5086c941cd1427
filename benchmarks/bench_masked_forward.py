"""masked_forward with the official semantics: boxes, both masked views, modulated targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case, with_compiled
from sanm_kernels import MaskConfig, MaskedForward, masked_forward

CONFIG = MaskConfig.official_cifar()


def cases() -> Iterator[Case]:
    for shape in SHAPES["masked_forward"]:
        yield case(*shape)


def case(B: int, C: int, h: int, H: int, K: int) -> Case:
    def make(seed: int) -> tuple[tuple[Tensor, ...], MaskedForward]:
        g = torch.Generator().manual_seed(seed)
        activity = torch.rand(B, 1, h, h, generator=g)  # clear peaks, as trained networks have
        inputs = (
            torch.randn(B, C, h, h, generator=g).relu_().mul_(activity),
            torch.softmax(4 * torch.randn(B, K, generator=g), 1),
            torch.rand(B, generator=g),
            torch.rand(B, 3, H, H, generator=g),
            torch.rand(B, CONFIG.num_draws(3), generator=g, dtype=torch.float64),
        )
        return inputs, ours(inputs)

    def ours(inputs: tuple[Tensor, ...], out: MaskedForward | None = None) -> MaskedForward:
        features, targets, clean_prob, images, draws = inputs
        return masked_forward(features, targets, clean_prob, images=images, draws=draws,
                              config=CONFIG, out=out)

    def outputs(m: MaskedForward) -> tuple[Tensor, Tensor, Tensor]:
        return m.targets_max, m.images_max, m.images_min

    run = {
        OURS: lambda x: outputs(ours(*x)),
        "ours, new outputs": lambda x: outputs(ours(x[0])),
        "OpenCV": lambda x: baselines.masked_forward_opencv(*x[0]),
        **with_compiled(baselines.masked_forward_torch, lambda f, x: f(*x[0])),
    }
    views = 2 * B * 3 * H * H
    return Case("masked_forward", f"B={B} C={C} h={h} H={H} K={K}", make, run, agree=agree,
                read=4 * (B * C * h * h + views // 2 + B * K), written=4 * (views + B * K))


def agree(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Targets agree; so do both views, of all samples but for a few.

    In those, whose map touches its maximum within rounding of a quantisation step, torch's
    interpolation, which rounds otherwise than OpenCV's, gives another peak.
    """
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
    same = sum((x - y).abs().amax((1, 2, 3)) < 1e-6 for x, y in zip(a[1:], b[1:], strict=True)) == 2
    share = same.float().mean().item()
    assert share > 0.7, f"only {share:.0%} of the samples agree"
