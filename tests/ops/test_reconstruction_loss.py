"""reconstruction_loss against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, LAYOUTS, assert_refused, each, lay_out, upstreams
from tolerances import assert_accurate, assert_parallel
from torch._dynamo.testing import CompileCounterWithBackend

import sanm_kernels as sk
from sanm_kernels.backends import load

BACKENDS = ("reference", "cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)


def plain(reconstruction, images, boxes=None, compute=torch.float64):
    """One view after the other; inside the boxes, one sample after the other."""
    r, x = reconstruction.to(compute), images.to(compute)
    if boxes is None:
        return sum(F.mse_loss(view, x) for view in r.split(len(x)))
    total = r.sum() * 0
    for view, view_boxes in zip(r.split(len(x)), boxes, strict=True):
        parts = [
            (view[i] - x[i])[:, y0:y1, x0:x1].reshape(-1)
            for i, (y0, x0, y1, x1) in enumerate(view_boxes.tolist())
        ]
        elements = torch.cat(parts)
        if len(elements):
            total = total + elements.square().mean()
    return total


def example(V=2, B=3, C=3, H=9, W=7, dtype=torch.float32, layout="contiguous"):
    reconstruction = lay_out(torch.rand(V * B, C, H, W).to(dtype), layout)
    images = lay_out(torch.rand(B, C, H, W).to(dtype), layout)
    y, x = torch.randint(0, H + 1, (V, B, 2)), torch.randint(0, W + 1, (V, B, 2))
    boxes = torch.stack([y.amin(2), x.amin(2), y.amax(2), x.amax(2)], 2)
    return reconstruction, images, boxes


def check(backend, reconstruction, images, boxes=None, upstream=1.3):
    region = "image" if boxes is None else "masked"
    dtype = torch.float64 if reconstruction.dtype == torch.float64 else torch.float32
    runs = []
    for function in (
        lambda r: sk.reconstruction_loss(r, images, boxes=boxes, region=region, backend=backend),
        lambda r: plain(r, images, boxes),
        lambda r: plain(r, images, boxes, dtype),
    ):
        r = reconstruction.detach().requires_grad_()
        loss = function(r)
        runs.append((loss, torch.autograd.grad(upstream * loss, r)[0]))
    (got, grad), (exact, exact_grad), (eager, eager_grad) = runs
    assert got.dtype == dtype and grad.dtype == reconstruction.dtype
    # Plain torch in float64 is the yardstick itself there, so its own error does not show.
    roundings = 16.0 if dtype == torch.float64 else 4.0
    assert_accurate(got, exact, eager, roundings=roundings)
    assert_accurate(grad, exact_grad, eager_grad, "gradient", roundings)
    assert_parallel(grad, exact_grad)
    return grad


@backends
@each(dtype=DTYPES, layout=LAYOUTS, region=["image", "masked"])
def test_loss_and_gradient(backend, dtype, layout, region):
    reconstruction, images, boxes = example(dtype=dtype, layout=layout)
    grad = check(backend, reconstruction, images, boxes if region == "masked" else None)
    if layout == "channels_last":
        assert grad.is_contiguous(memory_format=torch.channels_last)


SIZES = (
    {"V": 1, "B": 1, "C": 1, "H": 1, "W": 1},
    {"V": 3, "B": 2, "C": 4},
    {"V": 1, "B": 70},
    {"C": 1},
    {"B": 2, "H": 40, "W": 41},
    {"V": 1, "B": 1, "C": 2, "H": 1, "W": 2000},
)


@backends
@each(size=SIZES, layout=["contiguous", "channels_last"])
def test_odd_sizes(backend, size, layout):
    reconstruction, images, boxes = example(layout=layout, **size)
    check(backend, reconstruction, images)
    check(backend, reconstruction, images, boxes)


@backends
@each(dtype=DTYPES, images_dtype=DTYPES, images_layout=["contiguous", "channels_last", "strided"])
def test_images_of_another_dtype_or_layout(backend, dtype, images_dtype, images_layout):
    reconstruction, images, boxes = example(dtype=dtype)
    images = lay_out(images.to(images_dtype), images_layout)
    check(backend, reconstruction, images)
    check(backend, reconstruction.contiguous(memory_format=torch.channels_last), images, boxes)


@backends
def test_boxes_in_every_form(backend):
    reconstruction, images, boxes = example()
    losses = [
        sk.reconstruction_loss(reconstruction, images, boxes=form, region="masked", backend=backend)
        for form in (boxes, boxes.int(), list(boxes), tuple(boxes.int()), lay_out(boxes, "strided"))
    ]
    assert all(torch.equal(losses[0], loss) for loss in losses)
    unused = sk.reconstruction_loss(reconstruction, images, boxes=boxes, backend=backend)
    assert torch.equal(unused, sk.reconstruction_loss(reconstruction, images, backend=backend))


@backends
def test_boxes_over_the_whole_image_equal_no_boxes(backend):
    reconstruction, images, _ = example()
    boxes = torch.tensor([0, 0, 9, 7]).expand(2, 3, 4)
    a = sk.reconstruction_loss(
        reconstruction, images, boxes=boxes, region="masked", backend=backend
    )
    torch.testing.assert_close(a, sk.reconstruction_loss(reconstruction, images, backend=backend))


@backends
def test_nothing_outside_the_boxes_matters(backend):
    reconstruction, images, boxes = example()
    boxes[:, 0] = 0  # an empty box
    hidden = torch.zeros(2, 3, 1, 9, 7, dtype=torch.bool)
    for v in range(2):
        for b in range(3):
            y0, x0, y1, x1 = boxes[v, b]
            hidden[v, b, :, y0:y1, x0:x1] = True
    hidden = hidden.reshape(6, 1, 9, 7).expand(6, 3, 9, 7)
    spoiled = torch.where(hidden, reconstruction, torch.nan).requires_grad_()
    loss = sk.reconstruction_loss(spoiled, images, boxes=boxes, region="masked", backend=backend)
    assert torch.equal(
        loss,
        sk.reconstruction_loss(
            reconstruction, images, boxes=boxes, region="masked", backend=backend
        ),
    )
    (grad,) = torch.autograd.grad(loss, spoiled)
    assert torch.equal(grad != 0, hidden)


@backends
def test_empty_boxes_and_empty_batches_give_zero(backend):
    reconstruction, images, boxes = example()
    r = reconstruction.requires_grad_()
    loss = sk.reconstruction_loss(r, images, boxes=boxes * 0, region="masked", backend=backend)
    assert loss == 0 and (torch.autograd.grad(loss, r)[0] == 0).all()
    r = torch.zeros(0, 3, 4, 4, requires_grad=True)
    for kwargs in ({}, {"boxes": torch.zeros(2, 0, 4).long(), "region": "masked"}):
        loss = sk.reconstruction_loss(r, r.detach(), backend=backend, **kwargs)
        assert loss == 0 and torch.autograd.grad(loss, r)[0].shape == r.shape


@backends
def test_images_are_constants(backend):
    reconstruction, images, _ = example()
    images.requires_grad_()
    sk.reconstruction_loss(reconstruction.requires_grad_(), images, backend=backend).backward()
    assert images.grad is None


@backends
@pytest.mark.parametrize("kind", ["dense", "expanded"])
def test_upstream_gradients(backend, kind):
    reconstruction, images, boxes = example()
    check(backend, reconstruction, images, boxes, upstreams((), torch.float32)[kind])


@each(backend=BACKENDS, masked=[False, True])
def test_gradcheck(backend, masked):
    reconstruction, images, boxes = example(B=2, H=3, W=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r: sk.reconstruction_loss(
            r, images, boxes=boxes, backend=backend, region="masked" if masked else "image"
        ),
        (reconstruction.requires_grad_(),),
    )


@backends
def test_same_bits_for_any_number_of_threads(backend):
    reconstruction, images, boxes = example(B=40, H=32, W=32)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 1, 2, 3) if backend == "cpu" else (1, 1):
            torch.set_num_threads(number)
            results.append(
                [
                    sk.reconstruction_loss(
                        reconstruction, images, boxes=boxes, region=region, backend=backend
                    )
                    for region in ("image", "masked")
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(r == results[0] for r in results)


@each(backend=BACKENDS, layout=["contiguous", "channels_last", "transposed"])
def test_opcheck(backend, layout):
    load(backend)
    op = getattr(torch.ops.sanm_kernels.reconstruction_loss, backend)
    for dtype in (torch.float32, torch.bfloat16):
        reconstruction, images, boxes = example(B=2, H=3, W=4, dtype=dtype, layout=layout)
        reconstruction.requires_grad_()
        torch.library.opcheck(op, (reconstruction, images, None))
        torch.library.opcheck(op, (reconstruction, images, boxes))


@backends
def test_compiles_once_for_any_batch(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(r, images, boxes):
        return 3 * sk.reconstruction_loss(
            r, images, boxes=[boxes, boxes], region="masked", backend=backend
        )

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for n in (8, 13, 21, 34):
        reconstruction, images, boxes = example(B=n)
        r = reconstruction.requires_grad_()
        results = [f(r, images, boxes[0]) for f in (compiled, function)]
        assert torch.equal(*results)
        assert torch.equal(*(torch.autograd.grad(x, r)[0] for x in results))
    assert counter.frame_count == 1


@backends
def test_autocast(backend):
    """A bfloat16 reconstruction from autocast is compared with float32 images."""
    images, weight = torch.rand(2, 3, 6, 6), torch.randn(3, 3, 1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        r = F.conv2d(images, weight)
        loss = sk.reconstruction_loss(r, images, backend=backend)
    assert r.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.mse_loss(r.float(), images))
    loss.backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


R, X = torch.zeros(4, 3, 5, 6), torch.zeros(2, 3, 5, 6)
BOXES = torch.tensor([1, 1, 3, 4]).repeat(2, 2, 1)
MASKED = {"boxes": BOXES, "region": "masked"}


def moved(k, value):
    boxes = BOXES.clone()
    boxes[1, 0, k] = value
    return {"boxes": boxes, "region": "masked"}


WRONG = {
    "reconstruction no tensor": (TypeError, "reconstruction", (1, X), {}),
    "reconstruction integer": (TypeError, "reconstruction", (R.long(), X), {}),
    "reconstruction 3-d": (ValueError, "reconstruction", (R[0], X), {}),
    "images 3-d": (ValueError, "images", (R, X[0]), {}),
    "images integer": (TypeError, "images", (R, X.byte()), {}),
    "images device": (ValueError, "images", (R, X.to("meta")), {}),
    "sizes": (ValueError, "reconstruction", (R[..., :5], X), {}),
    "no multiple": (ValueError, "reconstruction", (R[:3], X), {}),
    "rows of nothing": (ValueError, "reconstruction", (R, X[:0]), {}),
    "region": (ValueError, "region", (R, X), {"region": "box"}),
    "boxes missing": (ValueError, "boxes", (R, X), {"region": "masked"}),
    "boxes float": (TypeError, "boxes", (R, X), {"boxes": BOXES.float(), "region": "masked"}),
    "boxes 2-d": (ValueError, "boxes", (R, X), {"boxes": BOXES[0], "region": "masked"}),
    "boxes views": (ValueError, "boxes", (R, X), {"boxes": BOXES[:1], "region": "masked"}),
    "boxes number": (TypeError, "boxes", (R, X), {"boxes": 3, "region": "masked"}),
    "boxes list empty": (ValueError, "boxes", (R, X), {"boxes": [], "region": "masked"}),
    "boxes list ragged": (
        ValueError,
        "boxes",
        (R, X),
        {"boxes": [BOXES[0], BOXES[1, :1]], "region": "masked"},
    ),
    "box above": (ValueError, "boxes", (R, X), moved(0, -1)),
    "box left": (ValueError, "boxes", (R, X), moved(1, -1)),
    "box below": (ValueError, "boxes", (R, X), moved(2, 6)),
    "box right": (ValueError, "boxes", (R, X), moved(3, 7)),
    "box inverted": (ValueError, "boxes", (R, X), moved(2, 0)),
    "box inverted sideways": (ValueError, "boxes", (R, X), moved(3, 0)),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(backend, name):
    error, message, arguments, kwargs = WRONG[name]
    assert_refused(sk.reconstruction_loss, error, message, arguments, {"backend": backend} | kwargs)
