"""mixup_views against concatenating, gathering and mixing in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from inputs import DTYPES, LAYOUTS, assert_refused, each, lay_out, upstreams
from tolerances import assert_accurate
from torch._dynamo.testing import CompileCounterWithBackend

import sanm_kernels as sk
from sanm_kernels.backends import load

BACKENDS = ("reference", "cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)


def plain(views, lam, permutation, rows=None, compute=None):
    v = torch.cat(list(views))
    rows = len(v) if rows is None else rows
    v = v.to(compute or (torch.float64 if v.dtype == torch.float64 else torch.float32))
    return lam * v[:rows] + (1 - lam) * v[permutation[:rows]]


def example(sizes=(3, 1, 4), shape=(3, 5, 7), dtype=torch.float32, layout="contiguous"):
    views = [lay_out(torch.randn(b, *shape).to(dtype), layout) for b in sizes]
    return views, torch.randperm(sum(sizes))


@backends
@each(dtype=DTYPES, layout=LAYOUTS, rows=[None, 5, 1, 0])
def test_rows_and_gradients(backend, dtype, layout, rows):
    views, permutation = example(dtype=dtype, layout=layout)
    runs = []
    for function in (
        lambda v: sk.mixup_views(v, 0.3, permutation, rows=rows, backend=backend),
        lambda v: plain(v, 0.3, permutation, rows, torch.float64),
        lambda v: plain(v, 0.3, permutation, rows).to(dtype),
    ):
        leaves = [v.detach().requires_grad_() for v in views]
        out = function(leaves)
        upstream = upstreams(out.shape, torch.float32, seed=3)["dense"].to(dtype)
        runs.append((out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))))
    for got, exact, eager in zip(*runs, strict=True):
        assert got.dtype == dtype
        assert_accurate(got, exact, eager)
    out = runs[0][0]
    assert torch.equal(out, runs[2][0])  # three roundings, the same everywhere
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert out.is_contiguous(memory_format=kind)


@each(
    backend=BACKENDS,
    shape=[
        (),
        (1,),
        (7,),
        (2, 3),
        (1, 1, 1),
        (2, 3, 4, 5),
        (3, 40, 41),
        (1, 64, 64),
        (3, 512, 129),
    ],
)
def test_any_trailing_shape(backend, shape):
    views, permutation = example((2, 2), shape)
    assert torch.equal(
        sk.mixup_views(views, 0.8, permutation, backend=backend), plain(views, 0.8, permutation)
    )


@each(backend=BACKENDS, dtype=DTYPES, layout=["contiguous", "channels_last"])
def test_large_results(backend, dtype, layout):
    """Results of more than a megabyte take another way to memory; rows need not be aligned."""
    views, permutation = example((5, 4), (3, 181, 183), dtype, layout)
    leaves = [v.requires_grad_() for v in views]
    out = sk.mixup_views(leaves, 0.6, permutation, rows=7, backend=backend)
    assert torch.equal(out, plain(views, 0.6, permutation, 7).to(dtype))
    upstream = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, leaves, upstream)
    inverse = torch.full((9,), 7)
    inverse[permutation[:7]] = torch.arange(7)
    padded = torch.cat([upstream, upstream.new_zeros(1, *upstream.shape[1:])]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    own = torch.arange(9).clamp(max=7)
    assert torch.equal(torch.cat(got), (0.6 * padded[own] + 0.4 * padded[inverse]).to(dtype))


@backends
def test_mixed_layouts_become_contiguous(backend):
    views, permutation = example()
    views[1] = views[1].contiguous(memory_format=torch.channels_last)
    views[2] = views[2].flip(2).contiguous(memory_format=torch.channels_last)
    out = sk.mixup_views(views, 0.5, permutation, backend=backend)
    assert out.is_contiguous() and torch.equal(out, plain(views, 0.5, permutation))
    expanded = torch.randn(1, 3, 5, 7).expand(8, 3, 5, 7)
    assert torch.equal(
        sk.mixup_views([expanded], 0.5, permutation, backend=backend),
        plain([expanded], 0.5, permutation),
    )


@backends
def test_empty_views(backend):
    views, permutation = example((0, 4, 0), layout="channels_last")
    leaves = [v.requires_grad_() for v in views]
    out = sk.mixup_views(leaves, 0.5, permutation, backend=backend)
    assert torch.equal(out, plain(views, 0.5, permutation))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert [len(g) for g in torch.autograd.grad(out.sum(), leaves)] == [0, 4, 0]
    nothing = sk.mixup_views([torch.randn(0, 3)], 0.5, torch.randperm(0), backend=backend)
    assert nothing.shape == (0, 3)


@backends
@pytest.mark.parametrize("kind", ["expanded", "strided", "channels_last"])
def test_upstream_gradients_of_any_strides(backend, kind):
    views, permutation = example()
    leaves = [v.requires_grad_() for v in views]
    shape = (6, 3, 5, 7)
    upstream = (
        lay_out(torch.randn(shape), kind)
        if kind == "channels_last"
        else upstreams(shape, torch.float32)[kind]
    )
    out = sk.mixup_views(leaves, 0.3, permutation, rows=6, backend=backend)
    got = torch.autograd.grad(out, leaves, upstream)
    want = torch.autograd.grad(plain(leaves, 0.3, permutation, 6), leaves, upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_only_some_views_require_a_gradient(backend):
    views, permutation = example()
    views[1].requires_grad_()
    sk.mixup_views(views, 0.3, permutation, backend=backend).sum().backward()
    torch.testing.assert_close(views[1].grad, torch.ones_like(views[1]))
    assert views[0].grad is None


@each(backend=BACKENDS, rows=[None, 2])
def test_gradcheck(backend, rows):
    views, permutation = example((1, 3), (2, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *v: sk.mixup_views(v, 0.3, permutation, rows=rows, backend=backend),
        [v.requires_grad_() for v in views],
    )


@backends
def test_same_bits_for_any_number_of_threads(backend):
    views, permutation = example((40, 40), (3, 32, 32))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(sk.mixup_views(views, 0.3, permutation, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each(backend=BACKENDS, layout=["contiguous", "channels_last", "strided"])
def test_opcheck(backend, layout):
    load(backend)
    op = getattr(torch.ops.sanm_kernels.mixup_views, backend)
    for dtype in (torch.float32, torch.bfloat16):
        views, permutation = example((2, 0, 3), (2, 3, 4), dtype, layout)
        views[0].requires_grad_()
        torch.library.opcheck(op, (views, torch.tensor([0.3], dtype=torch.float64), permutation, 4))


@backends
def test_compiles_once_for_any_batch_and_any_lam(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(a, b, lam, permutation):
        return sk.mixup_views([a, b], lam, permutation, rows=len(a), backend=backend).square()

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for step, n in enumerate((8, 13, 21, 34)):
        leaves = [torch.randn(n, 3, 4, 4, requires_grad=True) for _ in range(2)]
        lam, permutation = 0.5 + 0.1 * step, torch.randperm(2 * n)
        a, b = (f(*leaves, lam, permutation) for f in (compiled, function))
        assert torch.equal(a, b)
        grads = [torch.autograd.grad(x.sum(), leaves) for x in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert counter.frame_count == 1


@backends
def test_autocast_changes_nothing(backend):
    views, permutation = example()
    with torch.autocast("cpu", torch.bfloat16):
        out = sk.mixup_views(views, 0.3, permutation, backend=backend)
    assert torch.equal(out, sk.mixup_views(views, 0.3, permutation, backend=backend))


V, P = torch.zeros(2, 3), torch.tensor([1, 0, 3, 2])
WRONG = {
    "views no sequence": (TypeError, "views", (5, 0.5, P), {}),
    "views empty": (ValueError, "views", ([], 0.5, P), {}),
    "view no tensor": (TypeError, r"views\[1\]", ([V, 3], 0.5, P), {}),
    "view integer": (TypeError, r"views\[0\]", ([V.long(), V], 0.5, P), {}),
    "view 0-d": (ValueError, r"views\[0\]", ([V.sum()], 0.5, P), {}),
    "view dtype": (TypeError, r"views\[1\]", ([V, V.half()], 0.5, P), {}),
    "view shape": (ValueError, r"views\[1\]", ([V, V[:, :2]], 0.5, P), {}),
    "view device": (ValueError, r"views\[1\]", ([V, V.to("meta")], 0.5, P), {}),
    "lam high": (ValueError, "lam", ([V, V], 1.1, P), {}),
    "lam NaN": (ValueError, "lam", ([V, V], float("nan"), P), {}),
    "lam None": (TypeError, "lam", ([V, V], None, P), {}),
    "permutation list": (TypeError, "permutation", ([V, V], 0.5, [1, 0, 3, 2]), {}),
    "permutation float": (TypeError, "permutation", ([V, V], 0.5, P.float()), {}),
    "permutation 2-d": (ValueError, "permutation", ([V, V], 0.5, P[None]), {}),
    "permutation short": (ValueError, "permutation", ([V, V], 0.5, P[:3]), {}),
    "permutation range": (ValueError, "permutation", ([V, V], 0.5, P + 1), {}),
    "permutation negative": (ValueError, "permutation", ([V, V], 0.5, P - 1), {}),
    "permutation twice": (ValueError, "distinct", ([V, V], 0.5, P // 2), {}),
    "rows high": (ValueError, "rows", ([V, V], 0.5, P), {"rows": 5}),
    "rows low": (ValueError, "rows", ([V, V], 0.5, P), {"rows": -1}),
    "rows float": (TypeError, "rows", ([V, V], 0.5, P), {"rows": 2.0}),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(backend, name):
    error, message, arguments, kwargs = WRONG[name]
    assert_refused(sk.mixup_views, error, message, arguments, {"backend": backend} | kwargs)


@backends
def test_inputs_stay_unchanged(backend):
    views, permutation = example()
    before = copy.deepcopy((views, permutation))
    sk.mixup_views([v.requires_grad_() for v in views], 0.3, permutation, backend=backend)
    torch.testing.assert_close((views, permutation), before, rtol=0, atol=0, check_stride=True)
