"""The gradients of masked_forward on the GPU backends, called directly: on a GPU, or emulated."""

from __future__ import annotations

import torch
from inputs import DTYPES, LAYOUTS, call_operator, each, lay_out, upstreams
from tolerances import assert_accurate
from torch import Tensor

from sanm_kernels.reference import masked_forward as reference

SANITIZED = (
    "cuda and float32 and contiguous",
    "cuda and (float32 or ties or empty) and not (strided or transposed or offset)",
)


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
            got = call_operator(backend, "modulate_backward", *arguments)
            exact = reference.modulate_backward(grad.double(), targets.double(), ratio, clamp)
            eager = reference.modulate_backward(*arguments)
            assert got.dtype == dtype and got.is_contiguous()
            assert_accurate(got, exact, eager, f"{name}, clamp {clamp}")
            assert torch.equal(got, call_operator(backend, "modulate_backward", *arguments))


def test_targets_with_ties_lose_the_first(backend):
    targets = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]])
    grad = torch.tensor([[[1.0, 2.0, 4.0, 9.0], [1.0, 2.0, 4.0, 10.0]]])
    got = call_operator(backend, "modulate_backward", grad, targets, torch.ones(1, 2), True)
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
        got = call_operator(backend, "masked_views_backward", *arguments)
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
        assert torch.equal(got, call_operator(backend, "masked_views_backward", *arguments))


def test_images_from_expanded_gradients_and_strided_boxes(backend):
    boxes = some_boxes(2, 3, 6, 5)
    for name, grad in upstreams((6, 3, 6, 5), torch.float32).items():
        for b in (boxes, lay_out(boxes, "transposed")):
            got = call_operator(backend, "masked_views_backward", grad, b, True)
            exact = reference.masked_views_backward(grad.contiguous().double(), boxes, True)
            eager = reference.masked_views_backward(grad.contiguous(), boxes, True)
            assert_accurate(got, exact, eager, name)


# --- empty batches -------------------------------------------------------------------------------


def test_empty_batch(backend):
    grad, targets, ratio = torch.randn(2, 0, 5), torch.randn(0, 5), torch.rand(2, 0)
    assert call_operator(backend, "modulate_backward", grad, targets, ratio, True).shape == (0, 5)
    boxes = torch.zeros(2, 0, 4, dtype=torch.int32)
    for mean_fill in (False, True):
        views = torch.randn(0, 3, 4, 4)
        got = call_operator(backend, "masked_views_backward", views, boxes, mean_fill)
        assert got.shape == (0, 3, 4, 4)
