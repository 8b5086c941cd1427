"""sample_loss of the GPU backends against the reference: on a GPU, interpreted, or emulated."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, each, lay_out, upstreams
from tolerances import assert_accurate

import sanm_kernels as sk


@each(dtype=DTYPES, K=[2, 10, 100, 1000, 1001, 5000], layout=LAYOUTS)
def test_losses_and_gradients(backend, dtype, K, layout):
    logits, labels = (torch.randn(5, K) * 4).to(dtype), torch.randint(0, K, (5,))
    logits[1] -= 40
    for name, upstream in upstreams((5,), torch.float32).items():
        runs = []
        for which, kind in ((backend, dtype), ("reference", torch.float64), ("reference", dtype)):
            device = GPU_DEVICES.get(which, "cpu")
            z = lay_out(logits, layout).to(kind)
            z = (z if device == "cpu" else z.to(device)).requires_grad_()
            loss = sk.sample_loss(z, labels.to(device), backend=which)
            g = upstream if device == "cpu" else upstream.to(device)
            (grad,) = torch.autograd.grad(loss, z, g.to(loss.dtype))
            runs.append((loss.detach().cpu(), grad.cpu()))
        for got, exact, eager in zip(*runs, strict=True):
            assert_accurate(got, exact, eager, name, 16.0)


def test_edges(backend):
    inf, device = float("inf"), GPU_DEVICES[backend]
    z = torch.tensor([[0.0, -inf, 1.0], [float("nan"), 0.0, 0.0], [1e4, -1e4, 0.0]])
    labels = torch.tensor([0, 1, 2])
    a = sk.sample_loss(z.to(device), labels.to(device), backend=backend).cpu()
    b = sk.sample_loss(z, labels, backend="reference")
    torch.testing.assert_close(a, b, equal_nan=True)
    empty = torch.empty(0, 3, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert sk.sample_loss(empty, none, backend=backend).shape == (0,)


def test_a_label_outside_is_refused(backend):
    if GPU_DEVICES[backend] != "cpu":
        pytest.skip("only CPU tensors are checked unasked")
    with pytest.raises(ValueError, match=r"labels: expected indices in \[0, 3\), got 3"):
        sk.sample_loss(torch.randn(2, 3), torch.tensor([0, 3]), backend=backend)
