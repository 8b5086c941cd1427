"""masked_loss against plain torch: the parts of the loss composed step by step, with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import BACKENDS, CPU_BACKENDS, DTYPES, LAYOUTS, each, extended, lay_out, upstreams
from tolerances import assert_accurate, assert_parallel
from torch._dynamo.testing import CompileCounterWithBackend

import sanm_kernels as sk
from sanm_kernels.backends import load

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
PARTS = sk.MaskedLoss._fields
WEIGHTS = {"unlabeled_weight": 3.0, "prior_weight": 0.7, "confidence_weight": 0.4}


def plain(
    logits,
    targets,
    *,
    ratio=None,
    mix=None,
    num_labeled=None,
    unlabeled_weight=0.0,
    prior=None,
    prior_weight=0.0,
    confidence_weight=0.0,
    drop="clamped",
    compute=None,
):
    """The method's section 5, one torch call per step, in float32 or `compute`."""
    compute = compute or (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    n, K = logits.shape
    z = logits.to(compute)
    t = targets.reshape(-1, K) if targets.is_floating_point() else F.one_hot(targets, K)
    t = t.to(compute)
    if ratio is not None:
        best, top = t.max(1, keepdim=True)
        d = ratio.reshape(-1, 1).to(compute)
        d = torch.minimum(d, best) if drop == "clamped" else d
        t = (t + d / (K - 1)).scatter(1, top, best - d)
    if mix is not None:
        t = mix[0] * t[:n] + (1 - mix[0]) * t[mix[1][:n]]
    x = n if num_labeled is None else num_labeled
    log_p = F.log_softmax(z, 1)
    p = log_p.exp()
    per_sample = torch.cat([-(t[:x] * log_p[:x]).sum(1), (p[x:] - t[x:]).square().mean(1)])
    labeled = per_sample[:x].mean() if x else z.sum() * 0
    unlabeled = per_sample[x:].mean() if x < n else z.sum() * 0
    pi = torch.full((K,), 1 / K) if prior is None else prior
    penalty = (pi.to(compute) * torch.log(pi.to(compute) / p.mean(0))).sum()
    confidence = (p * log_p).sum(1).mean()
    total = (
        labeled
        + unlabeled_weight * unlabeled
        + prior_weight * penalty
        + confidence_weight * confidence
    )
    return sk.MaskedLoss(total, labeled, unlabeled, penalty, confidence, per_sample)


def example(n=70, K=10, dtype=torch.float32, scale=2.0):
    logits = (torch.randn(n, K) * scale).to(dtype)
    return logits, torch.softmax(torch.randn(n, K) * 2, 1)


def every_switch(n, K):
    return {
        "ratio": torch.rand(n),
        "mix": (0.7, torch.randperm(n)),
        "num_labeled": n // 2,
        "prior": torch.softmax(torch.randn(K), 0),
        **WEIGHTS,
    }


def combined(result, seed=1):
    """All outputs with random upstream gradients, as one number to differentiate."""
    g = torch.Generator().manual_seed(seed)
    return sum(
        (torch.randn(part.shape, generator=g).to(part.dtype) * part).sum() for part in result
    )


def check(backend, logits, targets, upstream=combined, **kwargs):
    """All outputs and the gradient in the logits are as accurate as plain torch's."""
    runs = []
    for function in (
        lambda z: sk.masked_loss(z, targets, backend=backend, **kwargs),
        lambda z: plain(z, targets, compute=torch.float64, **kwargs),
        lambda z: plain(z, targets, **kwargs),
    ):
        z = logits.detach().requires_grad_()
        result = function(z)
        (grad,) = torch.autograd.grad(upstream(result), z)
        runs.append((result, grad))
    (got, grad), (exact, exact_grad), (eager, eager_grad) = runs
    # Plain torch in float64 is the yardstick itself there, so its own error does not show.
    roundings = 16.0 if logits.dtype == torch.float64 else 4.0
    for name, *parts in zip(PARTS, got, exact, eager, strict=True):
        assert_accurate(*parts, name, roundings)
        assert parts[0].dtype == eager[0].dtype
    assert grad.dtype == logits.dtype
    assert_accurate(grad, exact_grad, eager_grad, "gradient", roundings)
    return grad, exact_grad


@backends
@each(dtype=DTYPES, layout=LAYOUTS)
def test_every_part_and_its_gradient(backend, dtype, layout):
    logits, targets = example(dtype=dtype)
    check(backend, lay_out(logits, layout), lay_out(targets, layout), **every_switch(70, 10))


SIZES = ((1, 2), (2, 3), (63, 8), (64, 15), (65, 16), (129, 17), (5, 32), (200, 33), (3, 1000))
SWITCHES = (
    {},
    {"num_labeled": 0},
    {"num_labeled": 0, "unlabeled_weight": 25.0},
    {"num_labeled": 70},
    {"ratio": 0.3},
    {"ratio": 0.9, "drop": "unclamped"},
    {"mix": 0.6},
    {"prior_weight": 1.0},
    {"confidence_weight": 1.0},
    {"mix": 1.0, "ratio": 0.0},
)


@each(backend=CPU_BACKENDS, size=SIZES)
def test_odd_sizes(backend, size):
    n, K = size
    logits, targets = example(n, K)
    grad, exact = check(backend, logits, targets, **every_switch(n, K))
    assert_parallel(grad, exact)


@each(backend=CPU_BACKENDS, switches=SWITCHES)
def test_switches_one_by_one(backend, switches):
    logits, targets = example()
    if "ratio" in switches:
        switches = {**switches, "ratio": torch.full((70,), switches["ratio"])}
    if "mix" in switches:
        switches = {**switches, "mix": (switches["mix"], torch.randperm(70))}
    check(backend, logits, targets, **switches)
    check(backend, logits, targets, upstream=lambda result: result.total, **switches)


@each(backend=CPU_BACKENDS, part=PARTS)
def test_gradient_of_each_output_alone(backend, part):
    logits, targets = example()
    check(
        backend,
        logits,
        targets,
        upstream=lambda r: 1.7 * getattr(r, part).sum(),
        **every_switch(70, 10),
    )


@backends
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_upstream_gradients_of_any_strides(backend, kind):
    logits, targets = example()
    weight = upstreams((70,), torch.float32)[kind]
    z = logits.requires_grad_()
    got, exact, eager = (
        torch.autograd.grad(rows, z, weight.to(rows.dtype))[0]
        for rows in (
            sk.masked_loss(z, targets, num_labeled=30, backend=backend).per_sample,
            plain(z, targets, num_labeled=30, compute=torch.float64).per_sample,
            plain(z, targets, num_labeled=30).per_sample,
        )
    )
    assert_accurate(got, exact, eager)


@each(
    backend=CPU_BACKENDS,
    dtype=[*DTYPES, torch.int64, torch.int32, torch.uint8],
    logits_dtype=[torch.float32, torch.bfloat16, torch.float64],
)
def test_targets_of_any_dtype(backend, logits_dtype, dtype):
    logits, targets = example(dtype=logits_dtype)
    targets = targets.to(dtype) if dtype.is_floating_point else targets.argmax(1).to(dtype)
    kwargs = every_switch(70, 10)
    if not dtype.is_floating_point:
        check(backend, logits, targets.long(), **kwargs)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            sk.masked_loss(logits, targets, backend=backend, **kwargs),
            sk.masked_loss(
                logits,
                targets if dtype.is_floating_point else targets.long(),
                backend=backend,
                **kwargs,
            ),
            strict=True,
        )
    )
    if dtype.is_floating_point:
        check(backend, logits, targets, **kwargs)


@backends
def test_expanded_targets_equal_their_copy(backend):
    B, K = 4, 6
    targets = torch.softmax(torch.randn(2, 1, B, K), -1).expand(2, 6, B, K)
    logits, n = torch.randn(12 * B, K), 12 * B
    kwargs = {"mix": (0.8, torch.randperm(n)), "num_labeled": n // 2, **WEIGHTS}
    ratio = torch.rand(2, 1, B).expand(2, 6, B)
    check(backend, logits, targets, ratio=ratio, **kwargs)
    for variant in (targets, targets.transpose(1, 2), targets.flip(3).flip(3)[:, :, ::2]):
        rows = variant.shape[:-1].numel()
        z = logits[:rows]
        kwargs["mix"] = (0.8, torch.randperm(rows))
        kwargs["num_labeled"] = rows // 3
        a = sk.masked_loss(z, variant, ratio=ratio.reshape(-1)[:rows], backend=backend, **kwargs)
        b = sk.masked_loss(
            z, variant.reshape(-1, K), ratio=ratio.reshape(-1)[:rows], backend=backend, **kwargs
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@backends
def test_more_targets_than_rows(backend):
    """Partners may come from rows that are not scored, as in the Clothing1M step."""
    logits, _ = example(20, 7)
    targets = torch.softmax(torch.randn(50, 7), 1)
    kwargs = {"ratio": torch.rand(50), "mix": (0.55, torch.randperm(50))}
    check(backend, logits, targets, **kwargs)
    labels = targets.argmax(1)
    check(backend, logits, labels, **kwargs)


def test_cpu_modulates_exactly_as_the_reference():
    """Only the sums differ: where p is one-hot, the gradient shows the targets."""
    for K in (2, 3, 10, 17, 100):
        targets = torch.softmax(torch.randn(40, K), 1)
        targets[::2, : K // 2 + 1] = targets[::2, :1]  # ties
        targets[::3] -= 2  # nothing asks targets to be positive
        ratio, logits = torch.rand(40), torch.zeros(40, K)
        logits[:, 0] = 200.0  # p is exactly one-hot, so that dL/dz_k = −t_k but for k = 0
        grads = []
        for backend in BACKENDS:
            z = logits.clone().requires_grad_()
            out = sk.masked_loss(
                z, targets, ratio=ratio, mix=(0.3, torch.arange(40).flip(0)), backend=backend
            )
            grads.append(torch.autograd.grad(out.per_sample.sum(), z)[0][:, 1:])
        assert torch.equal(*grads)


@each(backend=CPU_BACKENDS, mixed=[False, True])
def test_ignored_rows_count_in_no_mean(backend, mixed):
    logits, targets = example(90, 6)
    labels = targets.argmax(1)
    labels[::4] = -100
    permutation = torch.randperm(90)
    keep = labels != -100
    if mixed:
        keep = keep & (labels[permutation] != -100)
    kwargs = {"mix": (0.7, permutation)} if mixed else {}
    z = logits.clone().requires_grad_()
    got = sk.masked_loss(z, labels, num_labeled=40, unlabeled_weight=2.0, backend=backend, **kwargs)
    filled = plain(z, labels.clamp(min=0), num_labeled=40, **kwargs)
    expected = torch.where(keep, filled.per_sample, 0)
    torch.testing.assert_close(got.per_sample, expected)
    torch.testing.assert_close(got.labeled, expected[:40].sum() / keep[:40].sum())
    torch.testing.assert_close(got.unlabeled, expected[40:].sum() / keep[40:].sum())
    torch.testing.assert_close(got.prior, filled.prior)
    torch.testing.assert_close(got.confidence, filled.confidence)
    grad = torch.autograd.grad(got.total, z)[0]
    assert torch.equal(grad.abs().sum(1) > 0, keep)
    oracle = expected[:40].sum() / keep[:40].sum() + 2 * expected[40:].sum() / keep[40:].sum()
    torch.testing.assert_close(grad, torch.autograd.grad(oracle, z)[0])
    other = torch.where(labels == -100, 5, labels.clamp(max=4))
    a = sk.masked_loss(logits, other, ignore_index=5, backend=backend)
    b = sk.masked_loss(logits, torch.where(other == 5, -100, other), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@backends
def test_reductions(backend):
    logits, targets = example(50, 6)
    kwargs = {"num_labeled": 20, "unlabeled_weight": 3.0, "backend": backend}
    mean = sk.masked_loss(logits, targets, **kwargs)
    total = sk.masked_loss(logits, targets, reduction="sum", **kwargs)
    rows = sk.masked_loss(logits, targets, reduction="none", **kwargs)
    weight = torch.tensor([1.0] * 20 + [3.0] * 30)
    torch.testing.assert_close(total.labeled, mean.per_sample[:20].sum())
    torch.testing.assert_close(total.unlabeled, mean.per_sample[20:].sum())
    torch.testing.assert_close(total.total, (weight * mean.per_sample).sum())
    assert torch.equal(total.prior, mean.prior) and torch.equal(total.confidence, mean.confidence)
    assert torch.equal(rows.total, weight * mean.per_sample)
    assert torch.equal(rows.labeled, mean.labeled)
    z = logits.requires_grad_()
    grads = [
        torch.autograd.grad(sk.masked_loss(z, targets, reduction=r, **kwargs).total.sum(), z)[0]
        for r in ("sum", "none")
    ]
    torch.testing.assert_close(*grads)


@each(backend=CPU_BACKENDS, reduction=["mean", "sum", "none"], soft=[True, False])
def test_gradcheck(backend, reduction, soft):
    logits, targets = example(7, 4, torch.float64)
    kwargs = every_switch(7, 4)
    if reduction == "none":
        kwargs.update(prior_weight=0.0, confidence_weight=0.0)
    targets = targets if soft else targets.argmax(1).where(torch.arange(7) != 2, -100)

    def function(z):
        return tuple(sk.masked_loss(z, targets, reduction=reduction, backend=backend, **kwargs))

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(),))


@each(backend=CPU_BACKENDS, scale=[1e4, 1e30])
def test_large_logits_keep_their_digits(backend, scale):
    logits, targets = example(30, 12, scale=scale)
    logits[::2] = logits[::2, :1] + torch.randn(15, 12)  # close to each other, far from 0
    check(backend, logits, targets, num_labeled=20, **WEIGHTS)


@each(backend=CPU_BACKENDS, K=[5, 40])
def test_classes_masked_by_minus_infinity(backend, K):
    logits, targets = example(20, K)
    logits[:, 1] = -torch.inf
    targets[:, 1] = 0
    z = logits.requires_grad_()
    prior = torch.full((K,), 1 / (K - 1))
    prior[1] = 0
    out = sk.masked_loss(z, targets, num_labeled=10, prior=prior, backend=backend, **WEIGHTS)
    assert all(part.isfinite().all() for part in out)
    (grad,) = torch.autograd.grad(out.total, z)
    rest = [k for k in range(K) if k != 1]
    small = logits.detach()[:, rest].requires_grad_()
    expected = sk.masked_loss(
        small, targets[:, rest], num_labeled=10, prior=prior[rest], backend=backend, **WEIGHTS
    )
    torch.testing.assert_close(out.labeled, expected.labeled)
    torch.testing.assert_close(out.prior, expected.prior)
    torch.testing.assert_close(out.confidence, expected.confidence)
    assert (grad[:, 1] == 0).all() and grad.isfinite().all()

    uniform = sk.masked_loss(z, targets, confidence_weight=1.0, backend=backend)
    assert uniform.prior == torch.inf and uniform.total.isfinite()  # weight 0 adds nothing
    assert torch.autograd.grad(uniform.total, z)[0].isfinite().all()


@backends
def test_a_class_of_next_to_no_probability_has_a_finite_gradient(backend):
    z = torch.tensor([[0.0, -92.0, -1.0]], requires_grad=True)  # e⁻⁹²: its inverse overflows
    for weight in (0.0, 1.0):
        total = sk.masked_loss(z, torch.tensor([0]), prior_weight=weight, backend=backend).total
        assert torch.autograd.grad(total, z)[0].isfinite().all()


@backends
def test_nan_logits_give_nan_in_their_row_only(backend):
    logits, targets = example(6, 20)
    logits[2, 7] = torch.nan
    out = sk.masked_loss(logits, targets, backend=backend)
    assert torch.equal(out.per_sample.isnan(), torch.arange(6) == 2) and out.total.isnan()


@backends
@pytest.mark.parametrize("n, n_x", [(0, 0), (5, 0), (5, 5)])
def test_parts_over_no_rows_are_zero(backend, n, n_x):
    logits, targets = example(n, 3)
    z = logits.requires_grad_()
    out = sk.masked_loss(
        z,
        targets,
        num_labeled=n_x,
        mix=(0.5, torch.randperm(n)),
        ratio=torch.rand(n),
        backend=backend,
        **WEIGHTS,
    )
    assert out.per_sample.shape == (n,)
    assert (out.labeled == 0) == (n_x == 0)
    assert (out.unlabeled == 0) == (n == n_x)
    assert all(part.isfinite().all() for part in out)
    if n == 0:
        assert all(part == 0 for part in out[:5])
    assert torch.autograd.grad(out.total, z)[0].shape == (n, 3)


@backends
def test_all_rows_ignored(backend):
    z = torch.randn(4, 3, requires_grad=True)
    out = sk.masked_loss(z, torch.full((4,), -100), num_labeled=2, backend=backend)
    assert out.total == 0 and out.labeled == 0 and out.unlabeled == 0
    assert (torch.autograd.grad(out.total, z)[0] == 0).all()


@each(backend=CPU_BACKENDS, K=[10, 300])
def test_same_bits_twice_and_for_any_number_of_threads(backend, K):
    n = {"triton": 100, "cuda": 300}.get(backend, 1000)  # interpreted and emulated ones are slow
    logits, targets = example(n, K)
    kwargs = every_switch(n, K)

    def run():
        z = logits.detach().requires_grad_()
        out = sk.masked_loss(z, targets, backend=backend, **kwargs)
        return (*out, torch.autograd.grad(out.total, z)[0])

    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 1, 2, 3) if backend == "cpu" else (1, 1):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@backends
def test_opcheck(backend):
    load(backend)
    op = getattr(torch.ops.sanm_kernels.masked_loss, backend)
    logits, _ = example(9, 5)
    scalars = torch.tensor([0.7, 2.0, 1.0, 0.3], dtype=torch.float64)
    soft = torch.rand(3, 3, 1, 5).expand(3, 3, 2, 5)
    labels = torch.randint(0, 5, (18,))
    permutation = torch.randperm(18)
    for z in (logits, logits.half().requires_grad_(), logits.double().requires_grad_()):
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        torch.library.opcheck(
            op,
            (z, soft, torch.rand(18, dtype=dtype), permutation, None, scalars, 4, True, -100, True),
        )
        torch.library.opcheck(
            op,
            (
                z,
                labels,
                None,
                permutation,
                torch.full((5,), 0.2, dtype=dtype),
                scalars,
                4,
                False,
                -100,
                False,
            ),
        )


@pytest.mark.parametrize(
    "backend, compiler",
    [
        ("reference", "aot_eager"),
        ("cpu", "aot_eager"),
        pytest.param("cpu", "inductor", marks=extended),
    ],
)
def test_compiles_once_for_any_batch_and_any_weights(backend, compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def function(z, t, ratio, lam, permutation, weight):
        out = sk.masked_loss(
            z,
            t,
            ratio=ratio,
            mix=(lam, permutation),
            num_labeled=len(z) // 2,
            unlabeled_weight=weight,
            prior_weight=2 * weight,
            backend=backend,
        )
        return out.total + out.per_sample.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for step, n in enumerate((8, 13, 21, 34)):
        logits, targets = example(n, 5)
        arguments = (targets, torch.rand(n), 0.5 + 0.1 * step, torch.randperm(n), 0.25 * (step + 1))
        z = logits.requires_grad_()
        a, b = compiled(z, *arguments), function(z, *arguments)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (a, b)))
    assert counter.frame_count == 1
