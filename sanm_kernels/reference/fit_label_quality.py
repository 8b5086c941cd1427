"""The two-component Gaussian mixture over losses (section 6 of the method).

Everything is float64. Each pass over the samples yields a few sums (`moments`), each update uses
those sums alone (`update`): reduced over ranks, the same sums fit the same mixture. So every
function takes x (n,), the samples of this rank, and joins its sums with those of the other `Ranks`.
"""

from __future__ import annotations

import itertools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from sanm_kernels.reference import checks
from sanm_kernels.reference.precision import accumulate_dtype
from sanm_kernels.reference.ranks import Ranks

LLOYD_ITERATIONS = 300  # scikit-learn's limits for the k-means that starts the mixture
LLOYD_TOLERANCE = 1e-4
MASS_OFFSET = 10 * torch.finfo(torch.float64).eps
#: A fit is degenerate if a component holds fewer samples than this …
MIN_MASS = 0.5
#: … or has a standard deviation below this share of the data's range, or the means are that close.
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


def average(losses: Tensor, history: Tensor | None, normalize: bool, ranks: Ranks) -> Tensor:
    """Mean over the epochs, each min–max normalised to [0, 1] if `normalize`: float64 (n,).

    losses (n,), history (E, n). An epoch whose losses are all equal normalises to 0.
    """
    epochs = losses[None].double()
    if history is not None:
        epochs = torch.cat([history.double(), epochs])
    if normalize:
        low, high = ranks.extremes(epochs)
        span = high - low
        epochs = (epochs - low[:, None]) / torch.where(span == 0, 1.0, span)[:, None]
    return epochs.mean(0)


def deviations(x: Tensor, centre: Tensor) -> Tensor:
    return (x - centre).sum()


def squared_deviations(x: Tensor, centre: Tensor) -> Tensor:
    return (x - centre).square().sum()


def gaussian(x: Tensor, low: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and variance of all samples, the least of which is `low`: () each."""
    mean = low + ranks.sum(x, deviations, low) / ranks.n
    return mean, ranks.sum(x, squared_deviations, mean) / ranks.n


def moments(x: Tensor, responsibilities: Tensor, centres: Tensor) -> Moments:
    """x (n,), responsibilities (2, n), centres (2,)."""
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
    """log(w_k·N(x_i; m_k, v_k)): (2, n)."""
    scale = p.weights.log() - 0.5 * (2 * torch.pi * p.variances).log()
    return scale[:, None] - 0.5 * (x - p.means[:, None]).square() / p.variances[:, None]


def seed_centres(x: Tensor, uniforms: list[float], ranks: Ranks) -> Tensor:
    """k-means++ with two candidates for the second centre, among the samples of all ranks in the
    ranks' order: (2,). A sample is told to the others by adding it to their zeros."""
    n, zero = x.shape[0], x.new_zeros(1)
    index = min(int(uniforms[0] * ranks.n), ranks.n - 1) - ranks.start
    first = ranks.total(x[index : index + 1] if 0 <= index < n else zero)
    d = (x - first).square()
    cumulative = torch.cat([zero, d]).cumsum(0)
    ends = list(itertools.accumulate(ranks.gather(cumulative[-1:]), operator.add))
    targets = torch.cat([ends[-1] * u for u in uniforms[1:]])
    candidates = x.new_zeros(2)
    if n:
        before = ends[ranks.rank - 1] if ranks.start else zero
        places = torch.searchsorted(before + cumulative[1:], targets).clamp(max=n - 1)
        mine = ~(ends[ranks.rank] < targets)  # reached here, but on no rank before that has samples
        if ranks.start:
            mine &= before < targets
        candidates = torch.where(mine, x[places], candidates)
    candidates = ranks.total(candidates)
    potential = ranks.sum(x, potentials, first, candidates)
    second = torch.where(potential[1] < potential[0], candidates[1:], candidates[:1])
    return torch.cat([first, second])


def potentials(x: Tensor, first: Tensor, candidates: Tensor) -> Tensor:
    """Σ of the squared distance to the nearer of `first` (1,) and each candidate: (2,)."""
    return torch.minimum((x - candidates[:, None]).square(), (x - first).square()).sum(1)


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """One-hot membership (2, n) of the nearer centre, the first on ties."""
    second = (x - centres[1]).square() < (x - centres[0]).square()
    return torch.stack([~second, second]).to(x.dtype)


def assignment(x: Tensor, centres: Tensor) -> Tensor:
    """The moments (3, 2), about `centres`, of the samples nearest to each."""
    return torch.stack(moments(x, nearest(x, centres), centres))


def lloyd(x: Tensor, centres: Tensor, variance: Tensor, ranks: Ranks) -> Tensor:
    """Lloyd's iterations until the centres' summed squared shift is at most 1e-4·variance: (2,).

    A centre without samples becomes NaN and stays it: nothing moves any more, and the fit is
    degenerate.
    """
    tolerance = LLOYD_TOLERANCE * variance
    done = torch.zeros((), dtype=torch.bool, device=x.device)
    for steps in range(1, LLOYD_ITERATIONS + 1):
        m = Moments(*ranks.sum(x, assignment, centres))
        shift = m.first / m.mass
        centres = torch.where(done, centres, centres + shift)
        done = done | ~(shift.square().sum() > tolerance)  # also where it is NaN
        if ranks.stop(done, steps):
            break
    return centres


def expectation(x: Tensor, p: Mixture) -> Tensor:
    """The moments about the means for the posterior under p, and Σ log-likelihood: (7,)."""
    log_p = log_densities(x, p)
    log_sum = log_p.logsumexp(0)
    return torch.cat([*moments(x, (log_p - log_sum).exp(), p.means), log_sum.sum()[None]])


def fit(
    x: Tensor,
    variance: Tensor,
    uniforms: list[float],
    max_iter: int,
    tol: float,
    reg_covar: float,
    ranks: Ranks,
) -> tuple[Mixture, Tensor, Tensor]:
    """The mixture fitted to x (n,), its components in no order; n_iter and converged ()."""
    centres = lloyd(x, seed_centres(x, uniforms, ranks), variance, ranks)
    p = update(Moments(*ranks.sum(x, assignment, centres)), centres, reg_covar)
    bound = x.new_full((), -torch.inf)
    n_iter = torch.zeros((), dtype=torch.int64, device=x.device)
    converged = torch.zeros((), dtype=torch.bool, device=x.device)
    for steps in range(1, max_iter + 1):
        sums = ranks.sum(x, expectation, p)
        log_mean = sums[6] / ranks.n
        p = select(converged, p, update(Moments(*sums[:6].view(3, 2)), p.means, reg_covar))
        n_iter = n_iter + ~converged
        converged = converged | ((log_mean - bound).abs() < tol)
        bound = log_mean
        if ranks.stop(converged, steps):
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
    ranks = Ranks(losses.shape[0])
    return quality(ranks, losses, history, uniforms, max_iter, tol, reg_covar, normalize)


def quality(
    ranks: Ranks,
    losses: Tensor,
    history: Tensor | None,
    uniforms: list[float],
    max_iter: int,
    tol: float,
    reg_covar: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` for the losses (n,) of one of the `ranks`, and history (E, n) with the same E on
    all: the clean probability (n,) of its own samples, and of the rest the same on every rank."""
    dtype = accumulate_dtype(losses)
    n = losses.shape[0]
    if ranks.n:
        x = average(losses, history, normalize, ranks)
    else:  # no sample anywhere stands as one sample at 0: degenerate too
        x, ranks = losses.new_zeros(1, dtype=torch.float64), Ranks(1)
    low, high = ranks.extremes(x)
    mean, variance = gaussian(x, low, ranks)

    p, n_iter, converged = fit(x, variance, uniforms, max_iter, tol, reg_covar, ranks)
    order = p.means.argsort(stable=True)
    p = Mixture(p.means[order], p.variances[order], p.weights[order])
    log_p = log_densities(x, p)
    clean = torch.sigmoid(log_p[0] - log_p[1])

    # Degenerate: no evidence against any label. The mixture is then one Gaussian.
    sound = (
        (p.weights.min() * ranks.n >= MIN_MASS)
        & (p.variances.min() > (MIN_DEVIATION * (high - low)).square())
        & (p.means[1] - p.means[0] > MIN_DEVIATION * (high - low))
        & p.variances.isfinite().all()
    )
    one = Mixture(
        mean.nan_to_num().expand(2),
        (variance + reg_covar).nan_to_num().expand(2),
        torch.eye(2, device=x.device)[0],
    )
    p = select(sound, p, one)
    clean = torch.where(sound, clean, 1.0)[:n].to(dtype)
    n_iter = torch.where(sound, n_iter, 0)
    return clean, p.means, p.variances, p.weights, n_iter, converged & sound, ~sound
