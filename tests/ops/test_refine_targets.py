"""refine_targets against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import CPU_BACKENDS, DTYPES, LAYOUTS, assert_refused, each, lay_out
from tolerances import assert_accurate
from torch._dynamo.testing import CompileCounterWithBackend

import sanm_kernels as sk
from sanm_kernels.backends import load

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)


def plain(logits, labels=None, clean_prob=None, temperature=0.5, compute=torch.float64):
    p = sum(torch.softmax(z.to(compute), 1) for z in logits) / len(logits)
    if labels is not None:
        if not labels.is_floating_point():
            labels = F.one_hot(labels, p.shape[1])
        q = clean_prob.to(compute)[:, None]
        p = q * labels.to(compute) + (1 - q) * p
    sharp = p ** (1 / temperature)
    return sharp / sharp.sum(1, keepdim=True)


def check(backend, logits, **kwargs):
    got = sk.refine_targets(logits, backend=backend, **kwargs)
    listed = [logits] if isinstance(logits, torch.Tensor) else logits
    dtype = torch.float64 if listed[0].dtype == torch.float64 else torch.float32
    assert got.dtype == dtype and got.is_contiguous() and not got.requires_grad
    # Plain torch in float64 is the yardstick itself there, so its own error does not show.
    assert_accurate(
        got,
        plain(listed, **kwargs),
        plain(listed, compute=dtype, **kwargs),
        roundings=16.0 if dtype == torch.float64 else 4.0,
    )
    torch.testing.assert_close(got.sum(1), torch.ones(len(got), dtype=dtype))
    return got


@backends
@each(dtype=DTYPES, layout=LAYOUTS, labels=["none", "integer", "soft"])
def test_values(backend, dtype, layout, labels):
    logits = [lay_out((torch.randn(33, 10) * 3).to(dtype), layout) for _ in range(4)]
    given = {}
    if labels != "none":
        y = torch.randint(0, 10, (33,))
        soft = torch.softmax(torch.randn(33, 10), 1).to(dtype)
        given = {
            "labels": y if labels == "integer" else lay_out(soft, layout),
            "clean_prob": torch.rand(33).to(dtype),
        }
    check(backend, logits, **given)


@each(
    backend=CPU_BACKENDS,
    size=[(1, 1), (1, 2), (3, 7), (2, 16), (5, 17), (300, 100), (2, 1001)],
    views=[1, 2, 5],
)
def test_odd_sizes(backend, size, views):
    B, K = size
    check(
        backend,
        [torch.randn(B, K) for _ in range(views)],
        labels=torch.randint(0, K, (B,)),
        clean_prob=torch.rand(B),
    )


@each(backend=CPU_BACKENDS, temperature=[0.1, 0.3, 0.5, 1.0, 2.0])
def test_temperatures(backend, temperature):
    check(backend, torch.randn(20, 12), temperature=temperature)


@each(backend=CPU_BACKENDS, temperature=[1e-3, 1e-10, 1e-30, 1e-300, 1e-320])
def test_the_limit_of_low_temperatures_is_one_hot(backend, temperature):
    """Ties share what there is."""
    logits = torch.stack([torch.randperm(10) * 0.5 for _ in range(200)])
    logits[0, :3] = 9
    expected = F.one_hot(logits.argmax(1), 10).float()
    expected[0, :3] = 1 / 3
    got = sk.refine_targets(logits, temperature=temperature, backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@each(backend=CPU_BACKENDS, dtype=[torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integer_dtype(backend, dtype):
    logits, q = torch.randn(6, 4), torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0, 0.0])
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    got = sk.refine_targets(logits, labels=labels.to(dtype), clean_prob=q, backend=backend)
    assert torch.equal(got, sk.refine_targets(logits, labels=labels, clean_prob=q, backend=backend))
    assert torch.equal(got[[1, 4]], F.one_hot(labels, 4)[[1, 4]].float())  # q = 1: the label itself


@backends
def test_tiny_probabilities_do_not_vanish(backend):
    """2,000 classes and T = 0.05: p^20 is 1e-66, far below float32's range, for every class."""
    got = sk.refine_targets(torch.zeros(3, 2000), temperature=0.05, backend=backend)
    torch.testing.assert_close(got, torch.full((3, 2000), 1 / 2000))
    huge = torch.randn(5, 8) * 1e4
    torch.testing.assert_close(
        sk.refine_targets(huge, backend=backend), F.one_hot(huge.argmax(1), 8).float()
    )
    masked = torch.randn(5, 8)
    masked[:, 3] = -torch.inf
    got = sk.refine_targets(masked, backend=backend)
    assert (got[:, 3] == 0).all() and got.isfinite().all()


@backends
def test_never_requires_a_gradient(backend):
    z, q = torch.randn(4, 3, requires_grad=True), torch.rand(4, requires_grad=True)
    labels = torch.rand(4, 3, requires_grad=True)
    got = sk.refine_targets([z, z], labels=labels, clean_prob=q, backend=backend)
    assert not got.requires_grad


@backends
def test_empty_batch(backend):
    got = sk.refine_targets(
        torch.randn(0, 3),
        labels=torch.zeros(0, dtype=torch.int64),
        clean_prob=torch.zeros(0),
        backend=backend,
    )
    assert got.shape == (0, 3)


@backends
def test_same_bits_for_any_number_of_threads(backend):
    rows = 100 if backend in ("triton", "cuda") else 2000  # interpreted and emulated ones are slow
    logits = [torch.randn(rows, 50) for _ in range(3)]
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(sk.refine_targets(logits, backend=backend))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[1])


@backends
def test_opcheck(backend):
    load(backend)
    op = getattr(torch.ops.sanm_kernels.refine_targets, backend)
    z = [torch.randn(5, 4), torch.randn(4, 5).T]
    half = torch.tensor([0.5], dtype=torch.float64)
    torch.library.opcheck(op, (z, None, None, half))
    torch.library.opcheck(op, (z, torch.randint(0, 4, (5,)), torch.rand(5), half))
    torch.library.opcheck(op, ([x.double() for x in z], torch.rand(5, 4), torch.rand(5), half))


@backends
def test_compiles_for_any_batch(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(a, b, labels, q):
        return sk.refine_targets([a, b], labels=labels, clean_prob=q, backend=backend) * 2

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for n in (8, 13, 21, 34):
        arguments = (
            torch.randn(n, 6, requires_grad=True),
            torch.randn(n, 6),
            torch.randint(0, 6, (n,)),
            torch.rand(n),
        )
        got = compiled(*arguments)
        assert torch.equal(got, function(*arguments)) and not got.requires_grad
    assert counter.frame_count == 1


@backends
def test_autocast_changes_nothing(backend):
    z = torch.randn(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = sk.refine_targets(z, backend=backend)
    assert torch.equal(got, sk.refine_targets(z, backend=backend))


Z, Y, Q = torch.zeros(2, 3), torch.tensor([0, 2]), torch.full((2,), 0.5)
WRONG = {
    "logits no tensor": (TypeError, "logits", (3,), {}),
    "logits empty": (ValueError, "logits", ([],), {}),
    "logits item": (TypeError, r"logits\[1\]", ([Z, 1.0],), {}),
    "logits integer": (TypeError, "logits", (Z.long(),), {}),
    "logits 1-d": (ValueError, "logits", (Z[0],), {}),
    "logits dtype": (TypeError, r"logits\[1\]", ([Z, Z.half()],), {}),
    "logits shape": (ValueError, r"logits\[1\]", ([Z, Z[:1]],), {}),
    "no class": (ValueError, "class", (Z[:, :0],), {}),
    "labels alone": (ValueError, "clean_prob", (Z,), {"labels": Y}),
    "clean_prob alone": (ValueError, "labels", (Z,), {"clean_prob": Q}),
    "labels list": (TypeError, "labels", (Z,), {"labels": [0, 1], "clean_prob": Q}),
    "labels length": (ValueError, "labels", (Z,), {"labels": Y[:1], "clean_prob": Q}),
    "labels range": (ValueError, "labels", (Z,), {"labels": Y + 1, "clean_prob": Q}),
    "labels negative": (ValueError, "labels", (Z,), {"labels": Y - 1, "clean_prob": Q}),
    "labels soft shape": (ValueError, "labels", (Z,), {"labels": Z[:, :2], "clean_prob": Q}),
    "clean_prob shape": (ValueError, "clean_prob", (Z,), {"labels": Y, "clean_prob": Q[:1]}),
    "clean_prob dtype": (TypeError, "clean_prob", (Z,), {"labels": Y, "clean_prob": Y}),
    "clean_prob NaN": (ValueError, "clean_prob", (Z,), {"labels": Y, "clean_prob": Q * torch.nan}),
    "clean_prob range": (ValueError, "clean_prob", (Z,), {"labels": Y, "clean_prob": Q + 1}),
    "temperature 0": (ValueError, "temperature", (Z,), {"temperature": 0}),
    "temperature negative": (ValueError, "temperature", (Z,), {"temperature": -1.0}),
    "temperature text": (TypeError, "temperature", (Z,), {"temperature": "hot"}),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(backend, name):
    error, message, arguments, kwargs = WRONG[name]
    assert_refused(sk.refine_targets, error, message, arguments, {"backend": backend} | kwargs)
