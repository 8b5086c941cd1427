"""Tensors of more than 2³¹ elements on the CPU kernels: what lies past that is what it should be.

What is compared is mostly the same call on the last few samples alone. Tests that take up to 11 GiB
run with SANM_TEST_LARGE=1 only, and where so much is free.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels import backends

PAST = 2**31
PERIOD = 67  # a prime: an index that has lost 2³¹ or 2³² meets other values
needs_library = pytest.mark.skipif(
    backends.load("cpu") is not None, reason=str(backends.load("cpu"))
)
asked = pytest.mark.skipif(
    os.environ.get("SANM_TEST_LARGE") != "1", reason="takes gibibytes: SANM_TEST_LARGE=1"
)


def needs(gib: float) -> None:
    """Skip where less memory is free, and say how much is."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        pytest.skip("the system does not say how much memory is free")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) / 2**20
    if free < gib + 1:
        pytest.skip(f"{free:.1f} GiB are free, it takes {gib} and one to spare")


def periodic(rows: int, *shape: int) -> Tensor:
    """(rows, *shape) float16 in [0, 1); every PERIOD-th row is the same."""
    base = torch.rand(PERIOD, *shape).half()
    result = torch.empty(rows, *shape, dtype=torch.float16)
    for first in range(0, rows, PERIOD):
        result[first : first + PERIOD] = base[: rows - first]
    return result


@needs_library
@asked
def test_masked_forward_views():
    needs(7)
    B = 7200
    images, features = periodic(B, 3, 224, 224), torch.randn(B, 8, 3, 3)
    labels, clean, index = torch.randint(0, 10, (B,)), torch.rand(B), torch.arange(B)
    config = sk.MaskConfig.official_cifar()

    def call(rows: slice) -> sk.MaskedForward:
        return sk.masked_forward(
            features[rows], labels[rows], clean[rows], images=images[rows], num_classes=10,
            config=config, generator=5, sample_index=index[rows], backend="cpu",
        )  # fmt: skip

    whole, last = call(slice(None)), call(slice(B - 5, B))
    assert whole.images_masked.numel() > PAST
    for kind in ("max", "min"):
        assert torch.equal(getattr(whole, f"box_{kind}")[-5:], getattr(last, f"box_{kind}"))
        assert torch.equal(getattr(whole, f"images_{kind}")[-5:], getattr(last, f"images_{kind}"))


@needs_library
@asked
def test_masked_forward_of_one_large_image():
    needs(9)
    side = 46_400
    image, features = periodic(side, side)[None, None], torch.zeros(1, 1, 8, 8)
    features[..., 7, 7] = 1  # the box lies at the end of memory
    config = sk.MaskConfig(
        position="corner", views=("max",), fill_value=3.0, ratio_low=0.01, ratio_high=0.01
    )
    result = sk.masked_forward(
        features, torch.tensor([0]), torch.ones(1), images=image, num_classes=2, config=config,
        generator=1, backend="cpu",
    )  # fmt: skip
    assert image.numel() > PAST
    y0, x0, y1, x1 = result.box_max[0].tolist()
    assert y0 * side < PAST < y1 * side
    view = result.images_max[0, 0]
    for y in (0, y0 - 1, y0, (y0 + y1) // 2, side - 1):
        expected = image[0, 0, y].clone()
        if y0 <= y < y1:
            expected[x0:x1] = 3
        assert torch.equal(view[y], expected), y


@needs_library
@asked
def test_activation_stats():
    needs(5)
    features = periodic(65_600, 512, 8, 8)
    assert features.numel() > PAST
    stats = sk.activation_stats(features, (32, 32), backend="cpu")
    last = sk.activation_stats(features[-5:], (32, 32), backend="cpu")
    assert all(torch.equal(a[-5:], b) for a, b in zip(stats, last, strict=True))


@needs_library
@asked
def test_mixup_views():
    """Output of more than 2³¹ elements, from views that share their memory; and its gradient."""
    needs(9)
    view, count = periodic(PERIOD, 3, 224, 224), 213
    total = PERIOD * count
    permutation = torch.randperm(total)
    mixed = sk.mixup_views([view] * count, 0.25, permutation, backend="cpu")
    assert mixed.numel() > PAST
    for i in (0, total // 2, total - 2, total - 1):
        x, y = view[i % PERIOD].float(), view[permutation[i] % PERIOD].float()
        assert torch.equal(mixed[i], (0.25 * x + 0.75 * y).half()), i
    lam = torch.tensor([0.25], dtype=torch.float64)
    gradients = torch.ops.sanm_kernels.mixup_views_backward.cpu(
        mixed, lam, permutation, [total - 3, 3]
    )
    inverse = permutation.argsort()
    for i in (0, total - 1):
        own, other = mixed[i].float(), mixed[inverse[i]].float()
        got = gradients[0][i] if i == 0 else gradients[1][2]
        assert torch.equal(got, (0.25 * own + 0.75 * other).half()), i


@needs_library
@asked
def test_mixup_of_one_large_row():
    needs(9)
    row = periodic(46_400, 46_400).view(1, -1)
    assert row.numel() > PAST
    mixed = sk.mixup_views([row], 0.5, torch.tensor([0]), backend="cpu")
    assert torch.equal(mixed[0, -(10**6) :], row[0, -(10**6) :])
    assert torch.equal(mixed[0, PAST - 1000 : PAST + 1000], row[0, PAST - 1000 : PAST + 1000])


@needs_library
@asked
@pytest.mark.parametrize("region", ["image", "masked"])
def test_reconstruction_loss(region):
    """Equal but for one element, past 2³¹: the loss and its gradient are that element's."""
    needs(11)
    B = 7200
    images = periodic(B, 3, 224, 224)
    rebuilt = torch.cat([images, images])
    assert rebuilt.numel() > PAST
    rebuilt[-1, 2, 200, 199] = images[-1, 2, 200, 199] + 64
    difference = (rebuilt[-1, 2, 200, 199].float() - images[-1, 2, 200, 199].float()).item()
    boxes = torch.tensor([190, 190, 224, 224]).expand(2, B, 4)
    loss = sk.reconstruction_loss(
        rebuilt.requires_grad_(), images, boxes=boxes, region=region, backend="cpu"
    )
    count = images.numel() if region == "image" else B * 3 * 34 * 34
    torch.testing.assert_close(loss.item(), difference**2 / count, rtol=1e-6, atol=0)
    scale = float(2**20)  # or the gradient would vanish in float16
    (gradient,) = torch.autograd.grad(loss, rebuilt, torch.tensor(scale))
    expected = torch.tensor(scale * 2 * difference / count).half()
    assert gradient[-1, 2, 200, 199] == expected != 0
    assert not gradient[-1, :2].any() and not gradient[:3].any() and not gradient[B : B + 3].any()


@needs_library
@asked
@pytest.mark.parametrize("function", ["sample_loss", "masked_loss"])
def test_losses_of_many_rows(function):
    needs(10)
    B, K = 2**21 + 100, 1024
    logits, labels = periodic(B, K), torch.randint(0, K, (B,))
    assert logits.numel() > PAST

    def call(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        if function == "sample_loss":
            rows = sk.sample_loss(z, y, backend="cpu")
        else:
            rows = sk.masked_loss(z, y, ratio=torch.full((len(y),), 0.1), backend="cpu").per_sample
        return rows.detach(), torch.autograd.grad(rows.sum(), z)[0]

    rows, gradient = call(logits, labels)
    last, of_last = call(logits[-50:], labels[-50:])
    assert torch.equal(rows[-50:], last) and torch.equal(gradient[-50:], of_last)
    assert rows.isfinite().all()


@needs_library
def test_targets_far_apart():
    """Few soft targets whose strides reach past 2³¹ elements, in memory that is hardly touched."""
    n, K, far = 64, 4, PAST // 60
    targets = torch.empty(n * far, dtype=torch.float16).as_strided((n, K), (far, 2**17))
    targets.copy_(torch.softmax(torch.randn(n, K), 1))
    assert (n - 1) * far > PAST
    logits = torch.randn(n, K)
    got = sk.masked_loss(logits, targets, backend="cpu")
    expected = sk.masked_loss(logits, targets.contiguous(), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
