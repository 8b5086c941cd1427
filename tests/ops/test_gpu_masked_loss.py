"""masked_loss of the GPU backends against the reference: on a GPU, interpreted, or emulated.

What every backend on CPU tensors must show, these among them, is in test_masked_loss.py; this file
runs where the kernels do.
"""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, each, extended, lay_out, more
from tolerances import assert_accurate, assert_parallel

import sanm_kernels as sk

SANITIZED = (
    "cuda and torch.float32 and (mixed and 100- or registers and 2052)",
    "cuda and not (20001 or many_labels or bfloat16 or float64)",
)

WEIGHTS = {"unlabeled_weight": 25.0, "prior_weight": 0.7, "confidence_weight": -0.4}


def run(backend, kind, logits, targets, **given):
    """All outputs, and the gradient of their sum with upstream gradients that are not one."""
    device = GPU_DEVICES.get(backend, "cpu")
    z = logits.to(kind)
    z = (z if device == "cpu" else z.to(device)).requires_grad_()
    for name in ("ratio", "prior"):
        if given.get(name) is not None:
            given[name] = given[name].to(device)
    if "mix" in given:
        given["mix"] = (given["mix"][0], given["mix"][1].to(device))
    out = sk.masked_loss(z, targets.to(device), backend=backend, **given, **WEIGHTS)
    rows = torch.linspace(-1, 2, 2 * len(z)).to(z)[::2].to(out.per_sample.dtype)  # strided
    total = 1.7 * out.total - 0.3 * out.prior + 0.1 * out.confidence + 2 * out.unlabeled
    total = total + 0.6 * out.labeled + (rows * out.per_sample).sum()
    (grad,) = torch.autograd.grad(total, z)
    return [x.detach().cpu() for x in (*out, grad)]


def check(backend, logits, targets, **given):
    dtype = logits.dtype
    got = run(backend, dtype, logits, targets, **given)
    exact = run("reference", torch.float64, logits, targets, **given)
    eager = run("reference", dtype, logits, targets, **given)
    for name, *triple in zip((*sk.MaskedLoss._fields, "gradient"), got, exact, eager, strict=True):
        assert_accurate(*triple, name, 16.0)
    if dtype in (torch.float32, torch.float64):
        assert_parallel(got[-1], exact[-1])


@each(
    kind=["soft", "indices", "modulated", "modulated indices, mixed"],
    K=[2, 10, 100, 1000, 1001],
    dtype=DTYPES,
)
def test_losses_and_gradients(backend, dtype, K, kind):
    n = 37 if K < 1000 else 5
    logits = (torch.randn(n, K) * 3).to(dtype)
    targets = torch.randint(0, K, (n,))
    if "indices" in kind:
        targets[1] = -100
    else:
        targets = torch.softmax(torch.randn(n, K) * 2, 1)
    given = {"num_labeled": n // 2, "prior": torch.softmax(torch.randn(K), 0)}
    if "modulated" in kind:
        given |= {"ratio": torch.rand(n), "drop": "clamped" if K % 2 else "unclamped"}
    if "mixed" in kind:
        given |= {"mix": (0.7, torch.randperm(n))}
    check(backend, logits, targets, **given)


@each(kind=["soft", "indices"], K=[2052, 5000, 20001], dtype=[torch.float32, torch.float64])
def test_rows_too_long_for_registers(backend, dtype, K, kind):
    """In shared memory, or, where they are too long for that as well, in several sweeps."""
    if backend == "triton":
        pytest.skip("it knows no such cases")
    n = 3
    logits, targets = (torch.randn(n, K) * 3).to(dtype), torch.randint(0, K, (n,))
    if kind == "soft":
        targets = torch.softmax(torch.randn(n, K) * 2, 1)
    given = {"ratio": torch.rand(n), "mix": (0.7, torch.randperm(n))}
    check(backend, logits, targets, num_labeled=1, **given)


@each(layout=LAYOUTS, dtype=DTYPES)
def test_layouts(backend, dtype, layout):
    logits = lay_out(torch.randn(9, 12).to(dtype), layout)
    targets = lay_out(torch.softmax(torch.randn(9, 12), 1).to(dtype), layout)
    check(
        backend, logits, targets, ratio=torch.rand(9), mix=(0.6, torch.randperm(9)), num_labeled=4
    )
    expanded = lay_out(torch.softmax(torch.randn(3, 12), 1).to(dtype), layout)
    check(backend, logits, expanded.expand(3, 3, 12), mix=(0.6, torch.randperm(9)))
    check(backend, logits, expanded[None, :, None].expand(1, 3, 3, 12), ratio=torch.rand(9))


@pytest.mark.parametrize("K", [7, *more(33, 130)])
def test_more_rows_than_a_program_takes_at_once(backend, monkeypatch, K):
    if GPU_DEVICES["triton"] == "cpu" and backend == "triton" and K > 7:
        pytest.skip("the interpreter is slow")
    if backend == "triton":
        from sanm_kernels.backends.triton import masked_loss

        monkeypatch.setattr(masked_loss, "FORWARD_PROGRAMS", 2)
        monkeypatch.setattr(masked_loss, "BACKWARD_PROGRAMS", 3)
    given = {"mix": (0.2, torch.randperm(501)), "num_labeled": 77, "ratio": torch.rand(501)}
    logits = torch.randn(501, K) * 3 + torch.linspace(0, 2, K)  # p̄ far from the uniform prior
    check(backend, logits, torch.softmax(torch.randn(501, K), 1), **given)


@extended
def test_many_labels(backend):
    """So many that the CUDA kernels count them in a launch of its own."""
    if GPU_DEVICES["triton"] == "cpu" and backend == "triton":
        pytest.skip("the interpreter is slow")
    labels = torch.randint(0, 3, (17000,))
    labels[::3] = -100
    check(backend, torch.randn(17000, 3), labels, num_labeled=5000)


def test_the_same_bits_twice(backend):
    logits, targets = torch.randn(100, 40), torch.softmax(torch.randn(100, 40), 1)
    given = {"mix": (0.2, torch.randperm(100)), "num_labeled": 77}
    a, b = (run(backend, torch.float32, logits, targets, **given) for _ in range(2))
    assert all(map(torch.equal, a, b))


@each(K=[4, 200, 5000], n=[0, 3])
def test_no_rows_and_ignored_rows(backend, n, K):
    targets = torch.full((n,), -100)
    *parts, grad = run(backend, torch.float32, torch.randn(n, K), targets, num_labeled=n // 2)
    expected = run("reference", torch.float32, torch.randn(n, K), targets, num_labeled=n // 2)
    assert all(part.isfinite().all() for part in parts) and grad.isfinite().all()
    if n == 0:
        assert all(map(torch.equal, parts, expected))
    assert parts[1] == 0 and parts[2] == 0 and not parts[5].any()


@pytest.mark.parametrize("wrong", ["label", "negative label", "partner", "negative partner"])
def test_what_is_out_of_range_gives_nan_in_its_row(backend, wrong, unchecked):
    device = GPU_DEVICES[backend]
    labels, permutation = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    rows = labels if "label" in wrong else permutation
    rows[2] = -1 if "negative" in wrong else 4
    z = torch.randn(4, 3).to(device).requires_grad_()
    mix = (0.6, permutation.to(device))
    out = sk.masked_loss(z, labels.to(device), mix=mix, num_labeled=3, backend=backend)
    (grad,) = torch.autograd.grad(out.per_sample.sum(), z)
    assert out.per_sample.isnan().tolist() == [False, False, True, False]
    assert grad.isnan().any(1).tolist() == [False, False, True, False]
