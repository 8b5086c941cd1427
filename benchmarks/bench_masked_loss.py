"""masked_loss, forward and backward, as in a DivideMix step: modulation and mixture on the fly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, SHAPES, Case, value_and_grad, with_compiled
from sanm_kernels import masked_loss

LAM, UNLABELED_WEIGHT = 0.7, 25.0


def cases() -> Iterator[Case]:
    for shape in SHAPES["masked_loss"]:
        yield case(*shape)


def case(B: int, K: int) -> Case:
    n = 12 * B

    def make(seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(n, K, generator=g).requires_grad_()
        targets = torch.softmax(4 * torch.randn(2, B, K, generator=g), 2)
        ratio = 0.1 * torch.rand(2, B, generator=g)
        # In the order of the rows: of each half, four plain views and the two masked ones.
        ratios = torch.stack([torch.zeros_like(ratio)] * 4 + [ratio] * 2, 1)
        return logits, targets, ratio, ratios, torch.randperm(n, generator=g)

    def ours(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        logits, targets, _, ratios, permutation = x
        loss = masked_loss(
            logits, targets[:, None].expand(2, 6, B, K), ratio=ratios, mix=(LAM, permutation),
            num_labeled=n // 2, unlabeled_weight=UNLABELED_WEIGHT, prior_weight=1.0,
            drop="unclamped",
        )
        return value_and_grad(loss.total, logits)

    run = {OURS: ours, **with_compiled(
        baselines.masked_loss_torch,
        lambda f, x: value_and_grad(f(*x[:3], x[4], LAM, UNLABELED_WEIGHT), x[0]),
    )}
    return Case("masked_loss", f"n={n} K={K}", make, run,
                read=4 * (n * K + 2 * B * K + n) + 8 * n, written=4 * n * K)
