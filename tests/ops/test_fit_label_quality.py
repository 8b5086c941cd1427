"""fit_label_quality against scikit-learn, the reference, and its own promises."""

from __future__ import annotations

import bisect
import functools
import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from inputs import CPU_BACKENDS, DTYPES, LAYOUTS, each, lay_out

import sanm_kernels as sk

BACKENDS = ("reference", "cpu")
KINDS = ("bimodal", "overlapping", "heavy", "skewed", "ties", "six values")
FEW, MANY = 1237, 50_000  # below and above the size from which the CPU kernel uses its histogram
TIGHT, FAST = 1e-9, 2e-5
MERGING = {"reg_covar": 0.5, "max_iter": 30, "tol": 0.0}  # EM that brings the means together
TENSORS = ("clean_prob", "means", "variances", "weights")
backends = pytest.mark.parametrize("backend", BACKENDS)


@functools.cache
def data(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    r = np.random.RandomState(seed)
    m = int(n * r.uniform(0.3, 0.8))
    if kind == "bimodal":
        x = np.r_[r.normal(0.2, 0.08, m), r.normal(0.7, 0.1, n - m)]
    elif kind == "overlapping":
        x = np.r_[r.normal(0.4, 0.15, m), r.normal(0.6, 0.2, n - m)]
    elif kind == "heavy":
        x = np.abs(np.r_[0.3 * r.standard_t(2, m) + 0.5, r.standard_t(3, n - m) + 3])
    elif kind == "skewed":  # cross-entropies, half of the labels wrong
        logits, labels = r.normal(0, 1.3, (n, 10)), r.randint(10, size=n)
        logits[np.arange(n), labels] += 4
        given = np.where(r.rand(n) < 0.5, r.randint(10, size=n), labels)
        x = np.log(np.exp(logits).sum(1)) - logits[np.arange(n), given]
    elif kind == "ties":
        x = np.round(np.abs(np.r_[r.gamma(1.0, 0.3, m), r.normal(2.5, 0.6, n - m)]), 2)
    else:
        x = np.array([0.0, 0.13, 0.31, 1.7, 2.03, 3.3])[
            r.choice(6, n, p=[0.2, 0.3, 0.1, 0.1, 0.2, 0.1])
        ]
    return torch.from_numpy(x[r.permutation(n)])


def unit(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min())


def scikit_learn(x, *, seed=0, max_iter=10, tol=1e-2, reg_covar=5e-4, start=None):
    """LabelQuality (but for `degenerate`) of x as it is, in NumPy arrays.

    start: weights, means and variances to start with instead of those of k-means.
    """
    options = {}
    if start is not None:
        weights, means, variances = (v.numpy() for v in start)
        options = {"weights_init": weights, "means_init": means[:, None]}
        options |= {"precisions_init": 1 / variances[:, None, None]}
    mixture = pytest.importorskip("sklearn.mixture").GaussianMixture(
        2, max_iter=max_iter, tol=tol, reg_covar=reg_covar, random_state=seed, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of not having converged
        mixture.fit(x[:, None].numpy())
    order = mixture.means_[:, 0].argsort()
    return {
        "clean_prob": mixture.predict_proba(x[:, None].numpy())[:, order[0]],
        "means": mixture.means_[order, 0],
        "variances": mixture.covariances_[order, 0, 0],
        "weights": mixture.weights_[order],
        "n_iter": mixture.n_iter_,
        "converged": mixture.converged_,
    }


@functools.cache
def expected(kind: str, n: int):
    return scikit_learn(unit(data(kind, n)))


def assert_equal(actual: sk.LabelQuality, expected, tolerance: float) -> None:
    assert int(actual.n_iter) == int(expected["n_iter"])
    assert bool(actual.converged) == bool(expected["converged"])
    assert not bool(actual.degenerate)
    for name in TENSORS:
        error = np.abs(getattr(actual, name).double().numpy() - np.asarray(expected[name])).max()
        assert error <= tolerance, f"{name}: error {error:.3g}"


@backends
@each(kind=KINDS, n=[FEW, MANY])
def test_equals_scikit_learn(backend, kind, n):
    tolerance = FAST if backend == "cpu" and n == MANY else TIGHT
    assert_equal(sk.fit_label_quality(data(kind, n), backend=backend), expected(kind, n), tolerance)


@each(
    backend=BACKENDS,
    options=[
        *({"seed": s} for s in (1, 2, 3, 7, 12345, 2**32 - 1)),
        {"max_iter": 1},
        {"max_iter": 50, "tol": 1e-6},
        {"tol": 0.0},
        {"reg_covar": 0.0},
        {"reg_covar": 0.1, "seed": 5},
    ],
)
def test_options_mean_what_they_mean_to_scikit_learn(backend, options):
    x = data("overlapping", FEW, 1)
    actual = sk.fit_label_quality(x, backend=backend, **options)
    assert_equal(actual, scikit_learn(unit(x), **options), TIGHT)


@backends
def test_a_small_reg_covar_does_not_cost_accuracy(backend):
    x = data("skewed", 20_000)
    actual = sk.fit_label_quality(x, reg_covar=1e-9, max_iter=3, backend=backend)
    assert_equal(actual, scikit_learn(unit(x), reg_covar=1e-9, max_iter=3), TIGHT)


@backends
@pytest.mark.parametrize("n", (2, 3, 8191, 8192, 10_001))
def test_sizes(backend, n):
    x = data("bimodal", n) if n > 3 else torch.tensor([0.5, 3.0, 2.5], dtype=torch.float64)[:n]
    actual = sk.fit_label_quality(x, backend=backend)
    assert_equal(actual, scikit_learn(unit(x)), FAST if backend == "cpu" and n > 8191 else TIGHT)


@backends
@pytest.mark.parametrize("n", (FEW, 20_000))
def test_without_normalising(backend, n):
    x = 40 + 7 * data("skewed", n)
    actual = sk.fit_label_quality(x, normalize=False, reg_covar=0.3, backend=backend)
    exact = scikit_learn(x, reg_covar=0.3)
    fast = backend == "cpu" and n > FEW
    assert_equal(
        actual._replace(means=actual.means / 40, variances=actual.variances / 400),
        exact | {"means": exact["means"] / 40, "variances": exact["variances"] / 400},
        FAST if fast else TIGHT,
    )


@backends
@each(dtype=DTYPES, n=[FEW, 20_000])
def test_dtypes_and_layouts(backend, dtype, n):
    x = data("skewed", n).to(dtype)
    exact = sk.fit_label_quality(x.double(), backend="reference")._asdict()
    first = sk.fit_label_quality(x, backend=backend)
    tolerance = TIGHT if backend == "reference" or n == FEW else FAST
    if dtype != torch.float64:
        tolerance = max(tolerance, 1e-7)  # clean_prob is rounded to float32
    assert_equal(first, exact, tolerance)
    assert first.clean_prob.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert first.clean_prob.is_contiguous() and first.clean_prob.shape == (n,)
    assert [t.dtype for t in first[1:]] == [torch.float64] * 3 + [torch.int64] + [torch.bool] * 2
    assert [t.shape for t in first[1:]] == [(2,)] * 3 + [()] * 3
    for layout in LAYOUTS[1:]:
        y = lay_out(x, layout)
        again = sk.fit_label_quality(y, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), layout
        assert torch.equal(x, y)


@backends
@each(n=[FEW, 20_000], normalize=[True, False])
def test_history_is_averaged_over_five_epochs(backend, n, normalize):
    x = data("skewed", n)
    history = torch.stack([2.0**e * x.roll(e).sqrt() + 0.1 * e for e in range(7)])
    history[-2] = 3.0  # an epoch in which all losses are equal
    for epochs in (0, 1, 4, 7):
        rows = [*history[:epochs][-4:], x]
        if normalize:
            rows = [torch.zeros_like(r) if (r == r[0]).all() else unit(r) for r in rows]
        mean = torch.stack(rows).mean(0)
        exact = scikit_learn(mean)
        scale = float(mean.max())
        past = lay_out(history[:epochs], "transposed") if epochs else history[:0]
        actual = sk.fit_label_quality(x, history=past, normalize=normalize, backend=backend)
        fast = backend == "cpu" and n > FEW
        assert_equal(
            actual._replace(means=actual.means / scale, variances=actual.variances / scale**2),
            exact | {"means": exact["means"] / scale, "variances": exact["variances"] / scale**2},
            FAST if fast else TIGHT,
        )


@backends
def test_rows_before_the_last_four_are_not_read(backend):
    x = data("bimodal", FEW)
    history = torch.stack([x.roll(e) for e in range(6)])
    bad = history.clone()
    bad[:2] = torch.nan
    good = sk.fit_label_quality(x, history=history, backend=backend)
    assert torch.equal(
        good.clean_prob, sk.fit_label_quality(x, history=bad, backend=backend).clean_prob
    )


def two_points(n: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(n) % 3 == 0).to(dtype)


#: Name → losses of a dtype, and options.
DEGENERATE = {
    "none": (lambda t: torch.zeros(0, dtype=t), {}),
    "none, history": (lambda t: torch.zeros(0, dtype=t), {"history": 3}),
    "one": (lambda t: torch.ones(1, dtype=t), {}),
    "equal": (lambda t: torch.full((7,), 2.5, dtype=t), {}),
    "equal, many": (lambda t: torch.full((20_000,), 2.5, dtype=t), {}),
    "equal, negative": (lambda t: torch.full((7,), -2.5, dtype=t), {"normalize": False}),
    "equal, history": (lambda t: torch.full((7,), 2.5, dtype=t), {"history": 2}),
    "no variance": (lambda t: two_points(9, t), {"reg_covar": 0.0}),
    "no variance, many": (lambda t: two_points(20_000, t), {"reg_covar": 0.0}),
    "merging": (lambda t: data("overlapping", FEW).to(t), MERGING),
    "merging, many": (lambda t: data("overlapping", 20_000).to(t), MERGING),
}


@each(backend=BACKENDS, dtype=DTYPES, name=DEGENERATE)
def test_degenerate_fits_call_every_label_clean(backend, dtype, name):
    make, options = DEGENERATE[name]
    x, options = make(dtype), dict(options)
    if "history" in options:
        options["history"] = x.expand(options["history"], -1)
    fit = sk.fit_label_quality(x, backend=backend, **options)
    assert bool(fit.degenerate) and not bool(fit.converged) and int(fit.n_iter) == 0
    assert torch.equal(fit.clean_prob, torch.ones_like(fit.clean_prob))
    assert fit.weights.tolist() == [1, 0]
    reference = sk.fit_label_quality(x, backend="reference", **options)
    for field in ("means", "variances"):
        value = getattr(fit, field)
        assert torch.isfinite(value).all() and value[0] == value[1]
        torch.testing.assert_close(value, getattr(reference, field), rtol=1e-7, atol=1e-9)


@backends
@each(n=[4, 20_000], normalize=[True, False])
def test_extreme_values_never_give_nan(backend, n, normalize):
    for values in (
        [-1e308, 1e308, 3.0, 4.0],
        [1e200, 1e308, 3.0, 4.0],
        [0.0, 5e-324, 0.0, 1e-320],
        [1.0, 1.0 + 2.0**-52, 1.0, 1.0],
        [1e-200, 0.0, 3e-200, 2e-200],
    ):
        x = torch.tensor(values, dtype=torch.float64).repeat(n // 4)
        for history in (None, x.flip(0)[None]):
            fit = sk.fit_label_quality(x, history=history, normalize=normalize, backend=backend)
            assert not any(torch.isnan(t).any() for t in fit)
            assert ((fit.clean_prob >= 0) & (fit.clean_prob <= 1)).all()


@backends
def test_one_far_outlier_is_a_component(backend):
    x = torch.cat([torch.rand(9_999, dtype=torch.float64) * 0.01, torch.ones(1).double()])
    fit = sk.fit_label_quality(x, backend=backend)
    assert_equal(fit, scikit_learn(unit(x)), FAST)
    assert fit.clean_prob[-1] < 1e-6 and fit.clean_prob[:-1].min() > 0.99


@each(backend=BACKENDS, dtype=DTYPES, value=[torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(backend, dtype, value):
    x = data("bimodal", 5_000).to(dtype).clone()
    history = x.expand(6, -1).clone()
    x[4_321] = value
    before = x.clone()
    word = str(abs(value)) if value != value else str(value)
    with pytest.raises(ValueError, match=rf"^losses: .* got {word} at index \[4321\]"):
        sk.fit_label_quality(x, backend=backend)
    assert torch.equal(x[x.isfinite()], before[before.isfinite()])
    history[4, 17] = value
    with pytest.raises(ValueError, match=rf"^history\[-4:\]: .* got {word} at index \[2, 17\]"):
        sk.fit_label_quality(2 * history[0], history=history, backend=backend)


def test_a_history_that_ends_with_the_losses_is_refused():
    """As scripts have it, which append first: the epoch would count twice, and q moves."""
    earlier, x = data("bimodal", 300).float(), data("overlapping", 300).float()
    with pytest.raises(ValueError, match=r"^history: .* pass history\[:-1\]$"):
        sk.fit_label_quality(x, history=torch.stack([earlier, x]))
    sk.fit_label_quality(x, history=torch.stack([x, earlier]))
    same = torch.ones(5)
    assert sk.fit_label_quality(same, history=same[None]).degenerate


LOSSES = torch.rand(6)


@backends
@pytest.mark.parametrize(
    "error, name, arguments",
    (
        (TypeError, "losses", {"losses": [1.0, 2.0]}),
        (TypeError, "losses", {"losses": torch.arange(6)}),
        (ValueError, "losses", {"losses": torch.rand(2, 3)}),
        (ValueError, "losses", {"losses": torch.rand(())}),
        (TypeError, "seed", {"seed": 1.0}),
        (TypeError, "seed", {"seed": None}),
        (TypeError, "seed", {"seed": True}),
        (ValueError, "seed", {"seed": -1}),
        (ValueError, "seed", {"seed": 2**32}),
        (TypeError, "max_iter", {"max_iter": 2.5}),
        (ValueError, "max_iter", {"max_iter": 0}),
        (TypeError, "tol", {"tol": "small"}),
        (ValueError, "tol", {"tol": -1e-9}),
        (ValueError, "tol", {"tol": float("nan")}),
        (ValueError, "reg_covar", {"reg_covar": -1.0}),
        (TypeError, "history", {"history": [LOSSES]}),
        (ValueError, "history", {"history": LOSSES}),
        (ValueError, "history", {"history": torch.rand(2, 5)}),
        (TypeError, "history", {"history": torch.rand(2, 6).double()}),
        (TypeError, "normalize", {"normalize": 1}),
        (ValueError, "backend", {"backend": "numpy"}),
    ),
    ids=lambda v: str(v) if isinstance(v, str) else None,
)
def test_wrong_arguments_are_named(backend, error, name, arguments):
    arguments = {"losses": LOSSES, "backend": backend} | arguments
    before = LOSSES.clone()
    with pytest.raises(error, match=f"^{name}: expected"):
        sk.fit_label_quality(arguments.pop("losses"), **arguments)
    assert torch.equal(LOSSES, before)


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    x = data("skewed", 150_001).float()
    history = torch.stack([x.roll(1), x.sqrt()])
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(sk.fit_label_quality(x, history=history, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@backends
@pytest.mark.parametrize("history", (False, True))
def test_opcheck(backend, history):
    op = getattr(torch.ops.sanm_kernels.fit_label_quality, backend)
    x = data("bimodal", 500).float()
    past = x.roll(1).expand(3, -1) if history else None
    torch.library.opcheck(op, (x, past, [0.1, 0.5, 0.9], 10, 1e-2, 5e-4, True))
    torch.library.opcheck(op, (x[:0], None, [0.1, 0.5, 0.9], 10, 1e-2, 5e-4, False))


@backends
def test_compiles_as_one_graph(backend):
    def quality(x, history, seed):
        return sk.fit_label_quality(x * 2, seed=seed, history=history, backend=backend)

    compiled = torch.compile(quality, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (900, 1100):
        x = data("overlapping", n).float()
        for history, seed in ((None, 0), (x.roll(2)[None], 0), (None, 3)):
            result, eager = compiled(x, history, seed), quality(x, history, seed)
            assert all(torch.equal(a, b) for a, b in zip(result, eager, strict=True))


@backends
def test_gradients_stop_here_and_autocast_changes_nothing(backend):
    x = data("bimodal", FEW).float()
    plain = sk.fit_label_quality(x, backend=backend)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        fit = sk.fit_label_quality(leaf, history=2 * leaf[None], backend=backend)
        again = sk.fit_label_quality(leaf, backend=backend)
    assert not any(t.requires_grad for t in (*fit, *again))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@each(backend=CPU_BACKENDS, case=[(2000048, 48), (10029, 29), (10003, 3)])
def test_losses_that_tie_fall_to_the_reference_s_side(backend, case):
    """Few distinct losses: one of them in the middle of k-means' centres is many samples."""
    generator = torch.Generator().manual_seed(case[0])
    losses = torch.randn(2000, generator=generator).abs().bfloat16()
    got = sk.fit_label_quality(losses, seed=case[1], backend=backend)
    expected = sk.fit_label_quality(losses, seed=case[1], backend="reference")
    assert (got.clean_prob - expected.clean_prob).abs().max() < 1e-5
    assert got.n_iter == expected.n_iter


@backends
@each(dtype=[torch.bfloat16, torch.float16], case=[2, 17, 41], n=[20_000])
def test_many_losses_that_tie(backend, dtype, case, n):
    losses = torch.randn(n, generator=torch.Generator().manual_seed(case * 1000003 + n)).abs()
    losses = losses.to(dtype)
    actual = sk.fit_label_quality(losses, seed=case, backend=backend)
    tolerance = FAST if backend == "cpu" else 1e-7  # of float32 results
    assert_equal(actual, scikit_learn(unit(losses.double()), seed=case), tolerance)


@each(backend=CPU_BACKENDS, n=range(2, 21), max_iter=[1, 2, 10])
def test_few_losses(backend, n, max_iter):
    """Of which some are equal."""
    r = np.random.RandomState(n)
    losses = torch.from_numpy(np.abs(r.randn(n)).round(1))
    actual = sk.fit_label_quality(losses, seed=n, max_iter=max_iter, backend=backend)
    assert_equal(actual, scikit_learn(unit(losses), seed=n, max_iter=max_iter), TIGHT)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_values_and_one_loss(backend):
    losses = torch.tensor([0.5, 2.0, 2.0, 0.5, 2.0], dtype=torch.float64)
    actual = sk.fit_label_quality(losses, max_iter=1, backend=backend)
    assert_equal(actual, scikit_learn(unit(losses), max_iter=1), TIGHT)
    one = sk.fit_label_quality(losses[:1], max_iter=1, backend=backend)
    assert one.degenerate and one.clean_prob.tolist() == [1.0]


@each(backend=CPU_BACKENDS, losses=[(0.0, 1, 2, 3), (2, 0, 1, 2), (1, 1, 1, 5)])
def test_a_centre_that_is_drawn_twice_is_a_degenerate_fit(backend, losses):
    """The operator's uniforms of 0, which a seed gives once in 2⁵³ draws."""
    op, x = getattr(torch.ops.sanm_kernels.fit_label_quality, backend), torch.tensor(losses).float()
    with sk.use_backend(backend):  # which loads it
        clean, *_, n_iter, converged, degenerate = op(x, None, [0.0] * 3, 10, 1e-2, 5e-4, True)
    assert clean.tolist() == [1.0] * 4 and not n_iter and not converged and degenerate


def memberships(x: list[Fraction], uniforms: list[float]) -> set[tuple[bool, ...]]:
    """Exact k-means: which of x may end up in the second cluster.

    What lies exactly midway between the centres, and two starts that are equally good, may go
    either way.
    """
    n, found, seen = len(x), set(), set()
    mean = sum(x) / n
    tolerance = sum((v - mean) ** 2 for v in x) / n / 10_000

    def sides(centres):
        distances = [[abs(v - c) for c in centres] for v in x]
        if any(a == b for a, b in distances):
            yield tuple(a >= b for a, b in distances)
        yield tuple(a > b for a, b in distances)

    def walk(centres):
        for side in sides(centres):
            groups = [[v for v, s in zip(x, side, strict=True) if s == which] for which in (0, 1)]
            moved = tuple(sum(group) / len(group) for group in groups)
            if sum((a - b) ** 2 for a, b in zip(moved, centres, strict=True)) <= tolerance:
                found.update(sides(moved))
            elif moved not in seen:
                seen.add(moved)
                walk(moved)

    first = x[int(uniforms[0] * n)]
    reached = list(itertools.accumulate((v - first) ** 2 for v in x))
    starts = [x[bisect.bisect_left(reached, reached[-1] * Fraction(u))] for u in uniforms[1:]]
    loss = [sum(min((v - c) ** 2, (v - first) ** 2) for v in x) for c in starts]
    for start, own in zip(starts, loss, strict=True):
        if own == min(loss):
            walk((first, start))
    return found


@each(backend=CPU_BACKENDS, seed=[8, 13, 20, 65, 77, 79, 81, 89, 122, 135, 159, 171, 187, 198])
def test_losses_exactly_midway_may_go_either_way(backend, seed):
    """k-means does not say which, and where scikit-learn puts them hangs on its last digits."""
    r = np.random.RandomState(seed)
    n = r.randint(4, 20)
    losses = torch.from_numpy(r.randint(0, r.choice([3, 5, 9]), n) / 4)
    exact = [Fraction(v) for v in losses.tolist()]
    exact = [(v - min(exact)) / (max(exact) - min(exact)) for v in exact]
    either = memberships(exact, np.random.RandomState(seed).random_sample(3).tolist())
    x = unit(losses)
    fits = []
    for side in either:
        second = torch.tensor(side).double()
        share = torch.stack([1 - second, second])
        weights = share.mean(1)
        means = (share * x).mean(1) / weights
        variances = (share * (x - means[:, None]).square()).mean(1) / weights + 5e-4
        fits.append(scikit_learn(x, start=(weights, means, variances)))

    def among(clean: np.ndarray) -> bool:
        return any(np.abs(clean - fit["clean_prob"]).max() <= 1e-7 for fit in fits)

    assert len(either) > 1 and not np.allclose(*(fit["clean_prob"] for fit in fits[:2]), atol=1e-3)
    assert among(scikit_learn(x, seed=seed)["clean_prob"])
    assert among(sk.fit_label_quality(losses, seed=seed, backend=backend).clean_prob.numpy())
