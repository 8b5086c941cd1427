"""reconstruction_loss of both masked views over the whole image, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case, value_and_grad, with_compiled
from sanm_kernels import reconstruction_loss


def cases() -> Iterator[Case]:
    for shape in SHAPES["reconstruction_loss"]:
        yield case(*shape)


def case(B: int, C: int, H: int) -> Case:
    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        images = torch.rand(B, C, H, H, generator=g)
        return torch.rand(2 * B, C, H, H, generator=g).requires_grad_(), images

    run = {
        OURS: lambda x: value_and_grad(reconstruction_loss(*x), x[0]),
        **with_compiled(baselines.reconstruction_loss_torch,
                        lambda f, x: value_and_grad(f(*x), x[0])),
    }
    size = 4 * B * C * H * H
    return Case("reconstruction_loss", f"2 × ({B}, {C}, {H}, {H})", make, run,
                read=3 * size, written=2 * size)
