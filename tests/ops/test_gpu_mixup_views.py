"""Triton's mixup_views equals the reference to the last bit: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, LAYOUTS, TRITON_DEVICE, lay_out, upstreams

import sanm_kernels as sk

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")


def run(backend, views, lam, permutation, rows, upstream):
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    views = [(v if v.device.type == device else v.to(device)).requires_grad_() for v in views]
    mixed = sk.mixup_views(views, lam, permutation.to(device), rows=rows, backend=backend)
    grads = torch.autograd.grad(mixed, views, upstream.to(device))
    return mixed.detach().cpu(), [g.cpu() for g in grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 40, 33), (4,)])
def test_rows_and_gradients(dtype, layout, shape):
    sizes, rows = (3, 0, 2, 4), 6
    views = [lay_out(torch.randn(b, *shape).to(dtype), layout) for b in sizes]
    permutation = torch.randperm(9)
    for name, upstream in upstreams((rows, *shape), dtype).items():
        a, ga = run("triton", [v.detach() for v in views], 0.3, permutation, rows, upstream)
        b, gb = run("reference", [v.detach() for v in views], 0.3, permutation, rows, upstream)
        assert torch.equal(a, b) and a.stride() == b.stride(), name
        for x, y in zip(ga, gb, strict=True):
            assert torch.equal(x, y) and x.stride() == y.stride(), name


def test_no_rows():
    views = [torch.randn(2, 3), torch.randn(1, 3)]
    for rows in (0, 3):
        upstream = torch.ones(rows, 3)
        a, ga = run("triton", [v.detach() for v in views], 0.9, torch.arange(3), rows, upstream)
        b, gb = run("reference", [v.detach() for v in views], 0.9, torch.arange(3), rows, upstream)
        assert torch.equal(a, b) and all(map(torch.equal, ga, gb))
