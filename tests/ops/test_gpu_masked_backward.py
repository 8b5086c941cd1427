"""The gradients of masked_forward on the GPU backends, called directly: on a GPU, or emulated."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, each, lay_out, upstreams
from tolerances import assert_accurate, assert_parallel
from torch import Tensor

from sanm_kernels.backends import load
from sanm_kernels.reference import masked_forward as reference

SANITIZED = (
    "cuda and float32 and contiguous",
    "cuda and (float32 or ties or missing or empty) and not (strided or transposed or offset)",
)


def on_device(x: object, device: str) -> object:
    """Tensors on the device, with their strides and their offset from an aligned address."""
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if n > 0)
    storage = torch.zeros(extent + x.storage_offset(), dtype=x.dtype, device=device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def call(backend: str, op: str, *arguments: object) -> object:
    assert load(backend) is None
    overload = getattr(getattr(torch.ops.sanm_kernels, op), backend)
    results = overload(*(on_device(x, GPU_DEVICES[backend]) for x in arguments))
    return [r.cpu() for r in results] if isinstance(results, tuple) else results.cpu()


def double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


# --- targets -------------------------------------------------------------------------------------


@each(size=[(1, 5, 2), (2, 9, 10), (2, 3, 64), (1, 2, 1100)], layout=LAYOUTS, dtype=DTYPES)
def test_targets(backend, size, layout, dtype):
    sets, batch, classes = size
    scale = 3 if classes < 1000 else 1
    targets = lay_out(torch.softmax(torch.randn(batch, classes) * scale, 1).to(dtype), layout)
    top = targets.amax(1).float()
    ratio = torch.rand(sets, batch) * 2 * top  # drops all of the largest target, or some of it
    ratio[:, 0] = top[0]  # or exactly it
    for name, grad in upstreams((sets, batch, classes), dtype).items():
        for clamp in (True, False):
            arguments = (grad, targets, ratio, clamp)
            got = call(backend, "modulate_backward", *arguments)
            exact = reference.modulate_backward(grad.double(), targets.double(), ratio, clamp)
            eager = reference.modulate_backward(*arguments)
            assert got.dtype == dtype and got.is_contiguous()
            assert_accurate(got, exact, eager, f"{name}, clamp {clamp}")
            assert torch.equal(got, call(backend, "modulate_backward", *arguments))


def test_targets_with_ties_lose_the_first(backend):
    targets = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]])
    grad = torch.tensor([[[1.0, 2.0, 4.0, 9.0], [1.0, 2.0, 4.0, 10.0]]])
    got = call(backend, "modulate_backward", grad, targets, torch.ones(1, 2), True)
    assert got.tolist() == [[5.0, 2.0, 4.0, 9.0], [1.0, 5.0, 4.0, 10.0]]


# --- images --------------------------------------------------------------------------------------


def some_boxes(views: int, batch: int, height: int, width: int) -> Tensor:
    """Boxes (V, B, 4), among them the smallest and the whole image."""
    ends = []
    for size in (height, width):
        low = torch.randint(0, size, (views, batch))
        ends.append((low, low + 1 + (torch.rand(views, batch) * (size - low)).long()))
    boxes = torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 2).int()
    if batch > 1:
        boxes[0, 1] = torch.tensor([0, 0, height, width])
    return boxes


@each(
    size=[(2, 3, 3, 8, 8), (1, 2, 3, 7, 5), (2, 2, 1, 16, 12), (2, 3, 8, 4, 6), (1, 2, 3, 48, 40)],
    layout=LAYOUTS,
    dtype=DTYPES,
)
def test_images(backend, size, layout, dtype):
    views, batch, channels, height, width = size
    boxes = some_boxes(views, batch, height, width)
    grad = lay_out(torch.randn(views * batch, channels, height, width).to(dtype), layout)
    for mean_fill in (False, True):
        arguments = (grad, boxes, mean_fill)
        got = call(backend, "masked_views_backward", *arguments)
        exact = reference.masked_views_backward(grad.double(), boxes, mean_fill)
        eager = reference.masked_views_backward(*arguments)
        assert got.dtype == dtype
        last = reference.is_channels_last(grad)
        if backend == "cuda":
            form = torch.channels_last if last else torch.contiguous_format
            assert got.is_contiguous(memory_format=form)
        if mean_fill:
            assert_accurate(got, exact, eager, f"mean fill {mean_fill}")
        else:
            assert torch.equal(got, eager)
        assert torch.equal(got, call(backend, "masked_views_backward", *arguments))


def test_images_from_expanded_gradients_and_strided_boxes(backend):
    boxes = some_boxes(2, 3, 6, 5)
    for name, grad in upstreams((6, 3, 6, 5), torch.float32).items():
        for b in (boxes, lay_out(boxes, "transposed")):
            got = call(backend, "masked_views_backward", grad, b, True)
            exact = reference.masked_views_backward(grad.contiguous().double(), boxes, True)
            eager = reference.masked_views_backward(grad.contiguous(), boxes, True)
            assert_accurate(got, exact, eager, name)


# --- classifier ----------------------------------------------------------------------------------


def classifier_case(
    batch: int, classes: int, channels: int, h: int, w: int, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    acc = torch.promote_types(dtype, torch.float32)
    visible = torch.rand(batch, h, w, dtype=acc)
    return {
        "grad_logits": torch.randn(batch, classes, dtype=acc),
        "grad_loss": torch.tensor(0.7, dtype=acc),
        "features": torch.randn(batch, channels, h, w).to(dtype),
        "weight": torch.randn(classes, channels) / channels**0.5,
        "logits": torch.randn(batch, classes, dtype=acc) * 3,
        "targets": torch.softmax(torch.randn(batch, classes), 1),
        "pooled": torch.randn(batch, channels, dtype=acc),
        "visible": visible / visible.sum((1, 2), keepdim=True),
    }


def check_classifier(backend: str, case: dict[str, Tensor | None]) -> None:
    got = call(backend, "classifier_backward", *case.values())
    exact = reference.classifier_backward(*(double(v) for v in case.values()))
    eager = reference.classifier_backward(*case.values())
    again = call(backend, "classifier_backward", *case.values())
    for name, g, e, b, a in zip(("dF", "dW", "dbias"), got, exact, eager, again, strict=True):
        assert g.dtype == b.dtype, name
        last = name == "dF" and reference.is_channels_last(case["features"])
        assert g.is_contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        ), name
        assert_accurate(g, e, b, name, 16)
        assert_parallel(g, e, name)
        assert torch.equal(g, a), name


#: batch, classes, channels, h, w
MAPS = (
    (5, 10, 16, 7, 7), (3, 2, 5, 3, 1), (40, 33, 8, 2, 2), (2, 1100, 24, 4, 4), (2, 3, 600, 7, 7),
)  # fmt: skip


@each(size=MAPS, layout=["contiguous", "channels_last", "transposed"], dtype=DTYPES)
def test_classifier(backend, size, layout, dtype):
    case = classifier_case(*size, dtype)
    case["features"] = lay_out(case["features"], layout)
    check_classifier(backend, case)


@pytest.mark.parametrize("given", (("grad_logits",), ("grad_loss",), ()))
def test_classifier_with_gradients_missing(backend, given):
    case = classifier_case(4, 6, 12, 3, 3, torch.float32)
    for name in ("grad_logits", "grad_loss"):
        if name not in given:
            case[name] = None
    check_classifier(backend, case)


@each(dtype=[torch.float32, torch.float64], of_targets=DTYPES)
def test_classifier_dtypes_and_strides(backend, dtype, of_targets):
    case = classifier_case(4, 6, 12, 3, 3, dtype)
    case["weight"] = case["weight"].to(torch.bfloat16)
    for layout in ("transposed", "strided", "offset"):
        for name in ("grad_logits", "weight", "targets", "pooled", "visible"):
            case[name] = lay_out(case[name].to(of_targets if name == "targets" else
                                               case[name].dtype), layout)  # fmt: skip
        if backend == "triton":  # which takes these two as masked_forward leaves them
            case["visible"] = case["visible"].contiguous()
        check_classifier(backend, case)
    case["grad_logits"] = torch.tensor(0.3, dtype=dtype).expand(4, 6)
    check_classifier(backend, case)


@pytest.mark.parametrize("channels_last", (False, True))
def test_nothing_visible_has_no_gradient(backend, channels_last):
    case = classifier_case(2, 4, 8, 2, 2, torch.float32)
    case["visible"] = torch.zeros_like(case["visible"])
    if channels_last:
        case["features"] = lay_out(case["features"], "channels_last")
    df, _, _ = call(backend, "classifier_backward", *case.values())
    assert not df.any()


# --- empty batches -------------------------------------------------------------------------------


def test_empty_batch(backend):
    grad, targets, ratio = torch.randn(2, 0, 5), torch.randn(0, 5), torch.rand(2, 0)
    assert call(backend, "modulate_backward", grad, targets, ratio, True).shape == (0, 5)
    boxes = torch.zeros(2, 0, 4, dtype=torch.int32)
    for mean_fill in (False, True):
        views = torch.randn(0, 3, 4, 4)
        got = call(backend, "masked_views_backward", views, boxes, mean_fill)
        assert got.shape == (0, 3, 4, 4)
    case = classifier_case(0, 5, 6, 2, 2, torch.float32)
    df, dw, db = call(backend, "classifier_backward", *case.values())
    assert df.shape == (0, 6, 2, 2) and dw.shape == (5, 6) and db.shape == (5,)
    assert not dw.any() and not db.any()
