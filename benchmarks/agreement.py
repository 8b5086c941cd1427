"""``python -m benchmarks.agreement``: fit_label_quality against scikit-learn on 23 data sets."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

import sanm_kernels as sk

KINDS = ("bimodal", "overlapping", "heavy tails", "cross-entropy", "ties")


def dataset(kind: str, n: int, seed: int) -> Tensor:
    """Losses (n,) float64 ≥ 0, shaped as losses of clean and mislabelled samples are."""
    random = np.random.RandomState(seed)
    wrong = random.random_sample(n) < random.uniform(0.1, 0.6)
    if kind == "bimodal":
        x = np.where(wrong, random.normal(4, 0.8, n), random.normal(0.5, 0.3, n))
    elif kind == "overlapping":
        x = np.where(wrong, random.normal(2, 1, n), random.normal(1, 0.7, n))
    elif kind == "heavy tails":
        x = np.where(wrong, 2 + random.standard_t(3, n), random.exponential(0.4, n))
    else:  # −log of a softmax's probability
        x = -np.log(np.where(wrong, random.beta(1, 12, n), random.beta(6, 1, n)) + 1e-7)
        if kind == "ties":
            x = x.round(2)
    return torch.from_numpy(np.abs(x))


def compare(losses: Tensor, seed: int, backend: str) -> tuple[float, bool]:
    """Largest difference of the posterior, and whether the iterations are as many."""
    ours = sk.fit_label_quality(losses, seed=seed, backend=backend)
    x = ((losses - losses.min()) / (losses.max() - losses.min())).numpy()[:, None]
    theirs = GaussianMixture(
        n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge in ten iterations
        theirs.fit(x)
    posterior = theirs.predict_proba(x)[:, int(theirs.means_.argmin())]
    difference = np.abs(ours.clean_prob.numpy() - posterior).max()
    return float(difference), int(ours.n_iter) == theirs.n_iter_


def main() -> None:
    sets = [(KINDS[k % 5], 50_000, k) for k in range(20)]
    sets += [(KINDS[k], 1_000_000, k) for k in (0, 1, 3)]
    for backend in ("reference", "cpu"):
        worst, alike = 0.0, 0
        for kind, n, seed in sets:
            difference, same = compare(dataset(kind, n, seed), seed, backend)
            worst, alike = max(worst, difference), alike + same
            print(f"{backend:10}{kind:15}{n:>9,}  {difference:.1e}  iterations equal: {same}")
        print(f"{backend}: largest difference {worst:.1e}, iterations {alike} of {len(sets)} equal")


if __name__ == "__main__":
    main()
