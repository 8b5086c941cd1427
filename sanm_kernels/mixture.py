"""scikit-learn's GaussianMixture as these scripts use it, with our fit and posterior in it.

It is made from the class that the script has imported: scikit-learn is not imported here.
"""

from __future__ import annotations

import numbers
import sys
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sanm_kernels.backends import call
from sanm_kernels.reference.fit_label_quality import Mixture, log_densities, seed_centres
from sanm_kernels.reference.ranks import Ranks

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


def _column(X: Any) -> NDArray[Any] | None:
    """One number per sample as (N, 1) float32 or float64, all finite; None if it is not that.

    Of tensors, as the scripts have them, scikit-learn does not see the type: float64 for all.
    """
    if isinstance(X, torch.Tensor) and X.device.type == "cpu" and not X.requires_grad:
        X = X.double().numpy() if X.dtype in (torch.float32, torch.float64) else None
    if type(X) is not np.ndarray or X.dtype not in (np.float32, np.float64) or X.ndim != 2:
        return None
    return X if X.shape[1] == 1 and len(X) > 1 and np.isfinite(X).all() else None


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
            x, settings, generator = _column(X), _settings(self), _generator(self.random_state)
            if x is None or settings is None or generator is None:
                return super().fit(X, y)
            state = generator.get_state()
            uniforms = generator.random_sample(3).tolist()
            losses = torch.from_numpy(x[:, 0].astype(np.float64))
            _, *fitted, n_iter, converged, degenerate = call(
                "fit_label_quality", losses.device, None, losses, None, uniforms, *settings, False
            )
            if degenerate:
                generator.set_state(state)
                return super().fit(X, y)
            first, second = seed_centres(losses, uniforms, Ranks(len(losses)))
            kind = np.dtype(np.float64) if x.dtype == np.float64 else single
            means, variances, weights = (
                (v.flip(0) if first > second else v).numpy().astype(kind) for v in fitted
            )
            for name in left_behind & set(self.__dict__):
                delattr(self, name)
            self.means_, self.covariances_ = means[:, None], variances[:, None, None]
            self.weights_, self.n_features_in_ = weights, 1
            self.converged_, self.n_iter_ = bool(converged), int(n_iter)
            self._start = x.copy(), state, Mixture(*fitted), bool(first > second)
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
            start, x = self.__dict__.get("_start"), _column(X)
            if start is None or x is None or x.dtype != start[0].dtype:
                return None
            log_p = log_densities(torch.from_numpy(x[:, 0].astype(np.float64)), start[2])
            return log_p[1] - log_p[0] if start[3] else log_p[0] - log_p[1]

        def predict_proba(self, X: Any) -> Any:
            odds = self._odds(X)
            if odds is None:
                return super().predict_proba(X)
            both = torch.stack([odds, -odds], 1).sigmoid_()
            return both.numpy().astype(self.means_.dtype, copy=False)

        def predict(self, X: Any) -> Any:
            odds = self._odds(X)
            return super().predict(X) if odds is None else (odds < 0).numpy().astype(np.int64)

        def __getattr__(self, name: str) -> Any:
            if name not in left_behind or "_start" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            X, state = self.__dict__.pop("_start")[:2]
            given, self.random_state = self.random_state, np.random.RandomState()
            self.random_state.set_state(state)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    super().fit(X)
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
