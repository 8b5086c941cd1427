"""Triton's sample_loss against the reference: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, LAYOUTS, TRITON_DEVICE, each, lay_out, upstreams
from tolerances import assert_accurate

import sanm_kernels as sk

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")


@each(dtype=DTYPES, K=[2, 10, 100, 1000, 1001, 5000], layout=LAYOUTS)
def test_losses_and_gradients(dtype, K, layout):
    logits, labels = (torch.randn(5, K) * 4).to(dtype), torch.randint(0, K, (5,))
    logits[1] -= 40
    for name, upstream in upstreams((5,), torch.float32).items():
        runs = []
        for backend, kind in (
            ("triton", dtype),
            ("reference", torch.float64),
            ("reference", dtype),
        ):
            device = TRITON_DEVICE if backend == "triton" else "cpu"
            z = lay_out(logits, layout).to(kind)
            z = (z if device == "cpu" else z.to(device)).requires_grad_()
            loss = sk.sample_loss(z, labels.to(device), backend=backend)
            g = upstream.to(device) if backend == "triton" else upstream
            (grad,) = torch.autograd.grad(loss, z, g.to(loss.dtype))
            runs.append((loss.detach().cpu(), grad.cpu()))
        for got, exact, eager in zip(*runs, strict=True):
            assert_accurate(got, exact, eager, name, 16.0)


def test_edges():
    inf = float("inf")
    z = torch.tensor([[0.0, -inf, 1.0], [float("nan"), 0.0, 0.0], [1e4, -1e4, 0.0]])
    labels = torch.tensor([0, 1, 2])
    a = sk.sample_loss(z.to(TRITON_DEVICE), labels.to(TRITON_DEVICE), backend="triton").cpu()
    b = sk.sample_loss(z, labels, backend="reference")
    torch.testing.assert_close(a, b, equal_nan=True)
    empty = torch.empty(0, 3, device=TRITON_DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=TRITON_DEVICE)
    assert sk.sample_loss(empty, none, backend="triton").shape == (0,)


@pytest.mark.skipif(TRITON_DEVICE != "cpu", reason="only CPU tensors are checked unasked")
def test_a_label_outside_is_refused():
    with pytest.raises(ValueError, match=r"labels: expected indices in \[0, 3\), got 3"):
        sk.sample_loss(torch.randn(2, 3), torch.tensor([0, 3]), backend="triton")
