"""masked_loss, forward and backward, as in a DivideMix step: modulated and mixed on the fly."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.common import OURS, Case, value_and_grad, with_compiled
from sanm_kernels import masked_loss

LAM, UNLABELED_WEIGHT = 0.7, 25.0


def case(B: int, K: int) -> Case:
    n = 12 * B

    def make() -> tuple[Tensor, ...]:
        logits = torch.randn(n, K).requires_grad_()
        targets = torch.softmax(4 * torch.randn(2, B, K), 2)
        ratio = 0.1 * torch.rand(2, B)
        # Per row: of the labelled half, then of the other, four plain views and the masked two.
        ratios = torch.stack([torch.zeros_like(ratio)] * 4 + [ratio] * 2, 1)
        return logits, targets, ratio, ratios, torch.randperm(n)

    def ours(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        logits, targets, _, ratios, permutation = x
        loss = masked_loss(
            logits,
            targets[:, None].expand(2, 6, B, K),
            ratio=ratios,
            mix=(LAM, permutation),
            num_labeled=n // 2,
            unlabeled_weight=UNLABELED_WEIGHT,
            prior_weight=1.0,
            drop="unclamped",
        )
        return value_and_grad(loss.total, logits)

    def call(f, x):
        return value_and_grad(f(*x[:3], x[4], LAM, UNLABELED_WEIGHT), x[0])

    run = {OURS: ours, **with_compiled(baselines.masked_loss_torch, call)}
    read = 4 * (n * K + 2 * B * K + n) + 8 * n
    return Case("masked_loss", f"n={n} K={K}", make, run, read, written=4 * n * K)
