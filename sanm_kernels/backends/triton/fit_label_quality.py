"""fit_label_quality (section 6): k-means start, EM, posterior; float64.

A program processes a block of samples and writes a few sums over it. The last program to finish
adds the sums of all blocks, in order, and takes the next decision on the device: there is no host
synchronisation, and the result does not depend on which program is last. The launches, in all
max_iter + 5 and torch's sort:

1. (if normalising) each epoch's minimum and span;
2. x, the mean over the epochs, and Σ(x − c0)² about the first centre c0; the last program draws two
   candidates for the second centre: it finds the block, then the sample, where the cumulative sum
   of (x − c0)² reaches u·total;
3. the candidates' potentials; the last program chooses one and runs Lloyd's iterations. In sorted x
   the samples of the lower centre come first: their number is found by a search that narrows the
   range by a factor BLOCK per step, their sum is Σ over whole blocks + Σ within one;
4. the M-step on the final split, from moments about the centres: prefix sums would cancel;
5. max_iter EM steps, no-ops once converged;
6. the posterior, and whether the fit is degenerate.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric
from sanm_kernels.backends.triton.launch import implements, launch, triton_dtype
from sanm_kernels.reference import fit_label_quality as reference
from sanm_kernels.reference.precision import accumulate_dtype

CONFIG = {"BLOCK": 1024, "num_warps": 8}  # BLOCK: samples of a program
_SIZES = ["n", "parts", "epoch_count", "first"]

_LLOYD_ITERATIONS = tl.constexpr(reference.LLOYD_ITERATIONS)
_LLOYD_TOLERANCE = tl.constexpr(reference.LLOYD_TOLERANCE)
_MASS_OFFSET = tl.constexpr(reference.MASS_OFFSET)
_MIN_MASS = tl.constexpr(reference.MIN_MASS)
_MIN_DEVIATION = tl.constexpr(reference.MIN_DEVIATION)
_TWO_PI = tl.constexpr(2 * math.pi)
_LARGEST = tl.constexpr(torch.finfo(torch.float64).max)

# Offsets in the state, float64: the first three are pairs, one number per component.
_MEANS = tl.constexpr(0)  # the k-means centres before the first M-step
_VARIANCES = tl.constexpr(2)
_WEIGHTS = tl.constexpr(4)
_BOUND = tl.constexpr(6)  # mean log-likelihood of the previous step
_STEPS = tl.constexpr(7)
_CONVERGED = tl.constexpr(8)  # 0 or 1
_MEAN = tl.constexpr(9)  # of all samples, as the next three
_VARIANCE = tl.constexpr(10)
_LOW = tl.constexpr(11)
_HIGH = tl.constexpr(12)
_FIRST = tl.constexpr(13)  # first centre, then two candidates for the second
_STATE_SIZE = 16


@triton.jit
def _last_through(arrived, programs):
    """Whether all other programs have written their sums; if so, resets `arrived`."""
    tl.debug_barrier()  # all threads have stored before this program counts as finished
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit(do_not_specialize=_SIZES)
def range_kernel(
    epochs,  # (epoch_count, n) of any float dtype
    partial,  # workspace (2, epoch_count, parts) float64
    arrived,  # () int32, 0
    ranges,  # (epoch_count, 2) float64, written: minimum, span (1 for a span of 0)
    n, parts, epoch_count, x_e, x_n, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, e): block i of epoch e."""
    part, e = tl.program_id(0), tl.program_id(1)
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = epochs + e.to(tl.int64) * x_e + i * x_n
    low = tl.load(at, mask=i < n, other=float("inf")).to(tl.float64)
    high = tl.load(at, mask=i < n, other=-float("inf")).to(tl.float64)
    tl.store(partial + e * parts + part, tl.min(low, 0))
    tl.store(partial + (epoch_count + e) * parts + part, tl.max(high, 0))
    if _last_through(arrived, parts * epoch_count):
        for epoch in range(0, epoch_count):
            low = tl.full((BLOCK,), float("inf"), tl.float64)
            high = tl.full((BLOCK,), -float("inf"), tl.float64)
            for start in range(0, parts, BLOCK):
                p = start + tl.arange(0, BLOCK)
                lows = partial + epoch * parts + p
                low = tl.minimum(low, tl.load(lows, mask=p < parts, other=float("inf")))
                highs = lows + epoch_count * parts
                high = tl.maximum(high, tl.load(highs, mask=p < parts, other=-float("inf")))
            bottom = tl.min(low, 0)
            span = tl.max(high, 0) - bottom
            tl.store(ranges + 2 * epoch, bottom)
            tl.store(ranges + 2 * epoch + 1, tl.where(span == 0, 1.0, span))


@triton.jit
def _average(epochs, ranges, epoch_count, x_e, x_n, i, inside):
    """Mean over the epochs of samples i, each epoch normalised if `ranges` are given."""
    total = i.to(tl.float64) * 0.0
    at = epochs + i * x_n
    for e in range(0, epoch_count):
        x = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        if ranges is not None:
            x = (x - tl.load(ranges + 2 * e)) / tl.load(ranges + 2 * e + 1)
        total += x
        at += x_e
    return total / epoch_count.to(tl.float64)


@triton.jit
def _draw(x, squares, n, parts, centre, uniform, total, BLOCK: tl.constexpr):
    """The sample at which the cumulative sum of (x − centre)² reaches uniform·total."""
    target = uniform * total
    block = tl.zeros((), tl.int32)
    carry = tl.zeros((), tl.float64)
    for start in range(0, parts, BLOCK):
        p = start + tl.arange(0, BLOCK)
        sums = tl.load(squares + p, mask=p < parts, other=0.0)
        before = (carry + tl.cumsum(sums, 0) < target) & (p < parts)
        block += tl.sum(before.to(tl.int32), 0)
        carry += tl.sum(sums, 0)
    block = tl.minimum(block, parts - 1)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.where(i < n, tl.load(x + i, mask=i < n, other=0.0) - centre, 0.0)
    reached = numeric.total(squares, block, BLOCK) + tl.cumsum(d * d, 0)
    before = (reached < target) & (i < n)
    index = block.to(tl.int64) * BLOCK + tl.sum(before.to(tl.int32), 0)
    return tl.load(x + tl.minimum(index, n - 1))


@triton.jit(do_not_specialize=_SIZES)
def average_kernel(
    epochs,  # (epoch_count, n) of any float dtype
    ranges,  # (epoch_count, 2) float64 or None
    x,  # (n,) float64, written
    partial,  # (7, parts) float64, written: Σ x, Σ (x − c0)²
    arrived,  # () int32, 0
    state,  # (_STATE_SIZE,) float64, written: mean, first centre and candidates
    n, parts, epoch_count, x_e, x_n, first, uniform1: tl.float64, uniform2: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: block i; sample `first` is the first centre c0."""
    part = tl.program_id(0)
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = _average(epochs, ranges, epoch_count, x_e, x_n, i, i < n)
    at = numeric.scalar(first, tl.int64)
    centre = _average(epochs, ranges, epoch_count, x_e, x_n, at, at < n)
    tl.store(x + i, value, mask=i < n)
    d = value - centre
    tl.store(partial + part, tl.sum(tl.where(i < n, value, 0.0), 0))
    tl.store(partial + parts + part, tl.sum(tl.where(i < n, d * d, 0.0), 0))
    if _last_through(arrived, parts):
        squares = partial + parts
        total = numeric.total(squares, parts, BLOCK)
        tl.store(state + _MEAN, numeric.total(partial, parts, BLOCK) / n.to(tl.float64))
        tl.store(state + _FIRST, centre)
        u = numeric.scalar(uniform1, tl.float64)
        tl.store(state + _FIRST + 1, _draw(x, squares, n, parts, centre, u, total, BLOCK))
        u = numeric.scalar(uniform2, tl.float64)
        tl.store(state + _FIRST + 2, _draw(x, squares, n, parts, centre, u, total, BLOCK))


@triton.jit
def _split(ordered, n, low, high, low_wins, BLOCK: tl.constexpr):
    """How many of the ordered samples are nearer to `low` than to `high`; ties as `low_wins`."""
    begin = tl.zeros((), tl.int64)  # all samples before it are nearer to `low`
    end = begin + n  # none from it on is
    while begin < end:
        step = (end - begin + BLOCK - 1) // BLOCK
        i = begin + (tl.arange(0, BLOCK) + 1) * step - 1
        x = tl.load(ordered + i, mask=i < end, other=float("inf"))
        a, b = (x - low) * (x - low), (x - high) * (x - high)
        nearer = tl.where(low_wins, a <= b, a < b) & (i < end)
        begin += tl.sum(nearer.to(tl.int32), 0) * step
        end = tl.minimum(end, begin + step - 1)
    return begin


@triton.jit
def _leading(ordered, sums, count, centre, BLOCK: tl.constexpr):
    """Σ (x − centre) of the first `count` ordered samples; `sums` are those of whole blocks."""
    block = count // BLOCK
    i = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(ordered + i, mask=i < count, other=0.0) - centre
    return numeric.total(sums, block.to(tl.int32), BLOCK) + tl.sum(tl.where(i < count, d, 0.0), 0)


@triton.jit(do_not_specialize=_SIZES)
def start_kernel(
    x,  # (n,) float64
    ordered,  # (n,) float64, the same in ascending order
    partial,  # workspace (7, parts) float64: two potentials, Σ (x − mean)², Σ (ordered − c0)
    arrived,  # () int32, 0
    state,  # (_STATE_SIZE,) float64, read and written
    n, parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: block i; the last one to finish: the k-means centres."""
    part = tl.program_id(0)
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(state + _FIRST)
    one, other = tl.load(state + _FIRST + 1), tl.load(state + _FIRST + 2)
    v = tl.load(x + i, mask=i < n, other=0.0)
    d = v - tl.load(state + _MEAN)
    s = tl.load(ordered + i, mask=i < n, other=0.0) - first
    square = (v - first) * (v - first)
    to_one = tl.minimum((v - one) * (v - one), square)
    to_other = tl.minimum((v - other) * (v - other), square)
    tl.store(partial + part, tl.sum(tl.where(i < n, to_one, 0.0), 0))
    tl.store(partial + parts + part, tl.sum(tl.where(i < n, to_other, 0.0), 0))
    tl.store(partial + 2 * parts + part, tl.sum(tl.where(i < n, d * d, 0.0), 0))
    tl.store(partial + 3 * parts + part, tl.sum(tl.where(i < n, s, 0.0), 0))
    if _last_through(arrived, parts):
        samples = n.to(tl.float64)
        variance = numeric.total(partial + 2 * parts, parts, BLOCK) / samples
        tl.store(state + _VARIANCE, variance)
        tl.store(state + _LOW, tl.load(ordered))
        tl.store(state + _HIGH, tl.load(ordered + (n - 1)))
        better = numeric.total(partial + parts, parts, BLOCK) < numeric.total(partial, parts, BLOCK)
        second = tl.where(better, other, one)
        low_wins = first <= second  # ties go to the first centre
        low, high = tl.minimum(first, second), tl.maximum(first, second)
        sums = partial + 3 * parts
        whole = numeric.total(sums, parts, BLOCK)
        left = tl.full((), _LLOYD_ITERATIONS, tl.int32)
        while left > 0:
            count = _split(ordered, n, low, high, low_wins, BLOCK)
            below = _leading(ordered, sums, count, first, BLOCK)
            m, r = count.to(tl.float64), (n - count).to(tl.float64)
            down = (below + m * (first - low)) / tl.maximum(m, 1.0)
            up = (whole - below + r * (first - high)) / tl.maximum(r, 1.0)
            # a centre without samples becomes NaN: the fit is degenerate
            down = tl.where(m > 0, down, float("nan"))
            up = tl.where(r > 0, up, float("nan"))
            low += down
            high += up
            moved = down * down + up * up > variance * _LLOYD_TOLERANCE
            left = tl.where(moved, left - 1, 0)
        tl.store(state + _MEANS, tl.where(low_wins, low, high))
        tl.store(state + _MEANS + 1, tl.where(low_wins, high, low))
        tl.store(state + _BOUND, -float("inf"))
        tl.store(state + _STEPS, 0.0)
        tl.store(state + _CONVERGED, 0.0)


@triton.jit
def _level(weight, variance):
    """log(w·N(m; m, v)), the height of a component's peak."""
    return tl.log(weight) - 0.5 * tl.log(variance * _TWO_PI)


@triton.jit
def _update(partial, k: tl.constexpr, parts, mean, reg, state, BLOCK: tl.constexpr):
    """The M-step of component k except its weight, from moments about `mean`. Returns its mass."""
    mass = numeric.total(partial + k * parts, parts, BLOCK) + _MASS_OFFSET
    shift = numeric.total(partial + (2 + k) * parts, parts, BLOCK) / mass
    second = numeric.total(partial + (4 + k) * parts, parts, BLOCK) / mass
    tl.store(state + _MEANS + k, mean + shift)
    tl.store(state + _VARIANCES + k, second - shift * shift + reg)
    return mass


@triton.jit(do_not_specialize=_SIZES)
def step_kernel(
    x,  # (n,) float64
    partial,  # workspace (7, parts) float64: Σr, Σr·d, Σr·d² per component, Σ log-likelihood
    arrived,  # () int32, 0
    state,  # (_STATE_SIZE,) float64, read and written
    n, parts, tol: tl.float64, reg_covar: tl.float64, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: block i. An EM step, or, with START, the M-step on the k-means split."""
    if tl.load(state + _CONVERGED) == 0:
        part = tl.program_id(0)
        i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        v = tl.load(x + i, mask=inside, other=0.0)
        m0, m1 = tl.load(state + _MEANS), tl.load(state + _MEANS + 1)
        d0, d1 = v - m0, v - m1
        if START:
            r1 = (d1 * d1 < d0 * d0).to(tl.float64)
            r0 = 1.0 - r1
        else:
            v0, v1 = tl.load(state + _VARIANCES), tl.load(state + _VARIANCES + 1)
            l0 = _level(tl.load(state + _WEIGHTS), v0) - 0.5 * (d0 * d0) / v0
            l1 = _level(tl.load(state + _WEIGHTS + 1), v1) - 0.5 * (d1 * d1) / v1
            e = tl.exp(-tl.abs(l1 - l0))
            likelier = 1.0 / (1.0 + e)
            r0 = tl.where(l1 > l0, e * likelier, likelier)
            r1 = tl.where(l1 > l0, likelier, e * likelier)
            log_sum = tl.where(l1 > l0, l1, l0) + tl.log(1.0 + e)
            tl.store(partial + 6 * parts + part, tl.sum(tl.where(inside, log_sum, 0.0), 0))
        r0, r1 = tl.where(inside, r0, 0.0), tl.where(inside, r1, 0.0)
        tl.store(partial + part, tl.sum(r0, 0))
        tl.store(partial + parts + part, tl.sum(r1, 0))
        tl.store(partial + 2 * parts + part, tl.sum(r0 * d0, 0))
        tl.store(partial + 3 * parts + part, tl.sum(r1 * d1, 0))
        tl.store(partial + 4 * parts + part, tl.sum(r0 * d0 * d0, 0))
        tl.store(partial + 5 * parts + part, tl.sum(r1 * d1 * d1, 0))
        if _last_through(arrived, parts):
            reg = numeric.scalar(reg_covar, tl.float64)
            mass0 = _update(partial, 0, parts, m0, reg, state, BLOCK)
            mass1 = _update(partial, 1, parts, m1, reg, state, BLOCK)
            tl.store(state + _WEIGHTS, mass0 / (mass0 + mass1))
            tl.store(state + _WEIGHTS + 1, mass1 / (mass0 + mass1))
            if not START:
                bound = numeric.total(partial + 6 * parts, parts, BLOCK) / n.to(tl.float64)
                change = tl.abs(bound - tl.load(state + _BOUND))
                at_rest = change < numeric.scalar(tol, tl.float64)
                tl.store(state + _BOUND, bound)
                tl.store(state + _STEPS, tl.load(state + _STEPS) + 1.0)
                tl.store(state + _CONVERGED, tl.where(at_rest, 1.0, 0.0))


@triton.jit
def _finite(a):
    """Replaces NaN by 0 and infinities by the largest finite numbers."""
    return tl.minimum(tl.maximum(tl.where(a == a, a, 0.0), -_LARGEST), _LARGEST)


@triton.jit(do_not_specialize=_SIZES)
def posterior_kernel(
    x,  # (≥ n,) float64
    state,  # (_STATE_SIZE,) float64
    clean,  # (n,) in ACC, written
    means, variances, weights,  # (2,) float64, written
    n_iter,  # () int64, written
    converged, degenerate,  # () bool, written
    n, reg_covar: tl.float64, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: block i; program 0 also the mixture."""
    a, b = tl.load(state + _MEANS), tl.load(state + _MEANS + 1)
    low = tl.where(b < a, 1, 0)  # the component of the smaller mean
    high = 1 - low
    m0, m1 = tl.minimum(a, b), tl.maximum(a, b)
    v0, v1 = tl.load(state + _VARIANCES + low), tl.load(state + _VARIANCES + high)
    w0, w1 = tl.load(state + _WEIGHTS + low), tl.load(state + _WEIGHTS + high)
    deviation = (tl.load(state + _HIGH) - tl.load(state + _LOW)) * _MIN_DEVIATION
    limit = deviation * deviation
    samples = n.to(tl.float64)
    # comparisons with NaN are false
    sound = (w0 * samples >= _MIN_MASS) & (w1 * samples >= _MIN_MASS)
    sound = sound & (v0 > limit) & (v1 > limit) & (v0 <= _LARGEST) & (v1 <= _LARGEST)
    sound = sound & (m1 - m0 > deviation)

    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    d0, d1 = v - m0, v - m1
    odds = _level(w1, v1) - 0.5 * (d1 * d1) / v1 - (_level(w0, v0) - 0.5 * (d0 * d0) / v0)
    e = tl.exp(-tl.abs(odds))
    likelier = 1.0 / (1.0 + e)
    value = tl.where(sound, tl.where(odds > 0, e * likelier, likelier), 1.0)
    tl.store(clean + i, value.to(ACC), mask=i < n)

    if tl.program_id(0) == 0:
        mean = _finite(tl.load(state + _MEAN))
        reg = numeric.scalar(reg_covar, tl.float64)
        variance = _finite(tl.load(state + _VARIANCE) + reg)
        tl.store(means, tl.where(sound, m0, mean))
        tl.store(means + 1, tl.where(sound, m1, mean))
        tl.store(variances, tl.where(sound, v0, variance))
        tl.store(variances + 1, tl.where(sound, v1, variance))
        tl.store(weights, tl.where(sound, w0, 1.0))
        tl.store(weights + 1, tl.where(sound, w1, 0.0))
        tl.store(n_iter, tl.where(sound, tl.load(state + _STEPS), 0.0).to(tl.int64))
        tl.store(converged, sound & (tl.load(state + _CONVERGED) != 0))
        tl.store(degenerate, sound == 0)


@implements("fit_label_quality")
def forward(
    losses: Tensor,
    history: Tensor | None,
    uniforms: list[float],
    max_iter: int,
    tol: float,
    reg_covar: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in `reference/fit_label_quality.py`."""
    n = losses.shape[0]
    epochs = losses[None] if history is None else torch.cat([history, losses[None]])
    if n == 0:  # treated as one sample at 0
        epochs, normalize = losses.new_zeros(1, 1), False
    count = epochs.shape[1]
    parts = -(-count // CONFIG["BLOCK"])
    sizes, layout = (count, parts), (epochs.shape[0], *epochs.stride())

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return losses.new_empty(shape, dtype=dtype)

    arrived = losses.new_zeros((), dtype=torch.int32)
    ranges = None
    if normalize:
        ranges = empty(epochs.shape[0], 2)
        workspace = empty(2, epochs.shape[0], parts)
        grid = (parts, epochs.shape[0])
        launch(range_kernel, grid, epochs, workspace, arrived, ranges, *sizes, *layout, **CONFIG)
    x, partial, state = empty(count), empty(7, parts), empty(_STATE_SIZE)
    first = min(int(uniforms[0] * count), count - 1)
    launch(
        average_kernel, (parts,), epochs, ranges, x, partial, arrived, state, *sizes, *layout,
        first, *uniforms[1:], **CONFIG,
    )  # fmt: skip
    work = (partial, arrived, state, *sizes)
    launch(start_kernel, (parts,), x, x.sort().values, *work, **CONFIG)
    for step in range(max_iter + 1):
        launch(step_kernel, (parts,), x, *work, tol, reg_covar, START=step == 0, **CONFIG)
    dtype = accumulate_dtype(losses)
    results = (
        empty(n, dtype=dtype), empty(2), empty(2), empty(2), empty(dtype=torch.int64),
        empty(dtype=torch.bool), empty(dtype=torch.bool),
    )  # fmt: skip
    launch(
        posterior_kernel, (parts,), x, state, *results, n, reg_covar, ACC=triton_dtype(dtype),
        **CONFIG,
    )  # fmt: skip
    return results
