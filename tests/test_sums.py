"""Sums over very many classes, and probabilities too small for their dtype."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import CPU_BACKENDS, each
from tolerances import assert_accurate
from torch import Tensor

import sanm_kernels as sk

#: Classes; fewer where kernels are interpreted.
MANY = dict.fromkeys(CPU_BACKENDS, 1_000_003) | {"cuda": 100_003, "triton": 20_003}
N = 2
#: The class that stands out.
PEAK = 5


def logits(kind: str, K: int) -> Tensor:
    """Rows that are random; or where few classes have a probability that the dtype holds; or where
    each class but one is by itself too small to change the sum."""
    generator = torch.Generator().manual_seed(K)
    if kind != "peaked":
        return torch.randn(N, K, generator=generator) * {"random": 1, "vanishing": 60}[kind]
    return torch.zeros(N, K).index_fill_(1, torch.tensor([PEAK]), 16.7)


def target_rows(kind: str, K: int) -> Tensor:
    """Soft ones, or such that nothing of the loss is left but the sum's distance from 1."""
    if kind != "peaked":
        return torch.softmax(logits("random", K).flip(1), 1)
    return torch.zeros(N, K).index_fill_(1, torch.tensor([PEAK]), 1)


def parts(z: Tensor, targets: Tensor, num_labeled: int) -> tuple[Tensor, ...]:
    """L_x or L_u, P and N in plain torch."""
    log_p = torch.log_softmax(z, 1)
    p, K = log_p.exp(), z.shape[1]
    cross = -(targets * log_p).sum(1).mean() if num_labeled else (p - targets).square().mean()
    log_mean = log_p.logsumexp(0) - math.log(len(z))
    return cross, (-math.log(K) - log_mean).mean(), (p * log_p).sum(1).mean()


@each(backend=CPU_BACKENDS, kind=["random", "peaked", "vanishing"], num_labeled=[N, 0])
def test_masked_loss(backend, kind, num_labeled):
    z, targets = logits(kind, MANY[backend]), target_rows(kind, MANY[backend])
    weight = {"unlabeled_weight": 1.0, "prior_weight": 0.5, "confidence_weight": 0.7}
    result = sk.masked_loss(
        z.requires_grad_(), targets, num_labeled=num_labeled, backend=backend, **weight
    )
    actual = (result.labeled if num_labeled else result.unlabeled, result.prior, result.confidence)
    exact = parts(z.double(), targets.double(), num_labeled)
    for name, got, right in zip(("loss", "prior", "confidence"), actual, exact, strict=True):
        assert_accurate(got, right.detach(), right.detach(), name, scale=1.0)
    (gradient,) = torch.autograd.grad(result.total, z)
    total = exact[0] + 0.5 * exact[1] + 0.7 * exact[2]
    assert_accurate(gradient, *torch.autograd.grad(total, z) * 2, "gradient", 64)


@each(backend=[name for name in CPU_BACKENDS if name != "cuda"], kind=["random", "peaked"])
def test_sample_loss(backend, kind):
    z, labels = logits(kind, max(MANY[backend], 100_003)), torch.full((N,), PEAK)
    loss = sk.sample_loss(z, labels, backend=backend)
    exact = torch.nn.functional.cross_entropy(z.double(), labels, reduction="none")
    assert_accurate(loss, exact, exact, "loss", scale=1.0)


@each(backend=CPU_BACKENDS, kind=["random", "peaked"])
def test_refined_targets(backend, kind):
    z, labels = logits(kind, MANY[backend]), torch.full((N,), PEAK)
    clean = {"labels": labels, "clean_prob": torch.rand(N)}
    refined = sk.refine_targets(z, **clean, backend=backend)
    exact = sk.refine_targets(z.double(), **clean, backend="reference")
    assert_accurate(refined, exact, exact, "refined", scale=1.0)
    torch.testing.assert_close(refined.double().sum(1), torch.ones(N).double(), rtol=0, atol=1e-6)


@each(backend=CPU_BACKENDS, kind=["random", "peaked"])
def test_one_pass_loss(backend, kind):
    features = torch.ones(N, 1, 2, 2).requires_grad_()
    K = MANY[backend]
    weight, targets = logits(kind, K)[0, :, None], target_rows(kind, K)

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


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_statistics_of_a_large_map(backend):
    side = 250 if backend == "triton" else 1500  # interpreted
    features = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    actual = sk.activation_stats(features, (8, 8), backend=backend)
    exact = sk.activation_stats(features.double(), (8, 8), backend="reference")
    for name in ("mean", "std", "entropy"):
        assert_accurate(getattr(actual, name), *[getattr(exact, name)] * 2, name, 8)


@each(
    backend=CPU_BACKENDS,
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


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_prior_penalty_of_impossible_classes(backend):
    z = torch.tensor([[0.0, -math.inf], [1.0, -math.inf]]).requires_grad_()
    result = sk.masked_loss(z, torch.tensor([0, 0]), backend=backend)
    (gradient,) = torch.autograd.grad(result.prior, z)
    assert result.prior == math.inf and gradient.isfinite().all()
