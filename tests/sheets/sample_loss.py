"""sample_loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from maker import INDICES, Maker, yardstick
from torch import Tensor

import sanm_kernels as sk
from sheets import OURS, Case, Inputs, Operation, Sheet, with_compiled


def _inputs(B: int = 5, K: int = 7) -> Inputs:
    return {"logits": 3 * torch.randn(B, K), "labels": torch.randint(K, (B,))}


def _run(x: Inputs, **options: Any) -> Inputs:
    return {"loss": sk.sample_loss(x["logits"], x["labels"], **options)}


def _random(m: Maker) -> None:
    B, K = m.size(200, 20), m.classes(1000, 100)
    B, integers = (B, INDICES) if K < 2000 else (2, INDICES[:2])
    labels = m.spoil(m.indices(K, B), [-1, K], "labels")
    m.call.inputs = {
        "logits": m.give(m.logits(B, K), grad=True),
        "labels": m.give(labels, integers),
    }
    m.call.roundings *= yardstick(m.call.inputs["logits"])
    m.call.run = lambda x, backend: sk.sample_loss(**x, backend=backend)


def _torch(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, K), labels (B,) → cross-entropies (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def _case(B: int, K: int) -> Case:
    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(B, K), torch.randint(K, (B,))

    run = {
        OURS: lambda x: [sk.sample_loss(*x)],
        **with_compiled(_torch, lambda f, x: [f(*x)]),
    }
    return Case("sample_loss", f"B={B} K={K}", make, run, 4 * B * K + 8 * B, 4 * B, B)


SHEET = Sheet(
    {
        "sample_loss": Operation(
            "sample_loss", _inputs, _run, ("logits",), ("logits",), {"B": 64, "K": 100}
        )
    },
    random=_random,
    share=6,
    case=_case,
    shapes=[(1024, 10), (1024, 100), (1024, 1000)],  # B, K
    compiled=[{"B": 768, "K": 10}, {"B": 768, "K": 1000}],
)
