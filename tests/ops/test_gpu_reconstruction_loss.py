"""reconstruction_loss of the GPU backends against the reference: on a GPU or without one."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, each, lay_out
from tolerances import assert_accurate

import sanm_kernels as sk
from sanm_kernels.backends import load

SANITIZED = (
    "cuda and contiguous and aligned and torch.float32",
    "cuda and not transposed",
)


def check(chosen, rebuilt, images, boxes, layout):
    dtype, runs = rebuilt.dtype, []
    for backend, kind in ((chosen, dtype), ("reference", torch.float64), ("reference", dtype)):
        device = GPU_DEVICES.get(backend, "cpu")
        r = lay_out(rebuilt, layout).to(kind)
        r = (r if device == "cpu" else r.to(device)).requires_grad_()
        x = lay_out(images, layout).to(device, kind if kind == torch.float64 else images.dtype)
        loss = sk.reconstruction_loss(
            r,
            x,
            boxes=boxes if boxes is None else boxes.to(device),
            region="image" if boxes is None else "masked",
            backend=backend,
        )
        (grad,) = torch.autograd.grad(loss * -1.7, r)
        runs.append((loss.detach().cpu(), grad.cpu()))
        if backend == chosen:
            last = r.is_contiguous(memory_format=torch.channels_last) and not r.is_contiguous()
            kind = torch.channels_last if last else torch.contiguous_format
            assert grad.is_contiguous(memory_format=kind)
    for got, exact, eager in zip(*runs, strict=True):
        assert_accurate(got, exact, eager, roundings=16.0)


@each(masked=[False, True], layout=LAYOUTS, dtype=DTYPES)
def test_loss_and_gradient(backend, dtype, layout, masked):
    images = torch.rand(3, 4, 13, 11).to(dtype)
    rebuilt = torch.rand(6, 4, 13, 11).to(dtype)
    low = torch.randint(0, 6, (2, 3, 2))
    boxes = torch.cat([low, low + torch.randint(0, 6, (2, 3, 2))], -1) if masked else None
    check(backend, rebuilt, images, boxes, layout)


@each(
    images_dtype=[None, torch.float32, torch.float16],
    layout=["contiguous", "channels_last"],
    dtype=DTYPES,
)
def test_aligned_lines_and_several_blocks_per_sample(backend, dtype, layout, images_dtype):
    if backend == "triton" and GPU_DEVICES[backend] == "cpu" and images_dtype is not None:
        pytest.skip("the interpreter is slow")
    images = torch.rand(1, 3, 48, 64).to(images_dtype or dtype)
    rebuilt = torch.rand(2, 3, 48, 64).to(dtype)
    check(backend, rebuilt, images, None, layout)
    for boxes in ((0, 0, 48, 64), (3, 8, 40, 32), (5, 7, 41, 58), (47, 1, 48, 2)):
        check(backend, rebuilt, images, torch.tensor([[boxes]]).repeat(2, 1, 1), layout)


def test_nothing_outside_the_boxes_is_read(backend):
    device = GPU_DEVICES[backend]
    rebuilt, images = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    boxes = torch.tensor([[[1, 2, 9, 13], [0, 5, 0, 9]]])
    hidden = torch.zeros(2, 3, 16, 16, dtype=torch.bool)
    hidden[0, :, 1:9, 2:13] = True
    losses = []
    for r in (rebuilt, torch.where(hidden, rebuilt, torch.nan)):
        r = r.to(device).requires_grad_()
        loss = sk.reconstruction_loss(
            r, images.to(device), boxes=boxes.to(device), region="masked", backend=backend
        )
        assert torch.equal(torch.autograd.grad(loss, r)[0].cpu() != 0, hidden)
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_nothing_to_count(backend):
    device = GPU_DEVICES[backend]
    x = torch.rand(2, 3, 4, 5, device=device)
    boxes = torch.zeros(1, 2, 4, dtype=torch.int64, device=device)
    r = torch.rand_like(x).requires_grad_()
    loss = sk.reconstruction_loss(r, x, boxes=boxes, region="masked", backend=backend)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, r)[0].any()


@pytest.mark.parametrize("masked", [False, True])
def test_no_images(backend, masked):
    device = GPU_DEVICES[backend]
    r = torch.zeros(0, 3, 4, 5, device=device, requires_grad=True)
    boxes = torch.zeros(2, 0, 4, dtype=torch.int64, device=device) if masked else None
    region = "masked" if masked else "image"
    loss = sk.reconstruction_loss(r, r.detach(), boxes=boxes, region=region, backend=backend)
    assert loss.item() == 0 and torch.autograd.grad(loss, r)[0].shape == r.shape


@pytest.mark.parametrize(
    "wrong", [(-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 5, 2), (0, 0, 2, 6), (3, 0, 2, 2)]
)
def test_a_box_outside_the_image_gives_nan_in_its_sample(wrong, unchecked):
    """The CUDA kernels say so; Triton's count what lies inside the image."""
    device = GPU_DEVICES["cuda"]
    if device is None:
        pytest.skip(load("cuda"))
    r = torch.rand(2, 3, 4, 5, device=device, requires_grad=True)
    boxes = torch.tensor([[wrong, (0, 0, 2, 2)]], device=device)
    loss = sk.reconstruction_loss(
        r, torch.zeros_like(r), boxes=boxes, region="masked", backend="cuda"
    )
    (grad,) = torch.autograd.grad(loss, r)
    assert loss.isnan() and grad[0].isnan().all() and grad[1].isfinite().all()
