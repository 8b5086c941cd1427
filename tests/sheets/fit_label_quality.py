"""fit_label_quality."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from maker import DTYPES, Maker
from torch import Tensor

import sanm_kernels as sk
from sheets import OURS, Case, Inputs, Operation, Sheet


def _inputs(N: int = 600) -> Inputs:
    wrong, spread = torch.rand(N) < 0.4, torch.randn(N)
    return {"losses": torch.where(wrong, 4 + spread, 0.3 * spread.exp()).abs()}


def _run(x: Inputs, **options: Any) -> Inputs:
    quality = sk.fit_label_quality(x["losses"], **options)
    return {"clean_prob": quality.clean_prob, "means": quality.means}


def _run_history(x: Inputs, **options: Any) -> Inputs:
    history = torch.stack([1 + x["losses"] * (i + 1) for i in range(4)])
    quality = sk.fit_label_quality(x["losses"], history=history, **options)
    return {"clean_prob": quality.clean_prob, "means": quality.means}


def _run_plain(x: Inputs, **options: Any) -> Inputs:
    return _run(x, normalize=False, **options)


def _random(m: Maker) -> None:
    n = m.integer(0, 3) if m.chance(0.1) else m.size(3000, 300)
    if not m.small and m.chance(0.05):
        n = m.integer(8192, 12000)  # where the CPU kernel fits a histogram
    wrong, epochs = m.uniform(n) < m.real(0.2, 0.8), m.integer(0, 6)
    low = 0.3 * m.normal(n).exp()
    x = torch.where(wrong, 3 + m.real(0.1, 1) * m.normal(n), low).abs()
    if m.chance(0.2):
        x = (x * 4).round() / 4
    if m.chance(0.05):
        x = torch.full_like(x, 0.75)
    past = torch.stack([x * (e + 1) + 0.1 * m.normal(n) for e in range(epochs)]) if epochs else None
    dtype = [m.choice(DTYPES)]
    given = {"losses": m.give(m.spoil(x, [math.nan, math.inf, -math.inf], "losses"), dtype)}
    if past is not None:
        given["history"] = m.give(past, dtype)
    options = {"seed": m.integer(0, 2**32 - 1), "max_iter": m.choice([1, 10, 10, 30])}
    options |= {"tol": m.choice([0.0, 1e-3, 1e-2]), "normalize": m.chance(0.7)}
    options |= {"reg_covar": m.choice([5e-4, 5e-4, 0.05, 1e-6])}
    m.call.inputs, m.call.same = given, ("n_iter", "converged", "degenerate")
    m.call.run = lambda x, backend: sk.fit_label_quality(**x, **options, backend=backend)


def _sklearn(losses: Tensor) -> Tensor:
    """losses (N,) → clean probability (N,) by scikit-learn's mixture, in float64."""
    from sklearn.mixture import GaussianMixture

    x = losses.double().cpu().numpy()
    x = ((x - x.min()) / (x.max() - x.min()))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten iterations are the method's, converged or not
        posterior = mixture.fit(x).predict_proba(x)
    return torch.from_numpy(posterior[:, mixture.means_.argmin()]).to(losses.device)


def _case(N: int) -> Case:
    def make() -> Tensor:
        wrong = torch.rand(N) < 0.4
        spread = torch.randn(N)
        return torch.where(wrong, 4 + spread, 0.3 * spread.exp())

    def agree(a: list[Tensor], b: list[Tensor]) -> None:
        torch.testing.assert_close(a[0].double(), b[0].double(), rtol=0, atol=1e-4)

    run = {
        OURS: lambda x: [sk.fit_label_quality(x).clean_prob],
        "scikit-learn": lambda x: [_sklearn(x)],
    }
    return Case("fit_label_quality", f"N={N}", make, run, 4 * N, 4 * N, N, agree)


def _operation(run: Any) -> Operation:
    return Operation("fit_label_quality", _inputs, run, (), ("losses",), {"N": 50_000})


SHEET = Sheet(
    {"fit_label_quality": _operation(_run)},
    variants={
        "fit_label_quality, history": _operation(_run_history),
        "fit_label_quality, not normalised": _operation(_run_plain),
    },
    random=_random,
    share=6,
    case=_case,
    shapes=[(50_000,), (1_000_000,)],  # N
    headline=[(1_000_000,)],
    compiled=[{"N": 50_000}],
)
