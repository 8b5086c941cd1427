"""masked_loss (section 5): cross-entropy and squared error of rows against targets modulated and
mixed on the fly, prior and confidence penalty; and the gradient with respect to the logits.

Forward is two launches. In the first a program loops over tiles of rows and sweeps three times over
their classes: for the maximum, for Σ e^(z − max), and for the losses and p, which it adds to its
own column sums. In the second a program reduces the column sums of a block of classes in order, to
p̄ and its part of the prior's penalty; the last program to finish adds those parts in order and
writes the total. Backward is one launch, since p̄ and the rows' maxima and log-sums are known: with
c_i the weight of row i's own loss and h_ik = dL/dp_ik of all terms except cross-entropy,
    dL/dz_ik = p_ik (h_ik − Σ_j p_ij h_ij) + [i labelled] c_i (p_ik Σ_j t_ij − t_ik),
    h_ik = [i unlabelled] c_i (2/K)(p_ik − t_ik) − (dL/dP) π_k / (n p̄_k) + (dL/dN) log p_ik / n.

For a class whose p̄ is so small that some p underflow to 0, log p̄ (< 0) is computed from log p and
stored instead of p̄, and p_ik/p̄_k is e^(log p_ik − log p̄_k); the other terms of its gradient are
negligible.

λ, λ_u and the other scheduled numbers are run-time arguments: a schedule does not recompile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric, target_rows
from sanm_kernels.backends.triton.launch import (
    configuration,
    implements,
    launch,
    row_tile,
    run_time,
    triton_dtype,
)
from sanm_kernels.ops.masked_loss import empty_outputs
from sanm_kernels.reference import checks

#: Most programs of the forward kernel (each writes column sums) and of the backward kernel.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 128, 1056
#: Tile of the finishing kernel: classes, and programs whose column sums it adds.
FINISH_CLASSES, FINISH_PARTS = 64, 32

_SIZES = ["n", "K", "M", "num_labeled", "ignore_index", "each", "s_1", "s_2", "t_0", "t_1"]


@triton.jit(do_not_specialize=_SIZES)
def masked_loss_kernel(
    logits,  # (n, K)
    targets,  # (M, K) floats as (s_0, s_1, s_2, K), or (M,) int64
    ratio,  # (M,) in ACC or None
    permutation,  # (≥ n,) int64 or None
    per_sample,  # (n,) in ACC, written
    normalizer,  # (n, 2) in ACC, written: maximum, log-sum
    columns,  # (programs, K) in ACC, written: Σ p over the program's rows
    sums,  # (5, programs) float64, written: Σ of labelled and unlabelled losses, rows, Σ p·log p
    arrived,  # () int32, written: 0, for the finishing programs
    n, K, M, num_labeled, ignore_index, each, z_b, z_k, s_1, s_2, t_0, t_1, t_2, t_k,
    numbers,  # (4,) float64: λ, λ_u, ρ, ν; or None: then λ is `lam`
    lam: tl.float64, SOFT: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: `each` rows from i·each on."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    share = numeric.number(numbers, 0, lam)
    if part == 0:
        tl.store(arrived, 0)
    begin = part * each
    last = tl.minimum(begin + each, n)
    labeled = tl.zeros((), tl.float64)
    unlabeled = tl.zeros((), tl.float64)
    labeled_count = tl.zeros((), tl.float64)
    unlabeled_count = tl.zeros((), tl.float64)
    confidence = tl.zeros((), tl.float64)
    for start in range(begin, last, ROWS):
        b, exists, valid, poison, own_rows, own, other_rows, other = target_rows.tile(
            targets, ratio, permutation, start, last, K, M, ignore_index, s_1, s_2, t_0, t_1, t_2,
            t_k, SOFT, CLAMP, ROWS, CLASSES, ACC,
        )  # fmt: skip
        top, total = numeric.softmax_normalizer(logits, b, exists, K, z_b, z_k, ROWS, CLASSES, ACC)
        log_sum = numeric.log(total).to(ACC)
        scale = 1.0 / total
        tl.store(normalizer + 2 * b, top, mask=exists)
        tl.store(normalizer + 2 * b + 1, log_sum, mask=exists)
        is_labeled = b < num_labeled
        loss = tl.zeros((ROWS,), tl.float64)
        entropy = tl.zeros((ROWS,), tl.float64)
        for first in range(0, K, CLASSES):
            k = first + tl.arange(0, CLASSES)[None, :]
            inside = exists[:, None] & (k < K)
            offsets = b[:, None] * z_b + k.to(tl.int64) * z_k
            z = tl.load(logits + offsets, mask=inside, other=0.0).to(ACC)
            centred = z - top[:, None]
            log_p = centred - log_sum[:, None]
            p = tl.exp(centred) * scale[:, None]
            t = target_rows.mixed(
                own_rows, own, other_rows, other, exists, k, K, t_k, share, ratio is not None,
                permutation is not None, SOFT, ACC,
            )  # fmt: skip
            cross = tl.where(t == 0, 0.0, -t * log_p)  # 0·log 0 = 0
            term = tl.where(is_labeled[:, None], cross, (p - t) * (p - t))
            loss += tl.sum(tl.where(inside, term, 0.0), 1).to(tl.float64)
            entropy += tl.sum(tl.where(inside & (p != 0), p * log_p, 0.0), 1).to(tl.float64)
            column = tl.sum(tl.where(inside, p, 0.0), 0)
            j = first + tl.arange(0, CLASSES)
            tl.debug_barrier()  # the previous tile's column sums are written
            known = tl.where(start > begin, K, 0)
            column += tl.load(columns + part.to(tl.int64) * K + j, mask=j < known, other=0.0)
            tl.debug_barrier()
            tl.store(columns + part.to(tl.int64) * K + j, column, mask=j < K)
        loss = tl.where(is_labeled, loss, loss / K.to(tl.float64)) + poison.to(tl.float64)
        loss = tl.where(valid, loss, 0.0)
        tl.store(per_sample + b, loss.to(ACC), mask=exists)
        labeled += tl.sum(tl.where(is_labeled, loss, 0.0), 0)
        unlabeled += tl.sum(tl.where(is_labeled, 0.0, loss), 0)
        labeled_count += tl.sum(tl.where(valid & is_labeled, 1.0, 0.0).to(tl.float64), 0)
        unlabeled_count += tl.sum(tl.where(valid & (b >= num_labeled), 1.0, 0.0).to(tl.float64), 0)
        confidence += tl.sum(entropy, 0)
    tl.store(sums + part, labeled)
    tl.store(sums + parts + part, unlabeled)
    tl.store(sums + 2 * parts + part, labeled_count)
    tl.store(sums + 3 * parts + part, unlabeled_count)
    tl.store(sums + 4 * parts + part, confidence)


@triton.jit
def _weighted(weight, term):
    """weight·term, and 0 for weight 0 even where the term is infinite."""
    return tl.where(weight == 0, 0.0, weight * term)


@triton.jit
def _prior(prior, k, K, ACC: tl.constexpr):
    """π of classes k: given, or 1/K."""
    if prior is None:
        return numeric.divide(tl.full(k.shape, 1.0, ACC), tl.zeros(k.shape, ACC) + K.to(ACC))
    else:
        return tl.load(prior + k, mask=k < K, other=0.0)


@triton.jit
def _log_mean(
    logits,  # (n, K)
    normalizer,  # (n, 2) in ACC
    k,  # (CLASSES,)
    n, K, z_b, z_k, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """log p̄ of classes k, from log p, in float64."""
    top = tl.full((CLASSES,), -float("inf"), tl.float64)
    total = tl.zeros((CLASSES,), tl.float64)
    for sweep in tl.static_range(2):
        highest = tl.full((ROWS, CLASSES), -float("inf"), tl.float64)
        power = tl.zeros((ROWS, CLASSES), tl.float64)
        for first in range(0, n, ROWS):
            i = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            inside = (i < n) & (k < K)[None, :]
            z = tl.load(logits + i * z_b + k[None, :].to(tl.int64) * z_k, mask=inside, other=0.0)
            log_p = z.to(tl.float64) - tl.load(normalizer + 2 * i, mask=i < n, other=0.0)
            log_p -= tl.load(normalizer + 2 * i + 1, mask=i < n, other=0.0)
            log_p = tl.where(inside, log_p, -float("inf"))
            if sweep == 0:
                highest = tl.maximum(highest, log_p)
            else:
                power += tl.exp(log_p - top[None, :])
        if sweep == 0:
            top = tl.max(highest, 0)
            top = tl.where(top == -float("inf"), 0.0, top)  # −∞ − (−∞) would be NaN
        else:
            total = tl.sum(power, 0)
    return top + tl.log(total / n.to(tl.float64))


@triton.jit(do_not_specialize=["n", "K", "parts"])
def masked_loss_finish_kernel(
    logits,  # (n, K)
    normalizer,  # (n, 2) in ACC
    columns,  # (parts, K) in ACC
    sums,  # (5, parts) float64
    prior,  # (K,) in ACC or None
    penalties,  # workspace (programs,) float64
    arrived,  # () int32, 0: counts the programs that have finished
    results,  # five () in ACC, written: total, labelled, unlabelled, prior's penalty, confidence
    p_mean,  # (K,) in ACC, written
    counts,  # (2,) int64, written: labelled and unlabelled rows that count
    numbers,  # (4,) float64 as above, or None
    n, K, parts, z_b, z_k, unlabeled_weight: tl.float64, prior_weight: tl.float64,
    confidence_weight: tl.float64,
    MEAN: tl.constexpr, PARTS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: p̄ of a block of classes; the last one to finish: the losses."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = program * CLASSES + tl.arange(0, CLASSES)
    column = tl.zeros((PARTS, CLASSES), tl.float64)
    for first in range(0, parts, PARTS):
        i = first + tl.arange(0, PARTS)[:, None]
        inside = (i < parts) & (k < K)[None, :]
        value = tl.load(columns + i.to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
        column += value.to(tl.float64)
    mean = tl.sum(column, 0) / tl.maximum(n, 1).to(tl.float64)
    # below tiny / eps of the dtype, a p that contributes to the mean may have underflowed to 0
    least = 1.00208418e-292 if tl.float64 == ACC else 9.8607613e-32
    rare = (mean < least) & (k < K)
    log_mean = numeric.log(mean)
    if (tl.sum(rare.to(tl.int32), 0) > 0) & (n > 0):
        # smaller tiles: in float64, larger ones would spill registers
        exact = _log_mean(logits, normalizer, k, n, K, z_b, z_k, PARTS // 4, CLASSES)
        log_mean = tl.where(rare, exact, log_mean)
        mean = tl.where(rare, exact, mean)
    tl.store(p_mean + k, mean.to(ACC), mask=k < K)
    pi = _prior(prior, k, K, ACC).to(tl.float64)
    term = pi * (numeric.log(pi) - log_mean)
    term = tl.where((k < K) & (pi != 0), term, 0.0)
    tl.store(penalties + program, tl.where(n == 0, 0.0, tl.sum(term, 0)))
    tl.debug_barrier()  # all threads have stored before this program counts as finished
    if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
        labeled = numeric.total(sums, parts, PARTS)
        unlabeled = numeric.total(sums + parts, parts, PARTS)
        labeled_count = numeric.total(sums + 2 * parts, parts, PARTS)
        unlabeled_count = numeric.total(sums + 3 * parts, parts, PARTS)
        tl.store(counts, labeled_count.to(tl.int64))
        tl.store(counts + 1, unlabeled_count.to(tl.int64))
        if MEAN:
            labeled /= tl.maximum(labeled_count, 1.0)
            unlabeled /= tl.maximum(unlabeled_count, 1.0)
        confidence = numeric.total(sums + 4 * parts, parts, PARTS) / tl.maximum(n, 1).to(tl.float64)
        penalty = numeric.total(penalties, programs, PARTS)
        total = labeled + _weighted(numeric.number(numbers, 1, unlabeled_weight), unlabeled)
        total += _weighted(numeric.number(numbers, 2, prior_weight), penalty)
        total += _weighted(numeric.number(numbers, 3, confidence_weight), confidence)
        tl.store(results[0], total.to(ACC))
        tl.store(results[1], labeled.to(ACC))
        tl.store(results[2], unlabeled.to(ACC))
        tl.store(results[3], penalty.to(ACC))
        tl.store(results[4], confidence.to(ACC))


@triton.jit
def _upstream(grad_total, grad, weight, ACC: tl.constexpr):
    """The upstream gradient of one part of the loss: its own, plus the total's times its weight."""
    value = tl.zeros((), ACC)
    if grad is not None:
        value += tl.load(grad)
    if grad_total is not None:
        value += _weighted(weight.to(ACC), tl.load(grad_total))
    return value


@triton.jit(do_not_specialize=_SIZES)
def masked_loss_backward_kernel(
    grad_total, grad_labeled, grad_unlabeled, grad_prior, grad_confidence,  # () in ACC or None
    grad_per_sample,  # (n,) in ACC or None
    logits,  # (n, K)
    targets,  # (M, K) floats as (s_0, s_1, s_2, K), or (M,) int64
    ratio,  # (M,) in ACC or None
    permutation,  # (≥ n,) int64 or None
    prior,  # (K,) in ACC or None
    normalizer,  # (n, 2) in ACC
    p_mean,  # (K,) in ACC
    counts,  # (2,) int64: labelled and unlabelled rows that count
    result,  # (n, K), written
    n, K, M, num_labeled, ignore_index, each, g_b, z_b, z_k, s_1, s_2, t_0, t_1, t_2, t_k,
    numbers,  # (4,) float64 as above, or None
    lam: tl.float64, unlabeled_weight: tl.float64, prior_weight: tl.float64,
    confidence_weight: tl.float64, MEAN: tl.constexpr, SOFT: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: `each` rows from i·each on."""
    share = numeric.number(numbers, 0, lam)
    labeled_slope = _upstream(grad_total, grad_labeled, numeric.scalar(1.0, tl.float64), ACC)
    unlabeled_weight = numeric.number(numbers, 1, unlabeled_weight)
    unlabeled_slope = _upstream(grad_total, grad_unlabeled, unlabeled_weight, ACC)
    rows = tl.maximum(n, 1).to(ACC)
    prior_weight = numeric.number(numbers, 2, prior_weight)
    prior_slope = _upstream(grad_total, grad_prior, prior_weight, ACC)
    confidence_weight = numeric.number(numbers, 3, confidence_weight)
    entropy_slope = numeric.divide(
        _upstream(grad_total, grad_confidence, confidence_weight, ACC), rows
    )
    if MEAN:
        labeled_slope = numeric.divide(labeled_slope, tl.maximum(tl.load(counts), 1).to(ACC))
        unlabeled_slope = numeric.divide(
            unlabeled_slope, tl.maximum(tl.load(counts + 1), 1).to(ACC)
        )
    begin = tl.program_id(0) * each
    last = tl.minimum(begin + each, n)
    for start in range(begin, last, ROWS):
        b, exists, valid, poison, own_rows, own, other_rows, other = target_rows.tile(
            targets, ratio, permutation, start, last, K, M, ignore_index, s_1, s_2, t_0, t_1, t_2,
            t_k, SOFT, CLAMP, ROWS, CLASSES, ACC,
        )  # fmt: skip
        is_labeled = b < num_labeled
        c = tl.where(is_labeled, labeled_slope, unlabeled_slope) + poison
        if grad_per_sample is not None:
            c += tl.load(grad_per_sample + b * g_b, mask=exists, other=0.0)
        c = tl.where(valid, c, 0.0)
        cross = tl.where(is_labeled, c, 0.0)[:, None]
        square = tl.where(is_labeled, 0.0, c * (2.0 / K.to(ACC)))[:, None]
        top = tl.load(normalizer + 2 * b, mask=exists, other=0.0)[:, None]
        log_sum = tl.load(normalizer + 2 * b + 1, mask=exists, other=0.0)[:, None]
        inner = tl.zeros((ROWS,), tl.float64)
        mass = tl.zeros((ROWS,), tl.float64)
        for sweep in tl.static_range(2):
            for first in range(0, K, CLASSES):
                k = first + tl.arange(0, CLASSES)[None, :]
                inside = exists[:, None] & (k < K)
                offsets = b[:, None] * z_b + k.to(tl.int64) * z_k
                z = tl.load(logits + offsets, mask=inside, other=0.0).to(ACC)
                mean = tl.load(p_mean + k, mask=k < K, other=1.0)
                slope = numeric.divide(-_prior(prior, k, K, ACC), mean * 0 + rows)
                # a class of probability 0 gets no gradient: its p can't change
                rare = (mean < 0) & (mean > -float("inf")) & (prior_slope * slope != 0)
                slope = tl.where(mean < 0, tl.where(rare, slope, 0.0), slope / mean)
                # with weight 0 a NaN in p̄, from one row, does not spread to the other rows
                from_prior = _weighted(prior_slope, slope)
                log_p = z - top - log_sum
                p = tl.where(inside, tl.exp(log_p - tl.where(rare, mean, 0.0)), 0.0)
                t = target_rows.mixed(
                    own_rows, own, other_rows, other, exists, k, K, t_k, share, ratio is not None,
                    permutation is not None, SOFT, ACC,
                )  # fmt: skip
                h = from_prior + tl.where(p == 0, 0.0, entropy_slope * log_p)
                h += tl.where(is_labeled[:, None], 0.0, square * (p - t))
                h = tl.where(rare, from_prior, h)
                if sweep == 0:
                    inner += tl.sum(p * h, 1).to(tl.float64)
                    mass += tl.sum(t, 1).to(tl.float64)
                else:
                    free = tl.where(rare, 0.0, p)
                    grad = p * h - free * inner.to(ACC)[:, None]
                    cross_entropy = cross * (free * mass.to(ACC)[:, None] - t)
                    grad += tl.where(is_labeled[:, None], cross_entropy, 0.0)
                    out = result + b[:, None] * K + k
                    tl.store(out, numeric.cast(grad, result.dtype.element_ty), mask=inside)


def _rows_each(rows: int, tile_rows: int, most: int) -> tuple[int, int]:
    """The number of programs for `rows` rows, and of rows per program: whole tiles."""
    tiles = -(-rows // tile_rows)
    each = -(-tiles // most) if tiles else 1
    return -(-tiles // each), each * tile_rows


def _strides(logits: Tensor, targets: Tensor) -> tuple[int, ...]:
    """z_b, z_k, s_1, s_2, t_0, t_1, t_2, t_k: targets have one to three leading dimensions."""
    if not targets.is_floating_point():
        return (*logits.stride(), 1, max(len(targets), 1), 0, 0, targets.stride(0), 1)
    missing = 4 - targets.dim()
    _, s_1, s_2 = [1] * missing + [max(s, 1) for s in targets.shape[:-1]]
    return (*logits.stride(), s_1, s_2, *[0] * missing, *targets.stride())


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@implements("masked_loss")
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
    """Arguments and results as in `reference/masked_loss.py`."""
    n, K = logits.shape
    checks.count(num_labeled, n, "num_labeled")
    checks.entries(permutation, n, "mix permutation")
    numbers, values = run_time(scalars)
    soft = targets.is_floating_point()
    M = targets.shape[:-1].numel() if soft else len(targets)
    outputs = empty_outputs(logits)
    *results, per_sample, normalizer, p_mean, counts = outputs
    blocks = -(-K // FINISH_CLASSES)
    penalties = logits.new_empty(blocks, dtype=torch.float64)
    arrived = logits.new_empty((), dtype=torch.int32)
    acc = triton_dtype(p_mean.dtype)

    config = configuration("masked_loss", K)
    tile = row_tile(config, n, K)
    programs, each = _rows_each(n, tile["ROWS"], FORWARD_PROGRAMS)
    # without rows one program still runs, to write zeros; it has no column sums
    columns = torch.empty(programs, K, dtype=p_mean.dtype, device=logits.device)
    sums = torch.empty(5, max(programs, 1), dtype=torch.float64, device=logits.device)
    launch(
        masked_loss_kernel, (max(programs, 1),), logits, targets, _dense(ratio),
        _dense(permutation), per_sample, normalizer, columns, sums, arrived, n, K, M,
        num_labeled, ignore_index, each, *_strides(logits, targets), numbers, values[0],
        SOFT=soft, CLAMP=clamp, ACC=acc, **tile,
    )  # fmt: skip
    launch(
        masked_loss_finish_kernel, (blocks,), logits, normalizer, columns, sums, _dense(prior),
        penalties, arrived, tuple(results), p_mean, counts, numbers, n, K, programs,
        *logits.stride(), *values[1:], MEAN=mean, PARTS=FINISH_PARTS, CLASSES=FINISH_CLASSES,
        ACC=acc, num_warps=4,
    )  # fmt: skip
    return outputs


@implements("masked_loss_backward")
def backward(
    grad_total: Tensor | None, grad_labeled: Tensor | None, grad_unlabeled: Tensor | None,
    grad_prior: Tensor | None, grad_confidence: Tensor | None, grad_per_sample: Tensor | None,
    logits: Tensor, targets: Tensor, ratio: Tensor | None, permutation: Tensor | None,
    prior: Tensor | None, scalars: Tensor, normalizer: Tensor, p_mean: Tensor, counts: Tensor,
    num_labeled: int, clamp: bool, ignore_index: int, mean: bool,
) -> Tensor:  # fmt: skip
    """Arguments and result as in `reference/masked_loss.py`."""
    n, K = logits.shape
    numbers, values = run_time(scalars)
    soft = targets.is_floating_point()
    M = targets.shape[:-1].numel() if soft else len(targets)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)

    config = configuration("masked_loss", K)
    tile = row_tile(config, n, K)
    programs, each = _rows_each(n, tile["ROWS"], BACKWARD_PROGRAMS)
    launch(
        masked_loss_backward_kernel, (programs,), grad_total, grad_labeled, grad_unlabeled,
        grad_prior, grad_confidence, grad_per_sample, logits, targets,
        _dense(ratio), _dense(permutation), _dense(prior), normalizer.contiguous(),
        p_mean.contiguous(), counts.contiguous(), result, n, K, M, num_labeled, ignore_index,
        each, 0 if grad_per_sample is None else grad_per_sample.stride(0),
        *_strides(logits, targets), numbers, *values, MEAN=mean, SOFT=soft, CLAMP=clamp,
        ACC=triton_dtype(p_mean.dtype), **tile,
    )  # fmt: skip
    return result
