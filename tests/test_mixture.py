"""scikit-learn's GaussianMixture with our fit in it, as `compat.patch` puts it into a script."""

from __future__ import annotations

import copy
import pickle
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture

from sanm_kernels import compat, mixture

SETTINGS = {"n_components": 2, "max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}
Served = mixture.served(GaussianMixture)


def losses(N: int, seed: int) -> np.ndarray:
    g = np.random.RandomState(seed)
    x = np.concatenate(
        [g.exponential(0.06, N // 2), abs(g.normal((0.2, 0.5, 1)[seed % 3], 0.15, N - N // 2))]
    )
    return g.permutation((x - x.min()) / (x.max() - x.min()))[:, None]


def results(cls: Any, x: Any, **settings: Any) -> list[Any]:
    model = cls(**SETTINGS | settings).fit(x)
    found = [model.predict_proba(x), model.means_, model.covariances_, model.weights_]
    return [*found, model.predict(x), model.n_iter_, model.converged_, np.random.random()]


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """How often scikit-learn itself fitted."""
    calls: list[int] = []
    own = GaussianMixture.fit_predict
    monkeypatch.setattr(
        GaussianMixture, "fit_predict", lambda *a, **k: calls.append(1) or own(*a, **k)
    )
    return calls


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["float64", "float32", "tensor"])
@pytest.mark.parametrize("N", [2, 300, 20_000])
def test_equals_scikit_learn(N, kind, seed, fits):
    """To 1e-5 and 1e-4 in its own float32, in its order, from its random numbers."""
    x: Any = losses(N, seed) if N > 2 else np.array([[0.0], [1.0]])
    x = {"float64": x, "float32": x.astype(np.float32), "tensor": torch.from_numpy(x).float()}[kind]
    found = []
    for cls in (GaussianMixture, Served):
        fits.clear()
        np.random.seed(seed)
        found.append(results(cls, x))
        assert len(fits) == (cls is GaussianMixture)
    for a, b in zip(*found, strict=True):
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 if kind == "float32" else 1e-5)
        else:
            assert a == b


@pytest.mark.parametrize("random_state", [None, 3, np.int64(3)])
def test_every_kind_of_random_state(random_state, fits):
    x = losses(500, 0)
    a, b = (
        np.random.seed(1) or results(c, x, random_state=random_state)
        for c in (GaussianMixture, Served)
    )
    assert len(fits) == 1
    np.testing.assert_allclose(a[1], b[1], atol=1e-6)
    assert a[-1] == b[-1]
    states = [np.random.RandomState(4) for _ in range(2)]
    for cls, state in zip((GaussianMixture, Served), states, strict=True):
        results(cls, x, random_state=state)
    assert states[0].random_sample() == states[1].random_sample()


@pytest.mark.parametrize(
    "settings",
    [{"n_components": 3}, {"covariance_type": "diag"}, {"n_init": 2}, {"init_params": "random"},
     {"means_init": np.array([[0.0], [1.0]])}, {"warm_start": True}, {"max_iter": 10.5},
     {"tol": -1}],
    ids=str,
)  # fmt: skip
def test_other_settings_are_scikit_learn_s(settings, fits):
    found = []
    for cls in (GaussianMixture, Served):
        np.random.seed(0)
        try:
            found.append(results(cls, losses(200, 0), **settings))
        except ValueError as error:
            found.append([str(error)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "x",
    [np.random.RandomState(0).rand(50, 2), np.zeros((1, 1)), np.zeros(9), np.full((9, 1), np.nan),
     np.zeros((9, 1)), np.arange(9)[:, None], [[0.0], [1.0], [3.0]], np.zeros((9, 1), np.float16),
     torch.rand(9, 1, requires_grad=True)],
    ids=["2 columns", "1 row", "flat", "NaN", "equal", "int", "list", "half", "gradient"],
)  # fmt: skip
def test_other_inputs_are_scikit_learn_s(x):
    found = []
    for cls in (GaussianMixture, Served):
        np.random.seed(0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found.append(results(cls, x))
            except (ValueError, RuntimeError) as error:
                found.append([type(error), str(error)])
        found[-1].append([w.category for w in said])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_convergence_is_said():
    for cls in (GaussianMixture, Served):
        with pytest.warns(ConvergenceWarning):
            assert not cls(**SETTINGS | {"max_iter": 1}).fit(losses(500, 1)).converged_


def test_all_else_is_scikit_learn_s(fits):
    """Other attributes and methods, other data, copies; and the fit after next."""
    x = losses(400, 2)
    theirs, ours = (cls(**SETTINGS, random_state=1).fit(x) for cls in (GaussianMixture, Served))
    assert isinstance(ours, GaussianMixture) and repr(ours) == repr(theirs) and len(fits) == 1
    np.testing.assert_allclose(
        ours.predict_proba(x[:5] + 1), theirs.predict_proba(x[:5] + 1), atol=1e-6
    )
    assert len(fits) == 1
    with pytest.raises(ValueError, match="features"):
        ours.predict_proba(np.zeros((3, 2)))
    with pytest.raises(AttributeError, match="nothing_"):
        ours.nothing_  # noqa: B018
    again = Served(**SETTINGS, random_state=1).fit(x)
    x_before, x[:] = x.copy(), 0  # the losses of an epoch, overwritten by the next
    assert again.lower_bound_ == theirs.lower_bound_ and again.random_state == 1
    np.testing.assert_array_equal(again.predict_proba(x_before), theirs.predict_proba(x_before))
    assert again.bic(x_before) == theirs.bic(x_before)
    again.fit(x_before[::-1])
    assert "lower_bound_" not in vars(again)

    ours = Served(**SETTINGS, random_state=1).fit(x_before)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is GaussianMixture
        np.testing.assert_array_equal(copied.means_, theirs.means_)
    assert type(clone(ours)) is Served and type(copy.copy(Served())) is GaussianMixture
    for unfitted in (Served(), clone(ours)):
        with pytest.raises(NotFittedError):
            unfitted.predict_proba(x_before)


def test_patch_replaces_it_in_the_script_alone():
    import sklearn.mixture

    module = types.ModuleType("their_script")
    module.GaussianMixture = GaussianMixture
    np.random.seed(7)
    with compat.patch(module, verbose=False) as done:
        assert done.findings["GaussianMixture"].state == "replaced", done
        assert max(done.findings["GaussianMixture"].differences.values()) <= 1e-5
        assert issubclass(module.GaussianMixture, GaussianMixture)
        assert sklearn.mixture.GaussianMixture is GaussianMixture
        assert compat.patch(module, verbose=False).replaced == {}
    after = np.random.random()
    np.random.seed(7)
    assert module.GaussianMixture is GaussianMixture and np.random.random() == after


@pytest.mark.parametrize("kind", ["another", "of one's own", "broken"])
def test_patch_keeps_what_is_another(kind, monkeypatch):
    class Shifted(GaussianMixture):
        def predict_proba(self, X):
            return super().predict_proba(X) * (1 - 1e-4)

    class Broken(GaussianMixture):
        def fit(self, X, y=None):
            raise RuntimeError("no")

    module = types.ModuleType("their_script")
    cls = Broken if kind == "broken" else Shifted
    if kind != "of one's own":
        cls.__module__ = "sklearn.mixture"
    if kind == "another":  # scikit-learn of another version, say: ours computes what it did
        monkeypatch.setattr(mixture, "served", lambda original: Served)
    module.GaussianMixture = cls
    with compat.patch(module, verbose=False) as done:
        finding = done.findings["GaussianMixture"]
        assert done.replaced == {} and module.GaussianMixture is cls
        if kind == "another":
            assert finding.state == "kept" and "posterior differs by 1.0e-04" in finding.reason
        else:
            assert finding.state == "not verified"
