"""The training loss on rows of logits (section 5), targets modulated and mixed on the fly.

Everything is computed in A = float32, or float64 for float64 logits. Row i of n is compared with
t_i = λ·t'_i + (1 − λ)·t'_π(i), where t' are the modulated targets and π the permutation; the first
n_x rows by cross-entropy, the others by squared error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sanm_kernels.reference import checks
from sanm_kernels.reference.modulation import modulate
from sanm_kernels.reference.precision import accumulate_dtype, numbers


def check(
    logits: Tensor,
    targets: Tensor,
    ratio: Tensor | None,
    permutation: Tensor | None,
    prior: Tensor | None,
    ignore_index: int,
) -> None:
    """Values of the arguments, where values are checked (`checks.enabled`)."""
    n, K = logits.shape
    if not targets.is_floating_point():
        checks.indices(targets, K, "targets", ignore_index)
    if ratio is not None:
        checks.unit_interval(ratio, "ratio")
    if permutation is not None:
        rows = targets.shape[:-1].numel() if targets.is_floating_point() else len(targets)
        checks.indices(permutation[:n], rows, "mix permutation")
    if prior is not None:
        checks.unit_interval(prior, "prior")


def _rows(
    logits: Tensor,
    targets: Tensor,
    ratio: Tensor | None,
    permutation: Tensor | None,
    lam: float | Tensor,
    clamp: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The rows' final targets (n, K) in A, and which of the rows (n,) count."""
    n, K = logits.shape
    dtype = accumulate_dtype(logits)
    if targets.is_floating_point():
        t = targets.reshape(-1, K).to(dtype)
        valid = torch.ones(len(t), dtype=torch.bool, device=t.device)
    else:
        valid = targets != ignore_index
        t = torch.nn.functional.one_hot(targets.where(valid, 0), K).to(dtype)
    if ratio is not None:
        t = modulate(t, ratio, clamp)
    if permutation is None:
        return t, valid
    partner = permutation[:n]
    return lam * t[:n] + (1 - lam) * t[partner], valid[:n] & valid[partner]


def _row_weights(
    valid: Tensor, counts: Tensor, num_labeled: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    """What each row (n,) weighs in L_x or L_u: 1, or 1/(rows that count) for the mean; else 0."""
    weights = valid.to(dtype)
    if mean:
        for part, count in zip((weights[:num_labeled], weights[num_labeled:]), counts, strict=True):
            part /= count.clamp(min=1)
    return weights


def _weighted(weight: float | Tensor, term: Tensor) -> Tensor:
    """weight·term, and 0 for weight 0 even where the term is infinite."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0, weight.to(term.dtype) * term)
    return weight * term if weight != 0 else torch.zeros_like(term)


def _log_softmax(logits: Tensor, normalizer: Tensor) -> Tensor:
    """(z − max) − log Σ e^(z − max): kept apart, large logits lose no digits."""
    return logits.to(normalizer.dtype) - normalizer[:, :1] - normalizer[:, 1:]


def forward(
    logits: Tensor,
    targets: Tensor,
    ratio: Tensor | None,
    permutation: Tensor | None,
    prior: Tensor | None,
    scalars: Tensor,
    num_labeled: int,
    clamp: bool,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, ...]:
    """Total, L_x, L_u, P, N (), the rows' losses (n,); for backward (max, log-sum) (n, 2), p̄ (K,),
    and how many labelled and unlabelled rows count (2,) int64.

    Where p̄ is so small that a p of some weight in it may have been rounded to 0, it is taken from
    log p, and its place has its logarithm, which is negative.

    logits (n, K); targets (…, K) floats or (M,) int64; ratio (M,); permutation (≥ n,) int64;
    prior (K,) in A, None for uniform; scalars (4,) float64 on the CPU
    or the logits' device: λ, λ_u, ρ, ν.
    """
    n, K = logits.shape
    checks.count(num_labeled, n, "num_labeled")
    checks.entries(permutation, n, "mix permutation")
    check(logits, targets, ratio, permutation, prior, ignore_index)
    dtype = accumulate_dtype(logits)
    lam, unlabeled_weight, prior_weight, confidence_weight = numbers(scalars)

    t, valid = _rows(logits, targets, ratio, permutation, lam, clamp, ignore_index)
    z = logits.to(dtype)
    top = z.amax(1, keepdim=True)
    normalizer = torch.cat([top, (z - top).exp().sum(1, keepdim=True).log()], 1)
    log_p = _log_softmax(logits, normalizer)
    p = log_p.exp()

    # 0·log 0 = 0: a class masked by a logit of −∞ costs nothing where its target is 0
    cross_entropy = -torch.where(t == 0, 0, t * log_p).sum(1)
    squared_error = (p - t).square().sum(1) / K
    labeled_rows = torch.arange(n, device=z.device) < num_labeled
    per_sample = torch.where(valid, torch.where(labeled_rows, cross_entropy, squared_error), 0)

    counts = torch.stack([valid[:num_labeled].sum(), valid[num_labeled:].sum()])
    parts = _row_weights(valid, counts, num_labeled, mean, dtype) * per_sample
    parts = torch.where(valid, parts, 0)
    labeled, unlabeled = parts[:num_labeled].sum(), parts[num_labeled:].sum()
    p_mean = p.sum(0) / max(n, 1)
    pi = torch.full_like(p_mean, 1 / K) if prior is None else prior
    log_mean = log_p.logsumexp(0) - math.log(max(n, 1))
    rare = p_mean < torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    log_ratio = torch.where(rare, pi.log() - log_mean, torch.log(pi / p_mean))
    penalty = torch.where(pi == 0, 0, pi * log_ratio).sum()
    p_mean = torch.where(rare, log_mean, p_mean)
    if n == 0:
        penalty = torch.zeros_like(penalty)
    confidence = torch.where(p == 0, 0, p * log_p).sum() / max(n, 1)
    total = (
        labeled
        + _weighted(unlabeled_weight, unlabeled)
        + _weighted(prior_weight, penalty)
        + _weighted(confidence_weight, confidence)
    )
    return total, labeled, unlabeled, penalty, confidence, per_sample, normalizer, p_mean, counts


def backward(
    grad_total: Tensor | None,
    grad_labeled: Tensor | None,
    grad_unlabeled: Tensor | None,
    grad_prior: Tensor | None,
    grad_confidence: Tensor | None,
    grad_per_sample: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    ratio: Tensor | None,
    permutation: Tensor | None,
    prior: Tensor | None,
    scalars: Tensor,
    normalizer: Tensor,
    p_mean: Tensor,
    counts: Tensor,
    num_labeled: int,
    clamp: bool,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """dL/dlogits (n, K) in their dtype, for the upstream gradients of forward's first six outputs.

    With c_i the weight of row i's own loss, and h_ik = dL/dp_ik of everything but cross-entropy,
        dL/dz_ik = p_ik (h_ik − Σ_j p_ij h_ij) + [i labelled] c_i (p_ik Σ_j t_ij − t_ik),
        h_ik = [i unlabelled] c_i (2/K)(p_ik − t_ik) − (dL/dP) π_k / (n p̄_k) + (dL/dN) log p_ik / n.
    Where p̄_k is given by its logarithm, the prior's part of p_ik h_ik is from log p_ik − log p̄_k.
    """
    n, K = logits.shape
    dtype = normalizer.dtype
    lam, unlabeled_weight, prior_weight, confidence_weight = numbers(scalars)
    zero = torch.zeros((), dtype=dtype, device=logits.device)

    def upstream(part: Tensor | None, weight: float | Tensor) -> Tensor:
        grad = zero if part is None else part
        return grad if grad_total is None else grad + _weighted(weight, grad_total)

    t, valid = _rows(logits, targets, ratio, permutation, lam, clamp, ignore_index)
    log_p = _log_softmax(logits, normalizer)
    p = log_p.exp()
    labeled_rows = torch.arange(n, device=p.device) < num_labeled
    c = _row_weights(valid, counts, num_labeled, mean, dtype) * torch.where(
        labeled_rows, upstream(grad_labeled, 1.0), upstream(grad_unlabeled, unlabeled_weight)
    )
    if grad_per_sample is not None:
        c = c + torch.where(valid, grad_per_sample, 0)
    c, labeled_rows = c[:, None], labeled_rows[:, None]

    pi = torch.full_like(p_mean, 1 / K) if prior is None else prior
    prior_slope = upstream(grad_prior, prior_weight)
    slope = torch.where(p_mean < 0, 0, -pi / (p_mean * max(n, 1)))
    h = _weighted(prior_slope, slope)  # a NaN in p̄ stays out if it can
    h = h + torch.where(p == 0, 0, upstream(grad_confidence, confidence_weight) / max(n, 1) * log_p)
    h = h + torch.where(labeled_rows, 0, c * (2 / K) * (p - t))
    # a class of no probability, of which log p̄ is −∞, gets no gradient: its p cannot move
    share = (log_p - p_mean.clamp(min=torch.finfo(dtype).min)).exp() * (-pi / max(n, 1))
    ph = p * h + _weighted(prior_slope, torch.where(p_mean < 0, share, 0))
    grad = ph - p * ph.sum(1, keepdim=True)
    grad = grad + torch.where(labeled_rows, c * (p * t.sum(1, keepdim=True) - t), 0)
    return grad.to(logits.dtype).contiguous()
