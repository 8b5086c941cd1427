"""Sums over very many classes, and probabilities too small for their dtype."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import BACKENDS, each
from tolerances import assert_accurate
from torch import Tensor

import sanm_kernels as sk

MANY = 1_000_003
N = 2


def logits(kind: str, K: int) -> Tensor:
    """Rows that are random, or of which each but one is by itself too small to change the sum."""
    generator = torch.Generator().manual_seed(K)
    if kind == "random":
        return torch.randn(N, K, generator=generator)
    return torch.zeros(N, K).index_fill_(1, torch.tensor([5]), 16.7)


def parts(z: Tensor, targets: Tensor, num_labeled: int) -> tuple[Tensor, ...]:
    """L_x or L_u, P and N in plain torch."""
    log_p = torch.log_softmax(z, 1)
    p, K = log_p.exp(), z.shape[1]
    cross = -(targets * log_p).sum(1).mean() if num_labeled else (p - targets).square().mean()
    log_mean = log_p.logsumexp(0) - math.log(len(z))
    return cross, (-math.log(K) - log_mean).mean(), (p * log_p).sum(1).mean()


@each(backend=BACKENDS, kind=["random", "peaked"], num_labeled=[N, 0])
def test_masked_loss(backend, kind, num_labeled):
    z, targets = logits(kind, MANY), torch.softmax(logits("random", MANY).flip(1), 1)
    weight = {"unlabeled_weight": 1.0, "prior_weight": 0.5, "confidence_weight": 0.7}
    result = sk.masked_loss(
        z.requires_grad_(), targets, num_labeled=num_labeled, backend=backend, **weight
    )
    actual = (result.labeled if num_labeled else result.unlabeled, result.prior, result.confidence)
    exact = parts(z.double(), targets.double(), num_labeled)
    for name, got, right, plain in zip(
        ("loss", "prior", "confidence"), actual, exact, parts(z, targets, num_labeled), strict=True
    ):
        assert_accurate(got, right, plain, name)
    (gradient,) = torch.autograd.grad(result.total, z)
    total = exact[0] + 0.5 * exact[1] + 0.7 * exact[2]
    assert_accurate(gradient, *torch.autograd.grad(total, z) * 2, "gradient", 64)


@each(backend=BACKENDS, kind=["random", "peaked"])
def test_sample_loss_and_refined_targets(backend, kind):
    z, labels = logits(kind, MANY), torch.tensor([5, 7])
    loss = sk.sample_loss(z, labels, backend=backend)
    exact = torch.nn.functional.cross_entropy(z.double(), labels, reduction="none")
    assert_accurate(loss, exact, exact, "loss", scale=1.0)
    refined = sk.refine_targets(z, labels=labels, clean_prob=torch.rand(N), backend=backend)
    torch.testing.assert_close(refined.double().sum(1), torch.ones(N).double(), rtol=0, atol=1e-6)


@each(backend=BACKENDS, kind=["random", "peaked"])
def test_one_pass_loss(backend, kind):
    features = torch.ones(N, 1, 2, 2).requires_grad_()
    weight, targets = logits(kind, MANY)[0, :, None], torch.softmax(logits("random", MANY), 1)

    def run(dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
        result = sk.masked_forward(
            features.to(dtype), targets.to(dtype), torch.ones(N), size=(8, 8), generator=0,
            classifier=(weight.to(dtype), None), backend=name,
        )  # fmt: skip
        return result.loss, torch.autograd.grad(result.loss, features)[0]

    for actual, exact, plain in zip(
        run(torch.float32, backend),
        run(torch.float64, "reference"),
        run(torch.float32, "reference"),
        strict=True,
    ):
        assert_accurate(actual, exact, plain, scale=1.0, roundings=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_a_large_map(backend):
    features = torch.rand(1, 1, 1500, 1500, generator=torch.Generator().manual_seed(0))
    actual = sk.activation_stats(features, (8, 8), backend=backend)
    exact = sk.activation_stats(features.double(), (8, 8), backend="reference")
    for name in ("mean", "std", "entropy"):
        assert_accurate(getattr(actual, name), *[getattr(exact, name)] * 2, name, 8)


@each(
    backend=BACKENDS,
    dtype=[torch.float32, torch.float64],
    low=[(-88.0, -88.0), (-90.0, -95.0), (-1e4, 1 - 1e4), (-120.0, -math.inf), (-75.0, -200.0)],
)
def test_prior_penalty_of_small_probabilities(backend, dtype, low):
    """The logarithm of a mean that is 0 in the dtype, and its gradient."""
    z = torch.tensor([[0.0, low[0], -1.0], [0.0, low[1], 1.0]], dtype=dtype).requires_grad_()
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=dtype)
    result = sk.masked_loss(z, torch.tensor([0, 1]), prior=prior, backend=backend)
    (gradient,) = torch.autograd.grad(result.prior, z)
    log_p = torch.log_softmax(z.double(), 1)
    log_mean = log_p.logsumexp(0) - math.log(2)
    exact = (prior * (prior.log() - log_mean)).sum()
    share = prior.double() * (log_p - log_mean - math.log(2)).exp()
    expected = log_p.exp() * share.sum(1, keepdim=True) - share
    assert_accurate(result.prior, *[exact.detach()] * 2, "penalty")
    assert_accurate(gradient, *[expected.detach()] * 2, "gradient", 4 * max(1, -low[0] / 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prior_penalty_of_impossible_classes(backend):
    z = torch.tensor([[0.0, -math.inf], [1.0, -math.inf]]).requires_grad_()
    result = sk.masked_loss(z, torch.tensor([0, 0]), backend=backend)
    (gradient,) = torch.autograd.grad(result.prior, z)
    assert result.prior == math.inf and gradient.isfinite().all()
