"""masked_loss, as in a DivideMix step: modulated and mixed on the fly."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from maker import INDICES, Maker, yardstick
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels.config import DROPS
from sheets import OURS, Case, Inputs, Operation, Sheet, value_and_grad, with_compiled
from sheets.masked_forward import modulate

LAM, UNLABELED_WEIGHT = 0.7, 25.0


def _inputs(B: int = 3, K: int = 7) -> Inputs:
    n = 12 * B
    return {
        "logits": 3 * torch.randn(n, K),
        "targets": torch.softmax(4 * torch.randn(2, B, K), 2),
        "ratio": 0.1 * torch.rand(2, 6, B),
        "permutation": torch.randperm(n),
    }


def _run(x: Inputs, **options: Any) -> Inputs:
    n, K = x["logits"].shape
    targets = x["targets"]
    loss = sk.masked_loss(
        x["logits"], targets[:, None].expand(2, 6, targets.shape[1], K), ratio=x["ratio"],
        mix=(LAM, x["permutation"]), num_labeled=n // 2, unlabeled_weight=UNLABELED_WEIGHT,
        prior_weight=1.0, confidence_weight=0.1, **options,
    )  # fmt: skip
    return {"total": loss.total}


def _run_indices(x: Inputs, **options: Any) -> Inputs:
    """Class indices, without mixing."""
    labels = x["permutation"] % x["logits"].shape[1]
    loss = sk.masked_loss(x["logits"], labels, **options)
    return {"total": loss.total, "per_sample": loss.per_sample}


def _run_on_device(x: Inputs, **options: Any) -> Inputs:
    """All outputs, a prior, and numbers where the kernel runs."""
    z = x["logits"]
    targets, prior = torch.softmax(z.detach().float(), 1), torch.softmax(z.detach()[0].float(), 0)
    lam, one = torch.tensor([LAM, 1.0], device=z.device)
    loss = sk.masked_loss(
        z, targets, prior=prior, mix=(lam, x["permutation"]), num_labeled=len(z) // 2,
        unlabeled_weight=one, prior_weight=one, confidence_weight=one, **options,
    )  # fmt: skip
    return loss._asdict()


def _random(m: Maker) -> None:
    n, K = m.size(150, 12), m.size(150, 40) + 1
    if m.chance(0.05):
        n = 0
    if m.rare(0.02):
        n, K = m.integer(1, 3), m.integer(20_000, 200_000)
    integers = INDICES if K < 2**15 else INDICES[:2]
    mix, soft, labeled = m.chance(0.5), m.chance(0.6), m.integer(0, n)
    M = n + (m.integer(0, 5) if mix else 0)
    if soft:
        targets = m.rows(M, K)
        if n and M % 2 == 0 and m.chance(0.4):  # expanded, as the targets of several views are
            half = m.give(targets[: M // 2])
            targets = half[None].expand(2, M // 2, K)
        else:
            targets = m.give(targets)
    else:
        targets = m.indices(K, M).where(m.uniform(M) < 0.8, -100)
        if m.spoiling and n and m.chance(0.3):  # one-hot rows of integers
            m.call.wrong, targets = "targets", (targets[:, None] == torch.arange(K)).long()
        targets = m.give(m.spoil(targets, [-1, K], "targets"), integers)
    given: dict[str, Any] = {"logits": m.give(m.logits(n, K), grad=True), "targets": targets}
    if m.chance(0.6):
        given["ratio"] = m.give(m.spoil(m.uniform(M), [1.5, -0.1, math.nan], "ratio"))
    if m.chance(0.3):
        pi = torch.softmax(m.normal(K), 0)
        given["prior"] = m.give(m.spoil(pi, [1.5, -0.1, math.nan], "prior"))
    if mix:
        partner = m.spoil(m.permutation(M)[:n], [-1, M], "mix permutation")
        given["permutation"] = m.give(partner, INDICES)
    reduction = m.choice(["mean", "mean", "sum", "none"])
    lam = m.choice([0.0, 1.0, m.real(0, 1)])
    options: dict[str, Any] = {"num_labeled": labeled, "reduction": reduction}
    options |= {"unlabeled_weight": m.choice([0.0, 25.0]), "drop": m.choice(DROPS)}
    if reduction != "none":
        options |= {"prior_weight": m.choice([0.0, 1.0]), "confidence_weight": m.real(-1, 1)}

    def run(x: dict[str, Any], backend: str) -> sk.MaskedLoss:
        x = dict(x)
        permutation = x.pop("permutation", None)
        pair = None if permutation is None else (lam, permutation)
        return sk.masked_loss(**x, mix=pair, **options, backend=backend)

    m.call.inputs, m.call.run = given, run
    m.call.roundings = 32.0 if given["logits"].dtype == torch.float64 else 16.0
    m.call.roundings *= yardstick(given["logits"])


def _torch(
    logits: Tensor, targets: Tensor, ratio: Tensor, permutation: Tensor, lam: float, weight: float
) -> Tensor:
    """The loss of a DivideMix step with four plain and two masked views of 2·B samples.

    logits (12·B, K), targets (2, B, K), ratio (2, B), permutation (12·B,) → cross-entropy of the
    labelled half of the rows + weight · squared error of the other + prior penalty, ().
    """
    n, K = logits.shape
    rows = torch.stack([targets] * 4 + [modulate(targets, ratio)] * 2, 1).view(n, K)
    rows = torch.lerp(rows[permutation], rows, lam)
    p = torch.softmax(logits, 1)
    labeled = -(F.log_softmax(logits[: n // 2], 1) * rows[: n // 2]).sum(1).mean()
    unlabeled = (p[n // 2 :] - rows[n // 2 :]).square().mean()
    prior = torch.full((K,), 1 / K, device=logits.device)
    return labeled + weight * unlabeled + (prior * torch.log(prior / p.mean(0))).sum()


def _case(B: int, K: int) -> Case:
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
        loss = sk.masked_loss(
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

    run = {OURS: ours, **with_compiled(_torch, call)}
    read = 4 * (n * K + 2 * B * K + n) + 8 * n
    return Case("masked_loss", f"n={n} K={K}", make, run, read, 4 * n * K, n)


def _operation(run: Any) -> Operation:
    return Operation("masked_loss", _inputs, run, ("logits",), ("logits",), {"B": 64, "K": 100})


SHEET = Sheet(
    {"masked_loss": _operation(_run)},
    variants={
        "masked_loss, indices": _operation(_run_indices),
        "masked_loss, numbers on the device": _operation(_run_on_device),
    },
    random=_random,
    share=18,
    case=_case,
    shapes=[(64, 10), (64, 100), (64, 1000)],  # B, K; 12·B rows of logits
    headline=[(64, 100), (64, 1000)],
    compiled=[{"B": 64, "K": 10}, {"B": 64, "K": 1000}],
)
