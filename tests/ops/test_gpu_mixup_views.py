"""mixup_views of the GPU backends equals the reference to the last bit: on a GPU, or emulated."""

from __future__ import annotations

import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, each, lay_out, upstreams

import sanm_kernels as sk

SANITIZED = (
    "cuda and (1x40x33-contiguous-torch.float32 or 8x20x28-channels_last-torch.float16)",
    "cuda and not transposed",
)


def run(backend, views, lam, permutation, rows, upstream):
    device = GPU_DEVICES.get(backend, "cpu")
    views = [v.detach() for v in views]
    views = [(v if v.device.type == device else v.to(device)).requires_grad_() for v in views]
    mixed = sk.mixup_views(views, lam, permutation.to(device), rows=rows, backend=backend)
    grads = torch.autograd.grad(mixed, views, upstream.to(device))
    return mixed.detach().cpu(), [g.cpu() for g in grads]


def assert_same(backend, *arguments):
    a, ga = run(backend, *arguments)
    b, gb = run("reference", *arguments)
    for x, y in zip([a, *ga], [b, *gb], strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


@each(shape=[(3, 5, 7), (1, 40, 33), (4,), (8, 20, 28)], layout=LAYOUTS, dtype=DTYPES)
def test_rows_and_gradients(backend, dtype, layout, shape):
    sizes, rows = (3, 0, 2, 4), 6
    views = [lay_out(torch.randn(b, *shape).to(dtype), layout) for b in sizes]
    permutation = torch.randperm(9)
    for upstream in upstreams((rows, *shape), dtype).values():
        assert_same(backend, views, 0.3, permutation, rows, upstream)


def test_no_rows(backend):
    views = [torch.randn(2, 3), torch.randn(1, 3)]
    for rows in (0, 3):
        assert_same(backend, views, 0.9, torch.arange(3), rows, torch.ones(rows, 3))
    assert_same(backend, [torch.randn(2, 0)], 0.9, torch.arange(2), 2, torch.ones(2, 0))


def test_strided_permutation(backend):
    views = [torch.randn(2, 3), torch.randn(3, 3)]
    permutation = torch.stack([torch.randperm(5), torch.zeros(5, dtype=torch.int64)], 1)[:, 0]
    assert_same(backend, views, 0.3, permutation, 4, torch.randn(4, 3))


def test_more_views_than_one_launch_takes(backend):
    views = [torch.randn(1 + i % 2, 4) for i in range(70)]
    rows = sum(map(len, views))
    assert_same(backend, views, 0.3, torch.randperm(rows), rows, torch.randn(rows, 4))


def test_partner_outside_the_stack_gives_nan(backend, unchecked):
    device = GPU_DEVICES[backend]
    views = [torch.ones(2, 4, device=device), torch.ones(1, 4, device=device)]
    permutation = torch.tensor([3, 0, -1], device=device)
    out = sk.mixup_views(views, 0.5, permutation, backend=backend)
    assert out.isnan().all(1).tolist() == [True, False, True]
