"""Triton's reconstruction_loss against the reference: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, LAYOUTS, TRITON_DEVICE, lay_out
from tolerances import assert_accurate

import sanm_kernels as sk

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient(dtype, layout, masked):
    images = torch.rand(3, 4, 13, 11).to(dtype)
    rebuilt = torch.rand(6, 4, 13, 11).to(dtype)
    low = torch.randint(0, 6, (2, 3, 2))
    boxes = torch.cat([low, low + torch.randint(0, 6, (2, 3, 2))], -1) if masked else None
    runs = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        device = TRITON_DEVICE if backend == "triton" else "cpu"
        r = lay_out(rebuilt, layout).to(kind)
        r = (r if device == "cpu" else r.to(device)).requires_grad_()
        x = lay_out(images, layout).to(device, kind)
        loss = sk.reconstruction_loss(
            r,
            x,
            boxes=boxes if boxes is None else boxes.to(device),
            region="masked" if masked else "image",
            backend=backend,
        )
        (grad,) = torch.autograd.grad(loss * -1.7, r)
        runs.append((loss.detach().cpu(), grad.cpu()))
        if backend == "triton":
            last = r.is_contiguous(memory_format=torch.channels_last) and not r.is_contiguous()
            kind = torch.channels_last if last else torch.contiguous_format
            assert grad.is_contiguous(memory_format=kind)
    for got, exact, eager in zip(*runs, strict=True):
        assert_accurate(got, exact, eager, roundings=16.0)


def test_nothing_to_count():
    x = torch.rand(2, 3, 4, 5, device=TRITON_DEVICE)
    boxes = torch.zeros(1, 2, 4, dtype=torch.int64, device=TRITON_DEVICE)
    r = torch.rand_like(x).requires_grad_()
    loss = sk.reconstruction_loss(r, x, boxes=boxes, region="masked", backend="triton")
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, r)[0].any()
