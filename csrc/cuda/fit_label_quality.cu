// The two-component Gaussian mixture over losses, in float64 and without the host.
//
// A launch leaves a few sums per block. Every block of the next launch adds them up for itself, in
// the same order, and takes the next decision: no counters, no atomics, and the end of a launch is
// the only barrier between blocks. In max_iter + 7 launches (one fewer without normalising):
//
//   range      each epoch's minimum and maximum
//   average    x, the mean over the epochs; Σ x and Σ(x − c0)² about the first centre c0
//   draw       the data's mean, and two candidates for the second centre (k-means++)
//   sort       chunks of x sorted, with prefix sums; both candidates' potentials; Σ(x − mean)²
//   lloyd      one block: Lloyd's iterations, each a binary search in every sorted chunk
//   nearest    moments of the samples about the nearer centre: what the first M-step needs
//   step       M-step, convergence, E-step; nothing once converged. max_iter times
//   posterior  the last M-step, the order of the components, whether the fit is degenerate
//
// No sample stands as one sample at 0. Values are not checked: one that is not finite makes the
// means NaN and the fit degenerate.
#include "cuda/mixture.h"

namespace sanm {
namespace {

// ---- From losses to x.

// Block (part, epoch).
template <typename T>
__global__ void __launch_bounds__(kThreads) range_kernel(
    Epochs<T> epochs, Split split,
    double* partial) {  // (2, epochs, parts), written: minima, maxima
  double low = INFINITY, high = -INFINITY;
  const int64_t e = blockIdx.y, end = split.end(blockIdx.x);
  for (int64_t i = split.begin(blockIdx.x) + threadIdx.x; i < end; i += kThreads) {
    const double x = epochs.at(e, i);
    low = Min()(low, x);
    high = Max()(high, x);
  }
  double* scratch = shared_memory<double>();
  low = block_min(low, scratch);
  high = block_max(high, scratch);
  if (threadIdx.x != 0) return;
  partial[e * split.parts + blockIdx.x] = low;
  partial[(epochs.count + e) * split.parts + blockIdx.x] = high;
}

// x_i = mean over the epochs of (loss − minimum)/span, or of the losses where there are no ranges.
template <typename T>
__global__ void __launch_bounds__(kThreads) average_kernel(
    Epochs<T> epochs, Split split,
    const double* partial,  // (2, epochs, parts): minima, maxima; or null
    double* x,              // (n,), written
    double* sums,           // (2, parts), written: Σ x, Σ(x − c0)²
    Summary* summary,       // c0 is written
    int64_t first) {        // the sample that is c0
  double* scratch = shared_memory<double>();  // (2, kWarp)
  double* ranges = scratch + 2 * kWarp;       // (epochs, 2): minimum, span
  for (int64_t e = warp(); partial && e < epochs.count; e += warps()) {
    double low = INFINITY, high = -INFINITY;
    for (int64_t p = lane(); p < split.parts; p += kWarp) {
      low = Min()(low, partial[e * split.parts + p]);
      high = Max()(high, partial[(epochs.count + e) * split.parts + p]);
    }
    low = warp_reduce(low, Min());
    high = warp_reduce(high, Max());
    if (lane() != 0) continue;
    ranges[2 * e] = low;
    ranges[2 * e + 1] = high == low ? 1.0 : high - low;  // all equal: 0
  }
  __syncthreads();
  const auto mean = [&](int64_t i) {
    double total = 0;
    for (int64_t e = 0; i < epochs.n && e < epochs.count; ++e) {
      const double loss = epochs.at(e, i);
      total += partial ? (loss - ranges[2 * e]) / ranges[2 * e + 1] : loss;
    }
    return total / static_cast<double>(epochs.count);
  };
  const double c0 = mean(first);
  Sums<2> own;
  const int64_t end = split.end(blockIdx.x);
  for (int64_t i = split.begin(blockIdx.x) + threadIdx.x; i < end; i += kThreads) {
    const double value = mean(i);
    x[i] = value;
    own[0] += value;
    own[1] += (value - c0) * (value - c0);
  }
  leave(own, sums, scratch);
  if (blockIdx.x == 0 && threadIdx.x == 0) summary->first = c0;
}

// ---- k-means.

// Candidate k is the first sample with which the cumulative sum of (x − c0)² reaches u_k·total: the
// sums of the parts say in which part that is, a sweep over the part at which sample. Block k.
__global__ void __launch_bounds__(kOneBlock, 1) draw_kernel(
    const double* x,     // (n,)
    const double* sums,  // (2, parts): Σ x, Σ(x − c0)²
    Summary* summary,    // the mean and candidate k are written
    Split split, double u0, double u1) {
  double* scratch = shared_memory<double>();  // (2, kWarp)
  double* shared_before = scratch + 2 * kWarp;
  Sums<2> total = collect<2>(sums, split.parts, scratch);
  const double target = (blockIdx.x == 0 ? u0 : u1) * total[1], c0 = summary->first;

  const int64_t t = threadIdx.x;  // kParts ≤ kOneBlock
  const double square = t < split.parts ? sums[split.parts + t] : 0.0;
  double block_total = square;
  const double before = block_prefix(block_total, scratch);
  const int64_t past = __syncthreads_count(t < split.parts && before + square < target);
  const int64_t part = min(past, split.parts - 1), end = split.end(part);
  if (t == part) *shared_before = before;
  __syncthreads();

  double carry = *shared_before;
  int64_t index = split.begin(part);
  for (int64_t begin = index; begin < end; begin += kOneBlock) {
    const int64_t i = begin + t;
    const double d = i < end ? x[i] - c0 : 0.0;
    double tile = d * d;
    const double reached = carry + (block_prefix(tile, scratch) + d * d);
    const int64_t passed = __syncthreads_count(i < end && reached < target);
    index += passed;
    carry += tile;
    if (passed < min(end - begin, static_cast<int64_t>(kOneBlock))) break;
  }
  if (t != 0) return;
  summary->candidate[blockIdx.x] = x[min(index, split.n - 1)];
  if (blockIdx.x == 0) summary->mean = total[0] / static_cast<double>(split.n);
}

// Block c: chunk c, samples kChunk·c …, in ascending order (a bitonic network; ∞ fills the last
// chunk up). Potential of a candidate: Σ min((x − c0)², (x − candidate)²).
__global__ void __launch_bounds__(kSortThreads) sort_kernel(
    const double* x,         // (n,)
    const Summary* summary,  // centre, candidates, mean
    double* ordered,         // (chunks, kChunk), written
    double* prefix,          // (chunks, kChunk), written: Σ(x − c0) up to and with each
    double* partial,         // (3, chunks), written: potentials, Σ(x − mean)²
    int64_t n) {
  constexpr int kOwn = kChunk / kSortThreads;
  double* keys = shared_memory<double>();  // (kChunk,)
  double* scratch = keys + kChunk;         // (3, kWarp)
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kChunk;
  const double c0 = summary->first, c1 = summary->candidate[0], c2 = summary->candidate[1];
  Sums<3> own;
  for (int k = threadIdx.x; k < kChunk; k += kSortThreads) {
    keys[k] = INFINITY;
    if (start + k >= n) continue;
    const double v = keys[k] = x[start + k], d = v - summary->mean;
    const double square = (v - c0) * (v - c0);
    own[0] += Min()(square, (v - c1) * (v - c1));
    own[1] += Min()(square, (v - c2) * (v - c2));
    own[2] += d * d;
  }
  leave(own, partial, scratch);  // its barriers also order the keys
  for (int size = 2; size <= kChunk; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = threadIdx.x; pair < kChunk / 2; pair += kSortThreads) {
        const int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
        const double a = keys[i], b = keys[j];
        if ((i & size) == 0 ? a > b : a < b) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      __syncthreads();
    }
  double upto[kOwn], total = 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int at = threadIdx.x * kOwn + k;
    if (start + at < n) total += keys[at] - c0;
    upto[k] = total;
  }
  const double before = block_prefix(total, scratch);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int at = threadIdx.x * kOwn + k;
    ordered[start + at] = keys[at];
    prefix[start + at] = before + upto[k];
  }
}

// One block. Each centre moves to its samples' mean until the summed squared shift is at most 1e-4
// of the variance. In a sorted chunk the samples nearer to the lower centre come first: their
// number m is found by bisection, their sum in the prefix sums P about c0. Over all chunks, with
// M = Σ m and S = Σ P[m − 1], the shifts are
//   (S + M·(c0 − low))/M  and  (Σ(x − c0) − S + (n − M)·(c0 − high))/(n − M).
__global__ void __launch_bounds__(kOneBlock, 1) lloyd_kernel(
    const double* ordered,  // (chunks, kChunk)
    const double* prefix,   // (chunks, kChunk)
    const double* partial,  // (3, chunks): potentials, Σ(x − mean)²
    Summary* summary,       // read; variance, low and high are written
    Mixture* mixture,       // written: the centres, in the order drawn
    int64_t n, int64_t chunks) {
  double* scratch = shared_memory<double>();  // (3, kWarp)
  const double samples = static_cast<double>(n), c0 = summary->first;
  Sums<1> mine;
  double least = INFINITY, most = -INFINITY;
  for (int64_t c = threadIdx.x; c < chunks; c += kOneBlock) {
    const int64_t last = min(n, (c + 1) * kChunk) - 1;
    mine[0] += prefix[last];
    least = Min()(least, ordered[c * kChunk]);
    most = Max()(most, ordered[last]);
  }
  const double whole = block_sums(mine, scratch)[0];
  least = block_min(least, scratch);
  most = block_max(most, scratch);
  Sums<3> sums = collect<3>(partial, chunks, scratch);
  const double variance = sums[2] / samples;
  const double c1 = summary->candidate[sums[1] < sums[0] ? 1 : 0];
  const bool low_first = c0 <= c1;  // who wins ties
  double low = Min()(c0, c1), high = Max()(c0, c1);
  for (int iteration = 0; iteration < kLloydIterations; ++iteration) {
    Sums<2> below;  // M, S
    for (int64_t c = threadIdx.x; c < chunks; c += kOneBlock) {
      const double* chunk = ordered + c * kChunk;
      int begin = 0, end = static_cast<int>(min(n - c * kChunk, static_cast<int64_t>(kChunk)));
      while (begin < end) {
        const int middle = (begin + end) / 2;
        const double y = load_global<1>(chunk + middle)[0];
        const double a = (y - low) * (y - low), b = (y - high) * (y - high);
        if (a < b || (a == b && low_first))
          begin = middle + 1;
        else
          end = middle;
      }
      below[0] += begin;
      if (begin > 0) below[1] += prefix[c * kChunk + begin - 1];
    }
    below = block_sums(below, scratch);
    const double above = samples - below[0];  // of no samples the mean is NaN
    const double down = (below[1] + below[0] * (c0 - low)) / below[0];
    const double up = (whole - below[1] + above * (c0 - high)) / above;
    low += down;
    high += up;
    if (!(down * down + up * up > kLloydTolerance * variance)) break;
  }
  if (threadIdx.x != 0) return;
  summary->variance = variance;
  summary->low = least;
  summary->high = most;
  *mixture = Mixture{};
  mixture->mean[0] = low_first ? low : high;
  mixture->mean[1] = low_first ? high : low;
  mixture->bound = -INFINITY;
  mixture->steps = -1;
}

// ---- Expectation and maximisation.

// Memberships in place of responsibilities; the first centre wins ties.
__global__ void __launch_bounds__(kThreads) nearest_kernel(
    const double* x, Split split,  // (n,)
    const Mixture* mixture,        // the centres
    double* moments) {             // (7, parts), written
  const double m0 = mixture->mean[0], m1 = mixture->mean[1];
  Sums<7> own;
  over_part(x, split, [&](double y, int64_t) {
    const double d0 = y - m0, d1 = y - m1, r1 = d1 * d1 < d0 * d0 ? 1.0 : 0.0;
    add_moments(own, 1 - r1, r1, d0, d1);
  });
  leave(own, moments, shared_memory<double>());
}

// Responsibilities 1/(1 + e^(l0 − l1)) and log-likelihood log(e^l0 + e^l1) from the log densities,
// with e = e^−|l0 − l1| ≤ 1. Two mixtures and two sets of moments take turns: what blocks read here
// (`from`, `moments`) none of them writes.
__global__ void __launch_bounds__(kThreads) step_kernel(
    const double* x, Split split,                // (n,)
    const Mixture* from, const double* moments,  // (7, parts): what the launch before left
    Mixture* to, double* after,                  // (7, parts), written
    double tol, double reg) {
  double* scratch = shared_memory<double>();  // (7, kWarp)
  const Mixture p = advance(*from, moments, split, tol, reg, scratch);
  if (blockIdx.x == 0 && threadIdx.x == 0) *to = p;
  if (p.converged != 0) return;
  const double slope0 = p.slope(0), slope1 = p.slope(1), level0 = p.level(0), level1 = p.level(1);
  Sums<7> own;
  over_part(x, split, [&](double y, int64_t) {
    const double d0 = y - p.mean[0], d1 = y - p.mean[1];
    const double l0 = level0 + slope0 * d0 * d0, l1 = level1 + slope1 * d1 * d1;
    const double e = exp(-fabs(l1 - l0)), likelier = 1 / (1 + e), other = e * likelier;
    add_moments(own, l1 > l0 ? other : likelier, l1 > l0 ? likelier : other, d0, d1);
    own[6] += (l1 > l0 ? l1 : l0) + log1p(e);
  });
  leave(own, after, scratch);
}

template <typename O>
struct Results {
  O* clean;                             // (n,)
  double *means, *variances, *weights;  // (2,)
  int64_t* n_iter;                      // ()
  bool *converged, *degenerate;         // ()
};

// Sound: half a sample in each component, deviations and the means' distance above 1e-6 of the
// range. Else the mixture is one Gaussian and every label is clean. No comparison holds for NaN.
template <typename O>
__global__ void __launch_bounds__(kThreads) posterior_kernel(
    const double* x, Split split,                // (≥ n,)
    const Mixture* from, const double* moments,  // (7, parts): what the last step left
    const Summary* summary, Results<O> result,   // written
    int64_t n, double tol, double reg) {
  Mixture p = advance(*from, moments, split, tol, reg, shared_memory<double>());
  if (p.mean[1] < p.mean[0]) p.swap();
  const double deviation = (summary->high - summary->low) * kMinDeviation;
  bool sound = p.mean[1] - p.mean[0] > deviation;
#pragma unroll
  for (int k = 0; k < 2; ++k)
    sound = sound && p.weight[k] * static_cast<double>(n) >= kMinMass &&
            p.variance[k] > deviation * deviation && p.variance[k] <= kLargest;
  const double slope0 = p.slope(0), slope1 = p.slope(1), level0 = p.level(0), level1 = p.level(1);
  over_part(x, split, [&](double y, int64_t i) {
    const double d0 = y - p.mean[0], d1 = y - p.mean[1];
    const double odds = level1 + slope1 * d1 * d1 - (level0 + slope0 * d0 * d0);
    const double e = exp(-fabs(odds)), likelier = 1 / (1 + e);
    if (i < n) result.clean[i] = static_cast<O>(!sound ? 1 : odds > 0 ? e * likelier : likelier);
  });
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  const double mean = finite(summary->mean), variance = finite(summary->variance + reg);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    result.means[k] = sound ? p.mean[k] : mean;
    result.variances[k] = sound ? p.variance[k] : variance;
    result.weights[k] = sound ? p.weight[k] : k == 0 ? 1.0 : 0.0;
  }
  *result.n_iter = sound ? static_cast<int64_t>(p.steps) : 0;
  *result.converged = sound && p.converged != 0;
  *result.degenerate = !sound;
}

// Memory for all launches of a call, in doubles. Blocks begin at multiples of 16 bytes.
struct Workspace {
  double *x, *ordered, *prefix, *ranges, *sums, *partial, *moments[2];
  Mixture* mixture[2];
  Summary* summary;
  Tensor memory;

  Workspace(const Tensor& on, const Split& split, int64_t epochs, int64_t chunks)
      : memory(new_tensor(on, {place(nullptr, split, epochs, chunks)}, ScalarType::Double)) {
    place(out<double>(memory), split, epochs, chunks);
  }

 private:
  int64_t place(double* base, const Split& split, int64_t epochs, int64_t chunks) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      double* const here = base + (base ? used : 0);
      used += ceil_div(count, kPair) * kPair;
      return here;
    };
    x = take(split.n);
    ordered = take(chunks * kChunk);
    prefix = take(chunks * kChunk);
    ranges = take(2 * epochs * split.parts);
    sums = take(2 * split.parts);
    partial = take(3 * chunks);
    for (int k = 0; k < 2; ++k) {
      moments[k] = take(7 * split.parts);
      mixture[k] = reinterpret_cast<Mixture*>(take(sizeof(Mixture) / sizeof(double)));
    }
    summary = reinterpret_cast<Summary*>(take(sizeof(Summary) / sizeof(double)));
    return used;
  }
};

// losses (N,), history (E, N), uniforms (3,) → clean probability (N,), means, variances,
// weights (2,), n_iter, converged, degenerate ()
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fit_label_quality(
    const Tensor& losses, const std::optional<Tensor>& history, std::vector<double> uniforms,
    int64_t max_iter, double tol, double reg, bool normalize) {
  const int64_t n = losses.size(0), count = 1 + (history ? history->size(0) : 0);
  const Split split(std::max<int64_t>(n, 1));
  const int64_t chunks = ceil_div(split.n, kChunk);
  const auto first = std::min(static_cast<int64_t>(uniforms[0] * split.n), split.n - 1);
  const auto pair = [&] { return new_tensor(losses, {2}, ScalarType::Double); };
  const auto scalar = [&](ScalarType type) { return new_tensor(losses, {}, type); };
  const Tensor clean = new_tensor(losses, {n}, acc_type(losses)), means = pair(),
               variances = pair(), weights = pair(), n_iter = scalar(ScalarType::Long),
               converged = scalar(ScalarType::Bool), degenerate = scalar(ScalarType::Bool);
  const Workspace w(losses, split, count, chunks);
  constexpr int64_t kRow = kWarp * sizeof(double);  // of scratch
  const auto go = [&](Grid grid, int64_t threads, int64_t shared) {
    return Launch{"fit_label_quality", losses, grid, threads, shared};
  };
  const Grid parts{split.parts};
  dispatch(losses.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using O = acc_t<T>;
    const Epochs<T> epochs{in<T>(losses),
                           history ? in<T>(*history) : nullptr,
                           n,
                           losses.stride(0),
                           history ? history->stride(0) : 0,
                           history ? history->stride(1) : 0,
                           count};
    const bool ranged = normalize && n > 0;
    if (ranged)
      launch(go({split.parts, count}, kThreads, kRow), range_kernel<T>, epochs, split, w.ranges);
    launch(go(parts, kThreads, 2 * kRow + 2 * count * sizeof(double)), average_kernel<T>, epochs,
           split, ranged ? w.ranges : nullptr, w.x, w.sums, w.summary, first);
    launch(go({2}, kOneBlock, 2 * kRow + sizeof(double)), draw_kernel, w.x, w.sums, w.summary,
           split, uniforms[1], uniforms[2]);
    launch(go({chunks}, kSortThreads, kChunk * sizeof(double) + 3 * kRow), sort_kernel, w.x,
           w.summary, w.ordered, w.prefix, w.partial, split.n);
    launch(go({1}, kOneBlock, 3 * kRow), lloyd_kernel, w.ordered, w.prefix, w.partial, w.summary,
           w.mixture[0], split.n, chunks);
    launch(go(parts, kThreads, 7 * kRow), nearest_kernel, w.x, split, w.mixture[0], w.moments[0]);
    for (int64_t step = 0; step < max_iter; ++step) {
      const int now = step % 2, next = 1 - now;
      launch(go(parts, kThreads, 7 * kRow), step_kernel, w.x, split, w.mixture[now],
             w.moments[now], w.mixture[next], w.moments[next], tol, reg);
    }
    const Results<O> results{out<O>(clean),        out<double>(means),    out<double>(variances),
                             out<double>(weights), out<int64_t>(n_iter), out<bool>(converged),
                             out<bool>(degenerate)};
    launch(go(parts, kThreads, 7 * kRow), posterior_kernel<O>, w.x, split,
           w.mixture[max_iter % 2], w.moments[max_iter % 2], w.summary, results, n, tol, reg);
  });
  return {clean, means, variances, weights, n_iter, converged, degenerate};
}

}  // namespace

SANM_CUDA_KERNELS(m) { m.impl("fit_label_quality.cuda", TORCH_BOX(&fit_label_quality)); }

}  // namespace sanm
