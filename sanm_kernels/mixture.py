"""scikit-learn's GaussianMixture as these scripts use it, with our fit and posterior in it.

It is made from the class that the script has imported: scikit-learn is not imported here.
"""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sanm_kernels.backends import call
from sanm_kernels.reference.fit_label_quality import potentials

#: Of the method, beside max_iter, tol and reg_covar. With any other scikit-learn's own code serves.
SETTINGS = {
    "n_components": 2,
    "covariance_type": "full",
    "n_init": 1,
    "init_params": "kmeans",
    "weights_init": None,
    "means_init": None,
    "precisions_init": None,
    "warm_start": False,
    "verbose": 0,
}

#: Samples that are worked on at once: the memory of a temporary stays in the cache.
BLOCK = 4096


def _column(X: Any) -> tuple[np.dtype[Any], NDArray[np.float64]] | None:
    """One finite number per sample, (N, 1) float32 or float64: that type, and a copy (N,).

    None if it is not that. Of tensors, as the scripts have them, scikit-learn does not see the
    type: it takes them for float64.
    """
    given = X
    if isinstance(X, torch.Tensor) and X.device.type == "cpu" and not X.requires_grad:
        given = X.numpy() if X.dtype in (torch.float32, torch.float64) else None
    if type(given) is not np.ndarray or given.dtype not in (np.float32, np.float64):
        return None
    if given.ndim != 2 or given.shape[1] != 1 or len(given) < 2:
        return None
    x = given[:, 0].astype(np.float64)
    kind = given.dtype if given is X else x.dtype
    return (kind, x) if np.isfinite(x).all() else None


def _generator(random_state: Any) -> Any:
    """What scikit-learn draws from: NumPy's global state, that of a seed, or a RandomState."""
    if isinstance(random_state, numbers.Integral):
        return np.random.RandomState(int(random_state))
    if random_state is None:
        return np.random
    return random_state if isinstance(random_state, np.random.RandomState) else None


def _settings(model: Any) -> tuple[int, float, float] | None:
    """max_iter, tol, reg_covar; None if they, or others, are not the method's."""
    given = (model.max_iter, model.tol, model.reg_covar)
    for name, value in SETTINGS.items():
        its = getattr(model, name, model)
        if type(its) is not type(value) or its != value:
            return None
    if any(isinstance(x, bool) or not isinstance(x, numbers.Real) for x in given):
        return None
    if not isinstance(model.max_iter, numbers.Integral) or model.max_iter < 1:
        return None
    max_iter, tol, reg_covar = int(model.max_iter), float(model.tol), float(model.reg_covar)
    return (max_iter, tol, reg_covar) if tol >= 0 and reg_covar >= 0 else None


def _rising(x: NDArray[np.float64], uniforms: list[float]) -> bool:
    """Whether k-means++ starts with the smaller centre, as `seed_centres` of the reference does it.

    Then its clusters rise, and so do the components. Often both candidates for the second centre
    are on one side of the first, and it does not matter which of them is taken.
    """
    first = x[min(int(uniforms[0] * len(x)), len(x) - 1)]
    blocks = [x[start : start + BLOCK] for start in range(0, len(x), BLOCK)]
    apart = (block - first for block in blocks)
    sums = [float(d @ d) for d in apart]
    ends = np.cumsum(sums)
    chosen = []
    for target in ends[-1] * np.array(uniforms[1:]):
        b = min(int(np.searchsorted(ends, target)), len(blocks) - 1)
        reached = ends[b] - sums[b] + np.cumsum(np.square(blocks[b] - first))
        chosen.append(blocks[b][min(int(np.searchsorted(reached, target)), len(reached) - 1)])
    candidates = np.array(chosen)
    above = candidates > first
    if above[0] != above[1]:
        tensors = (torch.from_numpy(v) for v in (x, np.array([first]), candidates))
        one, other = potentials(*tensors).tolist()
        return bool(above[int(other < one)])
    return bool(above[0])


def served(original: Any) -> Any:
    """A subclass of scikit-learn's `original` that fits and predicts by this package.

    The start is scikit-learn's, from the same random numbers of the same generator, and so is
    everything for other settings, other inputs, fits without two components, and whatever else is
    asked of an object: then scikit-learn fits it, from the same start.
    """
    tried = original(n_components=2, random_state=0).fit(np.arange(8, dtype=np.float32)[:, None])
    single = tried.means_.dtype  # for float32 losses: versions of scikit-learn differ
    left_behind = {name for name in vars(tried) if name.endswith("_")}

    class GaussianMixture(original):  # type: ignore[misc]
        _sanm_kernels = True
        random_state: Any

        def fit(self, X: Any, y: Any = None) -> Any:
            self.__dict__.pop("_start", None)
            column, settings = _column(X), _settings(self)
            generator = _generator(self.random_state)
            if column is None or settings is None or generator is None:
                return super().fit(X, y)
            state = generator.get_state()
            uniforms = generator.random_sample(3).tolist()
            kind, x = column
            losses = torch.from_numpy(x)
            smaller, *fitted, n_iter, converged, degenerate = call(
                "fit_label_quality", losses.device, None, losses, None, uniforms, *settings, False
            )
            if degenerate:
                generator.set_state(state)
                return super().fit(X, y)
            rising = _rising(x, uniforms)
            fitted = fitted if rising else [v.flip(0) for v in fitted]
            found = single if kind == np.float32 else kind
            means, variances, weights = (v.numpy().astype(found) for v in fitted)
            for name in left_behind & set(self.__dict__):
                delattr(self, name)
            self.means_, self.covariances_ = means[:, None], variances[:, None, None]
            self.weights_, self.n_features_in_ = weights, 1
            self.converged_, self.n_iter_ = bool(converged), int(n_iter)
            posterior = smaller.numpy(), int(not rising)
            self._start = kind, x, state, [v.tolist() for v in fitted], posterior
            if not converged:
                category = sys.modules["sklearn.exceptions"].ConvergenceWarning
                warnings.warn(
                    "The mixture did not converge: raise max_iter or tol, or look at the losses.",
                    category,
                    stacklevel=2,
                )
            return self

        def _odds(self, X: Any) -> torch.Tensor | None:
            """log p(first)/p(second) (N,) float64 under our fit, if it is one and `X` like its."""
            start, column = self.__dict__.get("_start"), _column(X)
            if start is None or column is None or column[0] != start[0]:
                return None
            (m, n), (v, w), (a, b) = start[3]
            given = torch.from_numpy(column[1])
            odds = (given - n).square_().mul_(0.5 / w)
            odds -= given.sub_(m).square_().mul_(0.5 / v)
            return odds.add_(math.log(a / b) + 0.5 * math.log(w / v))

        def _posterior(self, X: Any) -> tuple[NDArray[np.float64], int] | None:
            """p(component | x) (N,) of one component, and which; of what was fitted it is known."""
            start, column = self.__dict__.get("_start"), _column(X)
            if start is None or column is None:
                return None
            if column[0] == start[0] and np.array_equal(column[1], start[1]):
                return start[4]
            odds = self._odds(X)
            return None if odds is None else (odds.sigmoid_().numpy(), 0)

        def predict_proba(self, X: Any) -> Any:
            found = self._posterior(X)
            if found is None:
                return super().predict_proba(X)
            probability, component = found
            both = np.empty((len(probability), 2), self.means_.dtype)
            both[:, component] = probability
            np.subtract(1, probability, out=both[:, 1 - component], casting="same_kind")
            return both

        def predict(self, X: Any) -> Any:
            odds = self._odds(X)
            return super().predict(X) if odds is None else (odds < 0).numpy().astype(np.int64)

        def __getattr__(self, name: str) -> Any:
            if name not in left_behind or "_start" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            kind, x, state, *_ = self.__dict__.pop("_start")
            given, self.random_state = self.random_state, np.random.RandomState()
            self.random_state.set_state(state)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    super().fit(x[:, None].astype(kind))
            finally:
                self.random_state = given
            return getattr(self, name)

        def __reduce__(self) -> Any:
            """A copy, also one in a file, is scikit-learn's own."""
            if "_start" in self.__dict__:
                self.__getattr__("precisions_cholesky_")
            return original, (), self.__getstate__()

    GaussianMixture.__module__, GaussianMixture.__doc__ = original.__module__, original.__doc__
    GaussianMixture.__qualname__ = original.__qualname__
    return GaussianMixture
