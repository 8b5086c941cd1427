"""sample_loss against plain torch's cross-entropy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, LAYOUTS, assert_refused, each, lay_out, upstreams
from tolerances import assert_accurate, assert_parallel
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import sanm_kernels as sk
from sanm_kernels.backends import load

BACKENDS = ("reference", "cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)


def check(backend, logits, labels, upstream="dense"):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = upstreams((len(logits),), dtype)[upstream]
    runs = []
    for function in (
        lambda z: sk.sample_loss(z, labels, backend=backend),
        lambda z: F.cross_entropy(z.double(), labels, reduction="none"),
        lambda z: F.cross_entropy(z.to(dtype), labels, reduction="none"),
    ):
        z = logits.detach().requires_grad_()
        loss = function(z)
        runs.append((loss, torch.autograd.grad(loss, z, weight.to(loss.dtype))[0]))
    (got, grad), (exact, exact_grad), (eager, eager_grad) = runs
    assert got.dtype == dtype and grad.dtype == logits.dtype
    # Plain torch in float64 is the yardstick itself there, so its own error does not show.
    roundings = 16.0 if dtype == torch.float64 else 4.0
    assert_accurate(got, exact, eager, roundings=roundings)
    assert_accurate(grad, exact_grad, eager_grad, "gradient", roundings)
    return grad, exact_grad


@backends
@each(dtype=DTYPES, layout=LAYOUTS)
def test_loss_and_gradient(backend, dtype, layout):
    logits = lay_out((torch.randn(37, 10) * 3).to(dtype), layout)
    check(backend, logits, torch.randint(0, 10, (37,)))


@backends
@pytest.mark.parametrize("B, K", [(1, 1), (1, 2), (3, 7), (2, 16), (5, 17), (400, 100), (2, 1001)])
def test_odd_sizes(backend, B, K):
    grad, exact = check(backend, torch.randn(B, K), torch.randint(0, K, (B,)))
    assert_parallel(grad, exact)


@each(backend=BACKENDS, scale=[1e4, 1e30])
def test_large_logits_keep_their_digits(backend, scale):
    logits = torch.randn(30, 1) * scale + torch.randn(30, 12)
    logits[::3] = torch.randn(10, 12) * scale
    check(backend, logits, torch.randint(0, 12, (30,)))


@backends
def test_masked_classes(backend):
    logits = torch.randn(8, 20)
    logits[:, 3] = -torch.inf
    labels = torch.tensor([3] + [5] * 7)
    z = logits.requires_grad_()
    loss = sk.sample_loss(z, labels, backend=backend)
    expected = F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(loss, expected)
    assert loss[0] == torch.inf
    (grad,) = torch.autograd.grad(loss[1:].sum(), z)
    assert (grad[1:, 3] == 0).all() and grad.isfinite().all()


@backends
@pytest.mark.parametrize("kind", ["expanded", "strided"])
def test_upstream_gradients_of_any_strides(backend, kind):
    check(backend, torch.randn(9, 5), torch.randint(0, 5, (9,)), kind)


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype_and_strides(backend, dtype):
    logits, labels = torch.randn(9, 5), torch.randint(0, 5, (9,))
    want = sk.sample_loss(logits, labels, backend=backend)
    assert torch.equal(sk.sample_loss(logits, labels.to(dtype), backend=backend), want)
    assert torch.equal(sk.sample_loss(logits, lay_out(labels, "strided"), backend=backend), want)


@backends
def test_gradcheck(backend):
    labels = torch.randint(0, 4, (5,))
    assert torch.autograd.gradcheck(
        lambda z: sk.sample_loss(z, labels, backend=backend),
        (torch.randn(5, 4, dtype=torch.float64, requires_grad=True),),
    )


@backends
def test_empty_batch(backend):
    z = torch.randn(0, 3, requires_grad=True)
    loss = sk.sample_loss(z, torch.zeros(0, dtype=torch.int64), backend=backend)
    assert loss.shape == (0,) and torch.autograd.grad(loss.sum(), z)[0].shape == (0, 3)


@backends
def test_same_bits_for_any_number_of_threads(backend):
    logits, labels = torch.randn(5000, 33), torch.randint(0, 33, (5000,))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3) if backend == "cpu" else (1, 1):
            torch.set_num_threads(number)
            results.append(sk.sample_loss(logits, labels, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@backends
def test_opcheck(backend):
    load(backend)
    op = getattr(torch.ops.sanm_kernels.sample_loss, backend)
    for z in (torch.randn(5, 4), torch.randn(4, 5).T.half(), torch.randn(5, 4).double()):
        torch.library.opcheck(op, (z.requires_grad_(), torch.randint(0, 4, (5,))))


@backends
def test_compiles_once_for_any_batch(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda z, y: sk.sample_loss(z, y, backend=backend).square(),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for n in (8, 13, 21, 34):
        z, labels = torch.randn(n, 6, requires_grad=True), torch.randint(0, 6, (n,))
        a, b = compiled(z, labels), sk.sample_loss(z, labels, backend=backend).square()
        assert torch.equal(a, b)
        assert torch.equal(*(torch.autograd.grad(x.sum(), z)[0] for x in (a, b)))
    assert counter.frame_count == 1


@backends
def test_compiled_autograd_is_the_same(backend):
    torch._dynamo.reset()
    z, labels = torch.randn(8, 6, requires_grad=True), torch.randint(0, 6, (8,))
    (expected,) = torch.autograd.grad(sk.sample_loss(z, labels, backend=backend).sum(), z)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        sk.sample_loss(z, labels, backend=backend).sum().backward()
    assert torch.equal(z.grad, expected)


@backends
def test_autocast(backend):
    x, weight = torch.randn(6, 8), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sk.sample_loss(F.linear(x, weight), torch.zeros(6).long(), backend=backend)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


Z, Y = torch.zeros(2, 3), torch.tensor([0, 2])
WRONG = {
    "logits no tensor": (TypeError, "logits", ([[0.0]], Y)),
    "logits integer": (TypeError, "logits", (Z.long(), Y)),
    "logits 1-d": (ValueError, "logits", (Z[0], Y)),
    "no class": (ValueError, "class", (Z[:, :0], Y)),
    "labels list": (TypeError, "labels", (Z, [0, 1])),
    "labels float": (TypeError, "labels", (Z, Y.float())),
    "labels 2-d": (ValueError, "labels", (Z, Y[None])),
    "labels length": (ValueError, "labels", (Z, Y[:1])),
    "labels range": (ValueError, "labels", (Z, Y + 1)),
    "labels negative": (ValueError, "labels", (Z, Y - 1)),
    "device": (ValueError, "labels", (Z, Y.to("meta"))),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(backend, name):
    error, message, arguments = WRONG[name]
    assert_refused(sk.sample_loss, error, message, arguments, {"backend": backend})


@backends
def test_inputs_stay_unchanged(backend):
    z, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    before = copy.deepcopy((z, labels))
    sk.sample_loss(z, labels, backend=backend).sum().backward()
    assert torch.equal(z, before[0]) and torch.equal(labels, before[1])
