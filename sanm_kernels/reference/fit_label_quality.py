"""The two-component Gaussian mixture over losses (section 6 and the end of section 10).

Everything is float64. Each pass over the samples yields a few sums (`moments`), each update uses
those sums alone (`update`): reduced over ranks, the same sums fit the same mixture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sanm_kernels.reference import checks
from sanm_kernels.reference.precision import accumulate_dtype

LLOYD_ITERATIONS = 300  # scikit-learn's limits for the k-means that starts the mixture
LLOYD_TOLERANCE = 1e-4
MASS_OFFSET = 10 * torch.finfo(torch.float64).eps
#: A fit is degenerate if a component holds fewer samples than this …
MIN_MASS = 0.5
#: … or has a standard deviation below this share of the data's range.
MIN_DEVIATION = 1e-6


class Mixture(NamedTuple):
    """means, variances, weights: (2,) each."""

    means: Tensor
    variances: Tensor
    weights: Tensor


class Moments(NamedTuple):
    """Per component Σr, Σr·(x − c), Σr·(x − c)² about a centre c: (2,) each."""

    mass: Tensor
    first: Tensor
    second: Tensor


def average(losses: Tensor, history: Tensor | None, normalize: bool) -> Tensor:
    """Mean over the epochs, each min–max normalised to [0, 1] if `normalize`: float64 (N,).

    losses (N,), history (E, N). An epoch whose losses are all equal normalises to 0.
    """
    epochs = losses[None].double()
    if history is not None:
        epochs = torch.cat([history.double(), epochs])
    if normalize:
        low, high = epochs.aminmax(dim=1, keepdim=True)
        span = high - low
        epochs = (epochs - low) / torch.where(span == 0, 1.0, span)
    return epochs.mean(0)


def moments(x: Tensor, responsibilities: Tensor, centres: Tensor) -> Moments:
    """x (N,), responsibilities (2, N), centres (2,)."""
    d = x - centres[:, None]
    rd = responsibilities * d
    return Moments(responsibilities.sum(1), rd.sum(1), (rd * d).sum(1))


def update(m: Moments, centres: Tensor, reg_covar: float) -> Mixture:
    """The M-step: the mixture of greatest likelihood for these moments about `centres` (2,)."""
    mass = m.mass + MASS_OFFSET
    shift = m.first / mass
    variances = m.second / mass - shift.square() + reg_covar
    return Mixture(centres + shift, variances, mass / mass.sum())


def log_densities(x: Tensor, p: Mixture) -> Tensor:
    """log(w_k·N(x_i; m_k, v_k)): (2, N)."""
    scale = p.weights.log() - 0.5 * (2 * torch.pi * p.variances).log()
    return scale[:, None] - 0.5 * (x - p.means[:, None]).square() / p.variances[:, None]


def seed_centres(x: Tensor, uniforms: list[float]) -> Tensor:
    """k-means++ with two candidates for the second centre: (2,)."""
    n = x.shape[0]
    first = x[min(int(uniforms[0] * n), n - 1)]
    d = (x - first).square()
    cumulative = d.cumsum(0)
    index = torch.searchsorted(cumulative, torch.stack([cumulative[-1] * u for u in uniforms[1:]]))
    candidates = x[index.clamp(max=n - 1)]
    potential = torch.minimum((x - candidates[:, None]).square(), d).sum(1)
    second = torch.where(potential[1] < potential[0], candidates[1], candidates[0])
    return torch.stack([first, second])


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """One-hot membership (2, N) of the nearer centre, the first on ties."""
    second = (x - centres[1]).square() < (x - centres[0]).square()
    return torch.stack([~second, second]).to(x.dtype)


def lloyd(x: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's iterations until the centres' summed squared shift is at most 1e-4·var(x): (2,)."""
    tolerance = LLOYD_TOLERANCE * x.var(correction=0)
    done = torch.zeros((), dtype=torch.bool, device=x.device)
    for _ in range(LLOYD_ITERATIONS):
        m = moments(x, nearest(x, centres), centres)
        shift = m.first / m.mass
        centres = torch.where(done, centres, centres + shift)
        done = done | (shift.square().sum() <= tolerance)
        if x.device.type == "cpu" and bool(done):  # elsewhere a look would synchronise
            break
    return centres


def fit(
    x: Tensor, uniforms: list[float], max_iter: int, tol: float, reg_covar: float
) -> tuple[Mixture, Tensor, Tensor]:
    """The mixture fitted to x (N,), its components in no order; n_iter and converged ()."""
    centres = lloyd(x, seed_centres(x, uniforms))
    p = update(moments(x, nearest(x, centres), centres), centres, reg_covar)
    bound = x.new_full((), -torch.inf)
    n_iter = torch.zeros((), dtype=torch.int64, device=x.device)
    converged = torch.zeros((), dtype=torch.bool, device=x.device)
    for _ in range(max_iter):
        log_p = log_densities(x, p)
        log_sum = log_p.logsumexp(0)
        updated = update(moments(x, (log_p - log_sum).exp(), p.means), p.means, reg_covar)
        p = select(converged, p, updated)
        n_iter = n_iter + ~converged
        converged = converged | ((log_sum.mean() - bound).abs() < tol)
        bound = log_sum.mean()
        if x.device.type == "cpu" and bool(converged):
            break
    return p, n_iter, converged


def select(condition: Tensor, a: Mixture, b: Mixture) -> Mixture:
    return Mixture(*(torch.where(condition, s, t) for s, t in zip(a, b, strict=True)))


def check(losses: Tensor, history: Tensor | None) -> None:
    """Values of the arguments, where values are checked (`checks.enabled`)."""
    checks.finite(losses, "losses")
    if history is not None:
        checks.finite(history, "history[-4:]")  # the rows that the public function hands on


def forward(
    losses: Tensor,
    history: Tensor | None,
    uniforms: list[float],
    max_iter: int,
    tol: float,
    reg_covar: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clean probability (N,), means, variances, weights (2,), n_iter, converged, degenerate ().

    losses (N,), history (E, N) or None, uniforms: three in [0, 1) for k-means++.
    """
    check(losses, history)
    dtype = accumulate_dtype(losses)
    n = losses.shape[0]
    # No sample stands as one sample at 0: degenerate too.
    x = average(losses, history, normalize) if n else losses.new_zeros(1, dtype=torch.float64)

    p, n_iter, converged = fit(x, uniforms, max_iter, tol, reg_covar)
    order = p.means.argsort(stable=True)
    p = Mixture(p.means[order], p.variances[order], p.weights[order])
    log_p = log_densities(x, p)
    clean = torch.sigmoid(log_p[0] - log_p[1])

    # Degenerate: no evidence against any label. The mixture is then one Gaussian.
    low, high = x.aminmax()
    sound = (
        (p.weights.min() * n >= MIN_MASS)
        & (p.variances.min() > (MIN_DEVIATION * (high - low)).square())
        & (p.means[0] < p.means[1])
        & p.variances.isfinite().all()
    )
    variance = (x.var(correction=0) + reg_covar).nan_to_num()
    one = Mixture(
        x.mean().nan_to_num().expand(2), variance.expand(2), torch.eye(2, device=x.device)[0]
    )
    p = select(sound, p, one)
    clean = torch.where(sound, clean, 1.0)[:n].to(dtype)
    n_iter = torch.where(sound, n_iter, 0)
    return clean, p.means, p.variances, p.weights, n_iter, converged & sound, ~sound
