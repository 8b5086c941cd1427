"""The one-pass classifier on the GPU backends: on a GPU, or emulated."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, call_operator, double, each, example, lay_out
from tolerances import assert_accurate, assert_parallel
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels.reference import masked_classifier as reference
from sanm_kernels.reference.masked_forward import is_channels_last

SANITIZED = (
    "cuda and (contiguous or channels_last or missing) and float32",
    "cuda and (float32 or missing or empty or large) and not (strided or transposed or offset)",
)
#: batch, classes, channels, h, w
MAPS = (
    (5, 10, 16, 7, 7), (3, 2, 5, 3, 1), (40, 33, 8, 2, 2), (2, 1100, 24, 4, 4), (2, 3, 600, 7, 7),
)  # fmt: skip


def forward_case(
    batch: int, classes: int, channels: int, h: int, w: int, dtype: torch.dtype
) -> dict[str, Tensor | int | None]:
    """The image has 40 × 30 pixels; boxes of any size, but none that hides all of it.

    Of cells of a broken number of pixels rounding may leave something, which would be all there is.
    """
    corners = torch.stack([torch.randint(n + 1, (batch, 2)).sort(1).values for n in (40, 29)], 2)
    box = corners.flatten(1).int()
    box[:1] = torch.tensor([0, 0, 40, 29])
    return {
        "features": torch.randn(batch, channels, h, w).to(dtype),
        "box": box,
        "targets": torch.softmax(torch.randn(batch, classes), 1),
        "weight": torch.randn(classes, channels) / channels**0.5,
        "bias": torch.randn(classes),
        "height": 40,
        "width": 30,
    }


def check_forward(backend: str, case: dict[str, Tensor | int | None]) -> None:
    got = call_operator(backend, "masked_classifier", *case.values())
    exact = reference.forward(*(double(v) for v in case.values()))
    eager = reference.forward(*case.values())
    again = call_operator(backend, "masked_classifier", *case.values())
    names = ("logits", "loss", "pooled", "visible")
    for name, g, e, b, a in zip(names, got, exact, eager, again, strict=True):
        assert g.dtype == b.dtype and g.is_contiguous(), name
        assert_accurate(g, e, b, name, 16)
        assert torch.equal(g, a), name


@each(size=MAPS, layout=["contiguous", "channels_last", "transposed"], dtype=DTYPES)
def test_forward(backend, size, layout, dtype):
    case = forward_case(*size, dtype)
    case["features"] = lay_out(case["features"], layout)
    check_forward(backend, case)


@each(layout=LAYOUTS, of_targets=DTYPES)
def test_forward_of_other_dtypes_and_strides(backend, layout, of_targets):
    case = forward_case(4, 6, 16, 3, 3, torch.float32)
    case["targets"] = case["targets"].to(of_targets)
    case["weight"] = case["weight"].to(torch.bfloat16)
    case = {k: lay_out(v, layout) if isinstance(v, Tensor) else v for k, v in case.items()}
    check_forward(backend, case)
    check_forward(backend, case | {"bias": None})


def test_forward_where_nothing_is_visible(backend):
    case = forward_case(2, 6, 8, 4, 3, torch.float32)
    case["box"] = torch.tensor([[0, 0, 40, 30], [-5, -1, 50, 31]]).int()
    logits, _, pooled, visible = call_operator(backend, "masked_classifier", *case.values())
    assert not pooled.any() and not visible.any()
    assert torch.equal(logits, case["bias"].expand(2, 6))


def test_forward_of_a_large_map(backend):
    """Of which the shares of visibility do not fit into shared memory."""
    check_forward(backend, forward_case(2, 3, 2, 300, 200, torch.float32))


def backward_case(
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


def check_backward(backend: str, case: dict[str, Tensor | None]) -> None:
    got = call_operator(backend, "masked_classifier_backward", *case.values())
    exact = reference.backward(*(double(v) for v in case.values()))
    eager = reference.backward(*case.values())
    again = call_operator(backend, "masked_classifier_backward", *case.values())
    for name, g, e, b, a in zip(("dF", "dW", "dbias"), got, exact, eager, again, strict=True):
        assert g.dtype == b.dtype, name
        last = name == "dF" and is_channels_last(case["features"])
        assert g.is_contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        ), name
        assert_accurate(g, e, b, name, 16)
        assert_parallel(g, e, name)
        assert torch.equal(g, a), name


@each(size=MAPS, layout=["contiguous", "channels_last", "transposed"], dtype=DTYPES)
def test_backward(backend, size, layout, dtype):
    case = backward_case(*size, dtype)
    case["features"] = lay_out(case["features"], layout)
    check_backward(backend, case)


@pytest.mark.parametrize("given", (("grad_logits",), ("grad_loss",), ()))
def test_backward_with_gradients_missing(backend, given):
    case = backward_case(4, 6, 12, 3, 3, torch.float32)
    for name in ("grad_logits", "grad_loss"):
        if name not in given:
            case[name] = None
    check_backward(backend, case)


@each(dtype=[torch.float32, torch.float64], of_targets=DTYPES)
def test_backward_of_other_dtypes_and_strides(backend, dtype, of_targets):
    case = backward_case(4, 6, 12, 3, 3, dtype)
    case["weight"] = case["weight"].to(torch.bfloat16)
    for layout in ("transposed", "strided", "offset"):
        for name in ("grad_logits", "weight", "targets", "pooled", "visible"):
            case[name] = lay_out(case[name].to(of_targets if name == "targets" else
                                               case[name].dtype), layout)  # fmt: skip
        if backend == "triton":  # which takes these two as masked_forward leaves them
            case["visible"] = case["visible"].contiguous()
        check_backward(backend, case)
    case["grad_logits"] = torch.tensor(0.3, dtype=dtype).expand(4, 6)
    check_backward(backend, case)


@pytest.mark.parametrize("channels_last", (False, True))
def test_nothing_visible_has_no_gradient(backend, channels_last):
    case = backward_case(2, 4, 8, 2, 2, torch.float32)
    case["visible"] = torch.zeros_like(case["visible"])
    if channels_last:
        case["features"] = lay_out(case["features"], "channels_last")
    df, _, _ = call_operator(backend, "masked_classifier_backward", *case.values())
    assert not df.any()


def test_empty_batch(backend):
    logits, loss, pooled, visible = call_operator(
        backend, "masked_classifier", *forward_case(0, 5, 6, 2, 2, torch.float32).values()
    )
    assert logits.shape == (0, 5) and loss == 0
    assert pooled.shape == (0, 6) and visible.shape == (0, 2, 2)
    df, dw, db = call_operator(
        backend,
        "masked_classifier_backward",
        *backward_case(0, 5, 6, 2, 2, torch.float32).values(),
    )
    assert df.shape == (0, 6, 2, 2) and dw.shape == (5, 6) and db.shape == (5,)
    assert not dw.any() and not db.any()


# --- masked_forward(classifier=…) ----------------------------------------------------------------


@each(
    shape=[(4, 24, 5, 3), (1, 2048, 4, 4), (2, 300, 12, 12)],
    bias=[False, True],
    channels_last=[False, True],
    dtype=DTYPES,
)
def test_one_pass_classifier_and_its_gradients(backend, dtype, channels_last, bias, shape):
    B, C, h, w = shape  # the larger ones are spread over several blocks, or read twice
    f, t, q, _ = example(B, C, h, w)
    f = ((f * 4).round() / 4).to(dtype)
    if channels_last:
        f = f.contiguous(memory_format=torch.channels_last)
    weight, b = torch.randn(5, C) / C**0.5, torch.randn(5) if bias else None
    runs = []
    for where, kind in ((backend, dtype), ("reference", torch.float64), ("reference", dtype)):
        device = GPU_DEVICES.get(where, "cpu")
        w = weight.to(device, torch.float64 if kind == torch.float64 else torch.float32)
        inputs = [f.to(device, kind), w] + ([b.to(device, w.dtype)] if bias else [])
        inputs = [v.requires_grad_() for v in inputs]
        out = sk.masked_forward(
            inputs[0], t.to(device), q.to(device), size=(20, 21), generator=1, backend=where,
            classifier=(inputs[1], inputs[2] if bias else None),
        )  # fmt: skip
        g = torch.linspace(-1, 1, 5 * B).view(5, B).T.to(device)
        grads = torch.autograd.grad(out.loss * 2 + (out.logits * g).sum(), inputs)
        runs.append([v.detach().cpu() for v in (out.logits, out.loss, *grads)])
        if where == backend:
            assert grads[0].stride() == f.stride()
    for got, exact, eager in zip(*runs, strict=True):
        assert_accurate(got, exact, eager, roundings=16.0)
