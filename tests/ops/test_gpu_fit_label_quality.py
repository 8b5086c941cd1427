"""fit_label_quality of the GPU backends against the reference: on a GPU, or emulated."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, TRITON_DEVICE, each, extended, lay_out, more
from torch import Tensor

import sanm_kernels as sk

SANITIZED = (
    "cuda and test_fits and skewed and 2049",
    "cuda and (test_fits and skewed and 2049 or history)",
)

# NumPy's, of Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")
KINDS = ("two modes", "skewed", "noise", "ties")
EXACT = ("n_iter", "converged", "degenerate")
DWINDLING = {"reg_covar": 0.1, "max_iter": 30, "tol": 0.0}  # EM that starves a component
MERGING = {"reg_covar": 0.5, "max_iter": 30, "tol": 0.0}  # … and that brings the means together


def data(kind: str, n: int) -> Tensor:
    """n losses, float64."""
    r = np.random.RandomState(n)
    m = (3 * n) // 5
    if kind == "two modes":
        x = np.r_[r.normal(0.2, 0.05, m), r.normal(2.5, 0.6, n - m)]
    elif kind == "skewed":
        x = np.r_[r.gamma(1.0, 0.2, m), r.normal(1.4, 0.5, n - m)]
    elif kind == "noise":  # nine wrong labels in ten, not yet learnt
        x = np.r_[r.normal(2.0, 0.3, n // 10), r.normal(2.4, 0.3, n - n // 10)]
    else:
        x = np.round(np.r_[r.gamma(1.0, 0.3, m), r.normal(2.0, 0.5, n - m)] * 4) / 4
    return torch.from_numpy(x[r.permutation(n)])


def kernel():
    return importlib.import_module("sanm_kernels.backends.triton.fit_label_quality")


def gpu_fit(backend: str, x: Tensor, history: Tensor | None = None, **options) -> sk.LabelQuality:
    """The result on the CPU; the arguments stay as they are."""
    before = [None if t is None else t.clone() for t in (x, history)]
    device = GPU_DEVICES[backend]
    x, history = (None if t is None else on_device(t, device) for t in (x, history))
    fit = sk.fit_label_quality(x, history=history, backend=backend, **options)
    for t, was in zip((x, history), before, strict=True):
        assert t is None or torch.equal(t.cpu().nan_to_num(), was.nan_to_num())
    return sk.LabelQuality(*(t.cpu() for t in fit))


def on_device(x: Tensor, device: str) -> Tensor:
    """x on the device with its strides."""
    if device == "cpu":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def assert_same_fit(got: sk.LabelQuality, expected: sk.LabelQuality, tolerance: float = 1e-9):
    """Decisions alike, numbers within the tolerance of the largest; float32 is rounded besides."""
    for name in EXACT:
        assert getattr(got, name).item() == getattr(expected, name).item(), name
    for name in ("clean_prob", "means", "variances", "weights"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous(), name
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        scale = max(b.abs().max().item(), 1.0) if b.numel() else 1.0
        allowed = tolerance * scale + (2e-7 if a.dtype == torch.float32 else 0.0)
        assert error <= allowed, f"{name}: error {error:.3g}"


def reference_fit(x: Tensor, history: Tensor | None = None, **options) -> sk.LabelQuality:
    return sk.fit_label_quality(x, history=history, backend="reference", **options)


@each(kind=KINDS, n=[2, 3, 17, 1000, 1024, 1025, 2049, 20_000])
def test_fits(backend, kind, n):
    x = data(kind, n)
    expected = reference_fit(x)
    assert n < 17 or not expected.degenerate
    fit = gpu_fit(backend, x)
    assert_same_fit(fit, expected)
    if sk.available_backends()["cpu"] is None:  # from 8192 samples on it fits a histogram
        fast = sk.fit_label_quality(x, backend="cpu")
        assert_same_fit(fit, fast, 1e-9 if n < 8192 else 2e-5)


@pytest.mark.parametrize("kind", [KINDS[0], *more(*KINDS[1:])])
def test_equals_scikit_learn(backend, kind):
    mixture = pytest.importorskip("sklearn.mixture")
    x = data(kind, 1500)
    y = ((x - x.min()) / (x.max() - x.min()))[:, None].numpy()
    exact = mixture.GaussianMixture(2, max_iter=20, tol=1e-2, reg_covar=5e-4, random_state=3).fit(y)
    fit = gpu_fit(backend, x, seed=3, max_iter=20)
    clean = exact.predict_proba(y)[:, exact.means_[:, 0].argmin()]
    assert np.abs(fit.clean_prob.numpy() - clean).max() < 1e-9
    assert fit.n_iter == exact.n_iter_ and exact.n_iter_ > 1


@pytest.mark.parametrize(
    "options",
    (
        {"max_iter": 40, "tol": 1e-7},
        {"normalize": False, "reg_covar": 0.01},
        *more({"seed": 1}, {"seed": 2**32 - 1}, {"max_iter": 1}, {"tol": 0.0}, {"tol": 10.0}),
        *more({"reg_covar": 0.0}, {"reg_covar": 0.1}),
    ),
    ids=str,
)
def test_options(backend, options):
    x = data("skewed", 1500)
    assert_same_fit(gpu_fit(backend, x, **options), reference_fit(x, **options))


@each(dtype=DTYPES, normalize=[True, False])
def test_dtypes_and_layouts(backend, dtype, normalize):
    x = data("skewed", 1100).to(dtype)
    history = torch.stack([2.0 * x.roll(1), x.square(), torch.full_like(x, 0.75)])
    expected = reference_fit(x, normalize=normalize)
    averaged = reference_fit(x, history, normalize=normalize)
    assert not expected.degenerate and not averaged.degenerate
    for layout, of_history in (("offset", "transposed"), ("strided", "offset")):
        y, past = lay_out(x, layout), lay_out(history, of_history)
        assert_same_fit(gpu_fit(backend, y, normalize=normalize), expected)
        assert_same_fit(gpu_fit(backend, y, past, normalize=normalize), averaged)


@pytest.mark.parametrize("normalize", (True, *more(False)))
def test_history_is_averaged_over_five_epochs(backend, normalize):
    x = data("two modes", 1300)
    history = torch.stack([2.0**e * x.roll(e) + 0.1 * e for e in range(1, 7)])
    for epochs in (0, 1, 6):
        fit = gpu_fit(backend, x, history[:epochs], normalize=normalize)
        assert_same_fit(fit, reference_fit(x, history[:epochs], normalize=normalize))


@needs_triton
@pytest.mark.parametrize("n", (65, *more(8, 63, 64, 200)))
def test_more_blocks_than_a_block_holds(n, monkeypatch):
    monkeypatch.setitem(kernel().CONFIG, "BLOCK", 8)
    x = data("skewed", n)
    history = x.flip(0)[None].exp()
    assert_same_fit(gpu_fit("triton", x), reference_fit(x))
    assert_same_fit(gpu_fit("triton", x, history, seed=1), reference_fit(x, history, seed=1))


@pytest.mark.parametrize("n", (3, *more(2, 4, 5, 8)))
def test_few_values_on_a_grid(backend, n):
    """Equal distances and repeated values: who wins ties decides the fit."""
    r = np.random.RandomState(n)
    for seed in range(10):
        x = torch.from_numpy(r.randint(0, 5, n) / 4.0)
        options = {"seed": seed, "reg_covar": 1e-3, "normalize": False}
        assert_same_fit(gpu_fit(backend, x, **options), reference_fit(x, **options))


@pytest.mark.parametrize("dtype", (torch.float64, *more(torch.bfloat16)), ids=str)
@pytest.mark.parametrize(
    "x, options",
    (
        (torch.zeros(0), {}),
        (torch.zeros(0), {"history": 3}),
        (torch.ones(1), {}),
        (torch.full((7,), 2.5), {}),
        (torch.full((1500,), 2.5), {"history": 2}),
        (torch.full((7,), -2.5), {"normalize": False}),
        ((torch.arange(9) % 3 == 0).float(), {"reg_covar": 0.0}),  # variances of zero
        pytest.param((torch.arange(1500) % 3 == 0).float(), {"reg_covar": 0.0}, marks=extended),
        ((torch.arange(9) % 3 == 0).float(), {"reg_covar": 0.9e-12}),  # deviations too small
        (torch.tensor([0.0, 0, 1, 1, 9]), DWINDLING),  # less than half a sample in the upper …
        (torch.tensor([9.0, 9, 8, 8, 0]), DWINDLING),  # … or the lower component
        (data("noise", 1237), MERGING),
    ),
    ids=lambda v: str(v) if isinstance(v, dict) else f"{len(v)}",
)
def test_degenerate_fits_call_every_label_clean(backend, dtype, x, options):
    x, options = x.to(dtype), dict(options)
    if "history" in options:
        options["history"] = x.repeat(options["history"], 1)
    fit = gpu_fit(backend, x, **options)
    assert fit.degenerate and not fit.converged and fit.n_iter == 0
    assert torch.equal(fit.clean_prob, torch.ones_like(fit.clean_prob))
    assert fit.weights.tolist() == [1, 0]
    assert_same_fit(fit, reference_fit(x, **options))


def test_narrow_components_far_apart_are_no_degenerate_fit(backend):
    x = (torch.arange(9) % 3 == 0).double()
    fit = gpu_fit(backend, x, reg_covar=1.1e-12)
    assert not fit.degenerate and torch.equal(fit.clean_prob, 1 - x)
    assert_same_fit(fit, reference_fit(x, reg_covar=1.1e-12))


@each(
    values=[
        [-1e308, 1e308, 3.0, 4.0],
        [1e200, 1e308, 3.0, 4.0],
        [0.0, 5e-324, 0.0, 1e-320],
        [1.0, 1.0 + 2.0**-52, 1.0, 1.0],
    ],
    normalize=[True, False],
)
def test_extreme_values_never_give_nan(backend, values, normalize):
    x = torch.tensor(values, dtype=torch.float64)
    for history in (None, x.flip(0)[None]):
        fit = gpu_fit(backend, x, history, normalize=normalize)
        assert not any(torch.isnan(t).any() for t in fit)
        assert ((fit.clean_prob >= 0) & (fit.clean_prob <= 1)).all()


@each(value=[torch.nan, torch.inf, -torch.inf], normalize=[True, False])
def test_values_that_nobody_checks_accuse_no_label(backend, value, normalize, unchecked):
    """A GPU's values are not looked at: one that is not finite makes the fit degenerate."""
    x = data("two modes", 1500)
    x[1234] = value
    fit = gpu_fit(backend, x, normalize=normalize)
    assert fit.degenerate and (fit.clean_prob == 1).all()
    assert not any(torch.isnan(t).any() for t in fit)


@pytest.mark.skipif(TRITON_DEVICE != "cpu", reason="only CPU tensors are checked unasked")
def test_values_that_are_not_finite_are_refused():
    x = data("two modes", 30)
    bad = x.clone()
    bad[7] = torch.nan
    with pytest.raises(ValueError, match=r"^losses: .* got nan at index \[7\]"):
        gpu_fit("triton", bad)
    with pytest.raises(ValueError, match=r"^history\[-4:\]: .* got nan at index \[0, 7\]"):
        gpu_fit("triton", x, bad[None])


@pytest.mark.parametrize("descending", (False, *more(True)))
def test_losses_in_order(backend, descending):
    x = data("skewed", 4500).sort(descending=descending).values
    assert_same_fit(gpu_fit(backend, x), reference_fit(x))


def test_the_same_bits_twice(backend):
    x = data("skewed", 5000).float()
    first, second = (gpu_fit(backend, x, x.square()[None]) for _ in range(2))
    assert not first.degenerate
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("processors", (1, 2, 3, 5, *more(8)))
def test_any_number_of_multiprocessors(processors, monkeypatch):
    """Emulated: the CUDA kernel's blocks are as many, and all at work at the same time."""
    if GPU_DEVICES["cuda"] != "cpu":
        pytest.skip("a GPU has as many as it has")
    monkeypatch.setenv("SANM_CUDA_HOST_MULTIPROCESSORS", str(processors))
    for kind, n in (("two modes", 6001), ("skewed", 2048)):
        x = data(kind, n)
        assert_same_fit(gpu_fit("cuda", x), reference_fit(x))


@needs_triton
@pytest.mark.parametrize("max_iter", (1, 10))
def test_a_fixed_number_of_launches_and_no_look_at_values(max_iter):
    """Tensors without memory have no values: a look at one raises."""
    from sanm_kernels.backends.triton import launch

    x = torch.empty(50_000, device="meta")
    for history, normalize in ((None, True), (torch.empty(4, 50_000, device="meta"), False)):
        with launch.recording() as recorded:
            results = kernel().forward(
                x, history, [0.1, 0.5, 0.9], max_iter, 1e-2, 5e-4, normalize
            )  # fmt: skip
        assert len(recorded) == max_iter + 4 + normalize
        assert [tuple(t.shape) for t in results] == [(50_000,), (2,), (2,), (2,), (), (), ()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_fits_new_losses(backend):
    x = data("skewed", 5000).cuda()
    sk.fit_label_quality(x, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fit = sk.fit_label_quality(x, backend=backend)
    for kind in ("two modes", "noise", "skewed"):
        x.copy_(data(kind, 5000))
        graph.replay()
        assert_same_fit(sk.LabelQuality(*(t.cpu() for t in fit)), reference_fit(x.cpu()))
