"""refine_targets: of four predictions, as of two views and two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from maker import DTYPES, INDICES, Maker, yardstick
from torch import Tensor

import sanm_kernels as sk
from sheets import OURS, Case, Inputs, Operation, Sheet, with_compiled


def _inputs(B: int = 5, K: int = 7) -> Inputs:
    logits = {f"logits{i}": 3 * torch.randn(B, K) for i in range(4)}
    return logits | {"labels": torch.randint(K, (B,)), "clean_prob": torch.rand(B)}


def _run(x: Inputs, **options: Any) -> Inputs:
    logits = [x[f"logits{i}"] for i in range(4)]
    guessed = sk.refine_targets(logits, labels=x["labels"], clean_prob=x["clean_prob"], **options)
    return {"targets": guessed}


def _run_guessed(x: Inputs, **options: Any) -> Inputs:
    """Without labels, with T where the kernel runs."""
    temperature = torch.tensor(0.5, device=x["logits0"].device)
    logits = [x[f"logits{i}"] for i in range(4)]
    return {"targets": sk.refine_targets(logits, temperature=temperature, **options)}


def _run_soft(x: Inputs, **options: Any) -> Inputs:
    logits = [x[f"logits{i}"] for i in range(4)]
    labels = torch.softmax(x["logits1"].float(), 1)
    given = {"labels": labels, "clean_prob": x["clean_prob"]}
    return {"targets": sk.refine_targets(logits, **given, **options)}


def _random(m: Maker) -> None:
    B, K, V = m.size(100, 10), m.classes(150, 40), m.integer(1, 5)
    B, integers = (B, INDICES) if K < 1000 else (2, INDICES[:2])
    dtype = [m.choice(DTYPES)]
    given: dict[str, Any] = {"logits": [m.give(m.logits(B, K), dtype) for _ in range(V)]}
    if m.chance(0.7):
        soft = m.chance(0.5)
        labels = m.rows(B, K) if soft else m.spoil(m.indices(K, B), [-1, K], "labels")
        given["labels"] = m.give(labels, DTYPES if soft else integers)
        given["clean_prob"] = m.give(m.spoil(m.uniform(B), [1.5, -0.1, math.nan], "clean_prob"))
    temperature = m.choice([0.5, 0.5, 1.0, m.real(0.1, 2)])
    if m.chance(0.1) and not m.call.wrong:  # where p's order alone counts, or nothing of it
        z = m.give((3 * m.normal(B, K)).round(), dtype)
        given, temperature = {"logits": [z]}, 10.0 ** m.choice([-300, -20, -12, -8, 8, 300])
    m.call.inputs, m.call.roundings = given, 16.0 * yardstick(given["logits"][0])
    m.call.run = lambda x, backend: sk.refine_targets(**x, temperature=temperature, backend=backend)


def _torch(
    logits: Sequence[Tensor], labels: Tensor, clean_prob: Tensor, temperature: float
) -> Tensor:
    """logits (B, K) each, labels (B,), clean_prob (B,) → refined and sharpened targets (B, K)."""
    p = sum(torch.softmax(z, 1) for z in logits) / len(logits)
    q = clean_prob[:, None]
    p = q * F.one_hot(labels, p.shape[1]) + (1 - q) * p
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def _case(B: int, K: int) -> Case:
    def make() -> tuple[list[Tensor], Tensor, Tensor]:
        logits = [torch.randn(B, K) for _ in range(4)]
        return logits, torch.randint(K, (B,)), torch.rand(B)

    run = {
        OURS: lambda x: [sk.refine_targets(x[0], labels=x[1], clean_prob=x[2])],
        **with_compiled(_torch, lambda f, x: [f(*x, 0.5)]),
    }
    read, written = 4 * 4 * B * K + 12 * B, 4 * B * K
    return Case("refine_targets", f"4 × ({B}, {K})", make, run, read, written, B)


def _operation(run: Any) -> Operation:
    logits = tuple(f"logits{i}" for i in range(4))
    return Operation("refine_targets", _inputs, run, (), logits, {"B": 64, "K": 100})


SHEET = Sheet(
    {"refine_targets": _operation(_run)},
    variants={
        "refine_targets, guessed": _operation(_run_guessed),
        "refine_targets, soft labels": _operation(_run_soft),
    },
    random=_random,
    share=6,
    case=_case,
    shapes=[(64, 10), (64, 100), (64, 1000)],  # B, K; four predictions
    compiled=[{"B": 64, "K": 10}, {"B": 64, "K": 1000}],
)
