"""masked_loss called wrongly: which error, what it says, and that nothing was changed."""

from __future__ import annotations

import copy

import pytest
import torch
from inputs import CPU_BACKENDS, assert_refused, each

import sanm_kernels as sk

backends = pytest.mark.parametrize("backend", ("reference", "cpu"))

Z, T = torch.zeros(4, 3), torch.full((4, 3), 1 / 3)
Y, R, PERM = torch.tensor([0, 1, 2, 0]), torch.full((4,), 0.1), torch.tensor([1, 2, 3, 0])
WRONG = {
    "logits no tensor": (TypeError, "logits", ([1.0], T), {}),
    "logits integer": (TypeError, "logits", (Z.long(), T), {}),
    "logits 1-d": (ValueError, "logits", (Z[0], T), {}),
    "one class": (ValueError, "two classes", (Z[:, :1], T[:, :1]), {}),
    "targets no tensor": (TypeError, "targets", (Z, [0, 1]), {}),
    "targets bool": (TypeError, "targets", (Z, T > 0), {}),
    "targets 1-d": (ValueError, "targets", (Z, T[0]), {}),
    "targets 5-d": (ValueError, "targets", (Z, T[None, None, None]), {}),
    "targets K": (ValueError, "targets", (Z, T[:, :2]), {}),
    "targets rows": (ValueError, "targets", (Z, T[:3]), {}),
    "too many without mix": (ValueError, "targets", (Z[:2], T), {}),
    "one-hot integers": (
        ValueError,
        r"targets: .* integers of shape \[4, 3\]",
        (Z, torch.eye(3).long()[Y]),
        {"mix": (0.5, PERM)},
    ),
    "rows of labels": (ValueError, r"in shape \[2, 4\]", (Z, torch.stack([Y, Y])), {}),
    "label range": (ValueError, "targets", (Z, torch.tensor([0, 1, 3, 0])), {}),
    "label negative": (ValueError, "targets", (Z, torch.tensor([0, -1, 2, 0])), {}),
    "device": (ValueError, "targets", (Z, T.to("meta")), {}),
    "ratio shape": (ValueError, "ratio", (Z, T), {"ratio": R[:3]}),
    "ratio dtype": (TypeError, "ratio", (Z, T), {"ratio": Y}),
    "ratio NaN": (ValueError, "ratio", (Z, T), {"ratio": R * torch.nan}),
    "ratio range": (ValueError, "ratio", (Z, T), {"ratio": R + 1}),
    "mix no pair": (TypeError, "mix", (Z, T), {"mix": 0.5}),
    "lam range": (ValueError, "lam", (Z, T), {"mix": (1.5, PERM)}),
    "lam text": (TypeError, "lam", (Z, T), {"mix": ("a", PERM)}),
    "permutation float": (TypeError, "permutation", (Z, T), {"mix": (0.5, PERM.float())}),
    "permutation short": (ValueError, "permutation", (Z, T), {"mix": (0.5, PERM[:3])}),
    "permutation range": (ValueError, "permutation", (Z, T), {"mix": (0.5, PERM + 1)}),
    "permutation negative": (ValueError, "permutation", (Z, T), {"mix": (0.5, PERM - 1)}),
    "num_labeled high": (ValueError, "num_labeled", (Z, T), {"num_labeled": 5}),
    "num_labeled low": (ValueError, "num_labeled", (Z, T), {"num_labeled": -1}),
    "num_labeled float": (TypeError, "num_labeled", (Z, T), {"num_labeled": 2.0}),
    "weight text": (TypeError, "unlabeled_weight", (Z, T), {"unlabeled_weight": "1"}),
    "weight NaN": (ValueError, "prior_weight", (Z, T), {"prior_weight": float("nan")}),
    "prior shape": (ValueError, "prior", (Z, T), {"prior": R}),
    "prior NaN": (ValueError, "prior", (Z, T), {"prior": R[:3] * torch.nan}),
    "drop": (ValueError, "drop", (Z, T), {"drop": "none"}),
    "reduction": (ValueError, "reduction", (Z, T), {"reduction": "max"}),
    "none with prior": (
        ValueError,
        "reduction",
        (Z, T),
        {"reduction": "none", "prior_weight": 1.0},
    ),
    "backend": (ValueError, "backend", (Z, T), {"backend": "tpu"}),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(backend, name):
    error, message, arguments, kwargs = WRONG[name]
    assert_refused(sk.masked_loss, error, message, arguments, {"backend": backend} | kwargs)


@backends
def test_inputs_stay_unchanged(backend):
    logits, targets = torch.randn(20, 5), torch.softmax(torch.randn(20, 5), 1)
    ratio, permutation = torch.rand(20), torch.randperm(20)
    prior = torch.softmax(torch.randn(5), 0)
    tensors = (logits, targets, ratio, permutation, prior)
    before = copy.deepcopy(tensors)
    sk.masked_loss(
        logits.requires_grad_(),
        targets,
        ratio=ratio,
        mix=(0.7, permutation),
        num_labeled=10,
        prior=prior,
        prior_weight=1.0,
        confidence_weight=0.5,
        backend=backend,
    ).total.backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@backends
def test_autocast(backend):
    weights = {"unlabeled_weight": 3.0, "prior_weight": 1.0, "confidence_weight": 0.5}
    x, weight = torch.randn(6, 8), torch.randn(5, 8, requires_grad=True)
    targets = torch.softmax(torch.randn(6, 5), 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(x, weight)
        out = sk.masked_loss(logits, targets, num_labeled=3, backend=backend, **weights)
    assert logits.dtype == torch.bfloat16 and out.total.dtype == torch.float32
    direct = sk.masked_loss(logits.detach(), targets, num_labeled=3, backend=backend, **weights)
    assert torch.equal(out.total, direct.total)
    out.total.backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@backends
def test_a_default_device_changes_nothing(backend):
    """Run-time numbers stay on the CPU: on the default device they would be lost, or fetched."""
    z, t, x = torch.randn(6, 4), torch.softmax(torch.randn(6, 4), 1), torch.randn(6, 2)
    order = torch.randperm(6)

    def run():
        loss = sk.masked_loss(z, t, mix=(0.3, order), prior_weight=2.0, backend=backend)
        mixed = sk.mixup_views([x], 0.3, order, backend=backend)
        return (*loss, mixed, sk.refine_targets(z, temperature=0.4, backend=backend))

    expected = run()
    with torch.device("meta"):
        results = run()
    assert all(map(torch.equal, results, expected))


@each(
    backend=CPU_BACKENDS,
    bad=[float("nan"), float("inf"), -float("inf")],
    kind=["ignored", "unlabelled", "labelled", "by row"],
)
def test_a_row_without_a_loss_leaves_the_others_alone(backend, bad, kind):
    """A logit that is NaN or infinite, with all weights of what rows share at 0."""
    logits, soft = torch.randn(5, 4), torch.softmax(torch.randn(5, 4), 1)
    options = {"num_labeled": 2 if kind == "unlabelled" else 5, "unlabeled_weight": 2.0}
    targets = torch.tensor([0, 1, -100, 3, 2]) if kind == "ignored" else soft

    def gradient(z):
        z = z.clone().requires_grad_()
        loss = sk.masked_loss(z, targets, backend=backend, **options)
        out = loss.per_sample[[0, 1, 3, 4]].sum() if kind == "by row" else loss.total
        return torch.autograd.grad(out, z)[0]

    expected = gradient(logits)
    logits[2] = bad
    others = [0, 1, 3, 4]
    assert torch.equal(gradient(logits)[others], expected[others])
