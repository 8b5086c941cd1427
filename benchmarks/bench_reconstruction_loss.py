"""reconstruction_loss of both masked views over the whole image, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case, value_and_grad, with_compiled
from sanm_kernels import reconstruction_loss


def case(B: int, C: int, H: int) -> Case:
    def make() -> tuple[Tensor, Tensor]:
        images = torch.rand(B, C, H, H)
        return torch.rand(2 * B, C, H, H).requires_grad_(), images

    def call(f, x):
        return value_and_grad(f(*x), x[0])

    run = {
        OURS: lambda x: call(reconstruction_loss, x),
        **with_compiled(baselines.reconstruction_loss_torch, call),
    }
    size = 4 * B * C * H * H
    shape = f"2 × ({B}, {C}, {H}, {H})"
    return Case("reconstruction_loss", shape, make, run, read=3 * size, written=2 * size)
