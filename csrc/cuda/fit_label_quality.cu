// The two-component Gaussian mixture over losses, in float64, without host synchronisation. Three
// launches:
//
//   range      each epoch's minimum and maximum (only if normalising)
//   average    x, the mean over the epochs; its extremes, Σ x, Σ(x − c0)² about the first centre c0
//   fit        all repeated passes over x, a cooperative launch of one block per multiprocessor:
//     draw       two candidates for the second centre (k-means++), the same in every block
//     potentials of both candidates, and Σ(x − mean)²
//     Lloyd      until the centres converge; then the moments for the first M-step
//     EM         E-step, M-step, convergence
//     posterior  the order of the components, whether the fit is degenerate
//
// A sweep over the samples writes a few sums per block. After a grid barrier each block adds the
// sums of all blocks redundantly, in the same order, so that all blocks take the same decisions.
//
// Empty input is treated as one sample at 0. Values are not checked: one that is not finite makes
// the means NaN and the fit degenerate.
#include "cuda/mixture.h"

namespace sanm {
namespace {

// ---- From losses to x.

// Block (part, epoch).
template <typename T>
__global__ void __launch_bounds__(kThreads) range_kernel(
    Epochs<T> epochs, Split split,
    double* partial) {  // (2, epochs, parts), written: minima, maxima
  using A = acc_t<T>;
  A low = static_cast<A>(INFINITY), high = static_cast<A>(-INFINITY);
  const int64_t e = blockIdx.y, end = split.end(blockIdx.x);
#pragma unroll 4
  for (int64_t i = split.begin(blockIdx.x) + threadIdx.x; i < end; i += kThreads) {
    const A x = epochs.at(e, i);
    low = Min()(low, x);
    high = Max()(high, x);
  }
  A* scratch = shared_memory<A>();
  low = block_min(low, scratch);
  high = block_max(high, scratch);
  if (threadIdx.x != 0) return;
  partial[e * split.parts + blockIdx.x] = low;
  partial[(epochs.count + e) * split.parts + blockIdx.x] = high;
}

// x_i = mean over the epochs of (loss − minimum)/span, or of the losses if there are no ranges.
template <typename T>
__global__ void __launch_bounds__(kThreads) average_kernel(
    Epochs<T> epochs, Split split,
    const double* partial,  // (2, epochs, parts): minima, maxima; or null
    double* x,              // (n,), written
    double* sums,           // (4, parts), written: Σ x, Σ(x − c0)², minima, maxima of x
    unsigned* arrived,      // (), set to 0 for the launch that follows
    int64_t first) {        // the sample that is c0
  double* scratch = shared_memory<double>();     // (kSums, kWarp)
  double* ranges = scratch + kSums * kWarp;      // (epochs, 2): minimum, span
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
    return epochs.count == 1 ? total : total / static_cast<double>(epochs.count);
  };
  double c0 = 0, low = INFINITY, high = -INFINITY;
  Sums own;
  const int64_t begin = split.begin(blockIdx.x) + threadIdx.x, end = split.end(blockIdx.x);
  // c0 is the first iteration: `mean` is instantiated once, which saves registers.
#pragma unroll 1
  for (int64_t i = begin - kThreads; i < end; i += kThreads) {
    const bool before = i < begin;
    const double value = mean(before ? first : i);
    if (before) {
      c0 = value;
      continue;
    }
    x[i] = value;
    own[0] += value;
    own[1] += (value - c0) * (value - c0);
    low = Min()(low, value);
    high = Max()(high, value);
  }
  leave(own, 2, sums, scratch);
  __syncthreads();
  low = block_min(low, scratch);
  high = block_max(high, scratch);
  if (threadIdx.x != 0) return;
  sums[2 * split.parts + blockIdx.x] = low;
  sums[3 * split.parts + blockIdx.x] = high;
  if (blockIdx.x == 0) *arrived = 0;
}

// ---- The fit.

struct Settings {
  int64_t n, first;  // first: the sample that is c0
  double u0, u1;
  int64_t max_iter;
  double tol, reg;
};

template <typename O>
struct Results {
  O* clean;                             // (n,)
  double *means, *variances, *weights;  // (2,)
  int64_t* n_iter;                      // ()
  bool *converged, *degenerate;         // ()
};

// Finds the first sample at which the cumulative sum of (x − c0)² reaches uniform·total: first its
// part, by a prefix sum over the parts, then the thread whose run of that part contains it.
SANM_DEVICE void draw(const double* x,        // (n,)
                      const double* squares,  // (parts,): Σ(x − c0)²
                      const Split& split, double c0, double uniform,
                      double* drawn,  // () shared, written by one thread
                      double* scratch) {
  double* shared_before = scratch + kWarp;
  const int64_t t = threadIdx.x;  // kParts ≤ kFitThreads
  const double square = t < split.parts ? squares[t] : 0.0;
  double total = square;
  const double before = block_prefix(total, scratch);
  const double target = uniform * total;
  const int64_t past = __syncthreads_count(t < split.parts && before + square < target);
  const int64_t part = min(past, split.parts - 1), end = split.end(part);
  if (t == part) *shared_before = before;
  __syncthreads();

  const int64_t run = split.per / kFitThreads, begin = split.begin(part) + t * run;
  const auto squared = [&](int64_t i) { return i < end ? (x[i] - c0) * (x[i] - c0) : 0.0; };
  double own = 0;
#pragma unroll 4
  for (int64_t i = begin; i < begin + run; ++i) own += squared(i);
  double reached = *shared_before + block_prefix(own, scratch);
  int64_t index = begin;
#pragma unroll 1
  for (; index < min(begin + run, end); ++index) {
    reached += squared(index);
    if (!(reached < target)) break;
  }
  const int64_t passed = __syncthreads_count(index == begin + run);
  if (t == min(passed, int64_t{kFitThreads - 1})) *drawn = x[min(index, split.n - 1)];
}

// A cooperative launch.
template <typename O>
__global__ void __launch_bounds__(kFitThreads, 1) fit_kernel(
    const double* x, Split split,          // (n,), padded to whole pairs
    const double* average, Split before,   // (4, parts): Σ x, Σ(x − c0)², minima, maxima of x
    double* partial, unsigned* arrived,    // workspace (2, kSums, gridDim.x), () 0
    Results<O> result, Settings s) {
  double* scratch = shared_memory<double>();  // (kSums + 1, kWarp)
  Mixture* const p = reinterpret_cast<Mixture*>(scratch + (kSums + 1) * kWarp);
  const double samples = static_cast<double>(split.n);
  const Part part(x, split);
  Together together{partial, arrived, scratch};

  // The second centre.
  const double c0 = x[s.first];
  double whole = 0, least = INFINITY, most = -INFINITY;
  if (threadIdx.x < before.parts) {  // kParts ≤ kFitThreads
    whole = average[threadIdx.x];
    least = average[2 * before.parts + threadIdx.x];
    most = average[3 * before.parts + threadIdx.x];
  }
  const double mean = block_sum(whole, scratch) / samples;
  least = block_min(least, scratch);
  most = block_max(most, scratch);
  double* drawn = scratch + kSums * kWarp;  // (2,); overwritten by the totals later
#pragma unroll 1
  for (int k = 0; k < 2; ++k)
    draw(x, average + before.parts, before, c0, k == 0 ? s.u0 : s.u1, drawn + k, scratch);
  __syncthreads();
  const double c1 = drawn[0], c2 = drawn[1];
  Sums own;
  part.sweep([&](const Vector<double, kPair>& pair, int64_t, bool both) {
#pragma unroll
    for (int u = 0; u < kPair; ++u) {
      const double y = pair[u], d = y - mean, square = (y - c0) * (y - c0);
      const double a = Min()(square, (y - c1) * (y - c1));
      const double b = Min()(square, (y - c2) * (y - c2));
      if (u > 0 && !both) continue;
      own[0] += a;
      own[1] += b;
      own[2] += d * d;
    }
  });
  const double* totals = together.sums(own);
  const double variance = totals[2] / samples;

  // Lloyd: each centre moves to its samples' mean until the summed squared shift is at most 1e-4 of
  // the variance. The first centre wins ties; one without samples becomes NaN, which ends the loop.
  double m0 = c0, m1 = totals[1] < totals[0] ? c2 : c1;
  const auto nearer = [](double d1, double d0) { return above(d0 * d0, d1 * d1); };
  bool moving = true;
#pragma unroll 1
  for (int iteration = 0; moving && iteration < kLloydIterations; ++iteration) {
    own = Sums{};
    int members[2] = {};
    part.sweep([&](const Vector<double, kPair>& pair, int64_t, bool both) {
#pragma unroll
      for (int u = 0; u < kPair; ++u) {
        const double d0 = pair[u] - m0, d1 = pair[u] - m1;
        const bool second = nearer(d1, d0);
        if (u > 0 && !both) continue;
        members[0] += !second, members[1] += second;
        own[2] += second ? 0.0 : d0;
        own[3] += second ? d1 : 0.0;
      }
    });
    own[0] = members[0], own[1] = members[1];
    totals = together.sums(own);
    const double shift0 = totals[2] / totals[0], shift1 = totals[3] / totals[1];
    m0 += shift0;
    m1 += shift1;
    moving = shift0 * shift0 + shift1 * shift1 > kLloydTolerance * variance;
  }
  own = Sums{};
  part.sweep([&](const Vector<double, kPair>& pair, int64_t, bool both) {
#pragma unroll
    for (int u = 0; u < kPair; ++u) {
      const double d0 = pair[u] - m0, d1 = pair[u] - m1, r = u == 0 || both ? 1.0 : 0.0;
      const bool second = nearer(d1, d0);
      add_moments(own, second ? 0.0 : r, second ? r : 0.0, d0, d1);
    }
  });
  totals = together.sums(own);
  if (threadIdx.x == 0) p->mean[0] = m0, p->mean[1] = m1;
  if (warp() == 0) {
    __syncwarp();
    p->maximise(totals, s.reg);
  }

  // EM, with e = e^−|l0 − l1| ≤ 1: responsibilities 1/(1 + e) and e/(1 + e), log-likelihood
  // max(l0, l1) + log(1 + e). Σ log(1 + e) is accumulated as log Π(1 + e), which saves logarithms.
  constexpr double kFull = 1e300;  // 1 + e ≤ 2: two more factors cannot overflow
  double bound = -INFINITY;
  int64_t steps = 0;
  bool converged = false;
#pragma unroll 1
  while (steps < s.max_iter && !converged) {
    __syncthreads();
    const double slope0 = p->slope[0], slope1 = p->slope[1];
    const double level0 = p->level[0], level1 = p->level[1];
    m0 = p->mean[0], m1 = p->mean[1];
    own = Sums{};
    double product = 1;
    part.sweep([&](const Vector<double, kPair>& pair, int64_t, bool both) {
#pragma unroll
      for (int u = 0; u < kPair; ++u) {
        const double d0 = pair[u] - m0, d1 = pair[u] - m1;
        const double l0 = std::fma(slope0 * d0, d0, level0), l1 = std::fma(slope1 * d1, d1, level1);
        const double odds = l1 - l0;
        const bool upper = above(odds, 0);
        double e = exp_minus(fabs(odds)), likelier = reciprocal(1 + e), top = upper ? l1 : l0;
        if (u > 0 && !both) e = likelier = top = 0;
        const double other = e * likelier;
        add_moments(own, upper ? other : likelier, upper ? likelier : other, d0, d1);
        own[6] += top;
        product *= 1 + e;
      }
      if (above(product, kFull)) {
        own[6] += log(product);
        product = 1;
      }
    });
    own[6] += log(product);
    totals = together.sums(own);
    if (warp() == 0) p->maximise(totals, s.reg);
    const double now = totals[6] / samples;
    converged = fabs(now - bound) < s.tol;
    bound = now;
    ++steps;
  }
  __syncthreads();

  // Sound: at least half a sample in each component, standard deviations and the distance between
  // the means above 1e-6 of the range. Else the result is one Gaussian and every label is clean.
  // Comparisons with NaN are false.
  const int a = p->mean[1] < p->mean[0] ? 1 : 0, b = 1 - a;  // the lower component, the upper one
  const double deviation = (most - least) * kMinDeviation;
  bool sound = p->mean[b] - p->mean[a] > deviation;
#pragma unroll
  for (int k = 0; k < 2; ++k)
    sound = sound && p->weight[k] * static_cast<double>(s.n) >= kMinMass &&
            p->variance[k] > deviation * deviation && p->variance[k] <= kLargest;
  const double slope0 = p->slope[a], slope1 = p->slope[b];
  const double level0 = p->level[a], level1 = p->level[b];
  m0 = p->mean[a], m1 = p->mean[b];
  part.sweep([&](const Vector<double, kPair>& pair, int64_t i, bool) {
#pragma unroll
    for (int u = 0; u < kPair; ++u) {
      const double d0 = pair[u] - m0, d1 = pair[u] - m1;
      const double odds =
          std::fma(slope1 * d1, d1, level1) - std::fma(slope0 * d0, d0, level0);
      const double e = exp_minus(fabs(odds)), likelier = reciprocal(1 + e);
      const double clean = odds > 0 ? e * likelier : likelier;
      if (i + u < s.n) result.clean[i + u] = static_cast<O>(sound ? clean : 1.0);
    }
  });
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int from = k == 0 ? a : b;
    result.means[k] = sound ? p->mean[from] : finite(mean);
    result.variances[k] = sound ? p->variance[from] : finite(variance + s.reg);
    result.weights[k] = sound ? p->weight[from] : k == 0 ? 1.0 : 0.0;
  }
  *result.n_iter = sound ? steps : 0;
  *result.converged = sound && converged;
  *result.degenerate = !sound;
}

// The workspace of a call, in doubles; its arrays are aligned to 16 bytes.
struct Workspace {
  double *x, *ranges, *sums, *partial;
  unsigned* arrived;
  Tensor memory;

  Workspace(const Tensor& on, int64_t n, int64_t epochs, int64_t parts, int64_t blocks)
      : memory(new_tensor(on, {place(nullptr, n, epochs, parts, blocks)}, ScalarType::Double)) {
    place(out<double>(memory), n, epochs, parts, blocks);
  }

 private:
  int64_t place(double* base, int64_t n, int64_t epochs, int64_t parts, int64_t blocks) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      double* const here = base + (base ? used : 0);
      used += ceil_div(count, kPair) * kPair;
      return here;
    };
    x = take(n);
    ranges = take(2 * epochs * parts);
    sums = take(4 * parts);
    partial = take(2 * kSums * blocks);
    arrived = reinterpret_cast<unsigned*>(take(1));
    return used;
  }
};

// losses (N,), history (E, N), uniforms (3,) → clean probability (N,), means, variances,
// weights (2,), n_iter, converged, degenerate ()
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fit_label_quality(
    const Tensor& losses, const std::optional<Tensor>& history, std::vector<double> uniforms,
    int64_t max_iter, double tol, double reg, bool normalize) {
  check_fit_label_quality(losses, history, uniforms);
  const int64_t n = losses.size(0), count = 1 + (history ? history->size(0) : 0);
  const int64_t samples = std::max<int64_t>(n, 1);
  const Split split(samples, kParts, kFitThreads), fitted(samples, multiprocessors(losses), 1024);
  const auto first = std::min(static_cast<int64_t>(uniforms[0] * samples), samples - 1);
  const auto pair = [&] { return new_tensor(losses, {2}, ScalarType::Double); };
  const auto scalar = [&](ScalarType type) { return new_tensor(losses, {}, type); };
  const Tensor clean = new_tensor(losses, {n}, acc_type(losses)), means = pair(),
               variances = pair(), weights = pair(), n_iter = scalar(ScalarType::Long),
               converged = scalar(ScalarType::Bool), degenerate = scalar(ScalarType::Bool);
  const Workspace w(losses, samples, count, split.parts, fitted.parts);
  const Settings settings{n, first, uniforms[1], uniforms[2], max_iter, tol, reg};
  constexpr int64_t kRow = kWarp * sizeof(double);  // of scratch
  const auto go = [&](Grid grid, int64_t threads, int64_t shared, bool cooperative = false) {
    return Launch{"fit_label_quality", losses, grid, threads, shared, 1, cooperative};
  };
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
    launch(go({split.parts}, kThreads, kSums * kRow + 2 * count * sizeof(double)),
           average_kernel<T>, epochs, split, ranged ? w.ranges : nullptr, w.x, w.sums, w.arrived,
           first);
    const Results<O> results{out<O>(clean),        out<double>(means),    out<double>(variances),
                             out<double>(weights), out<int64_t>(n_iter), out<bool>(converged),
                             out<bool>(degenerate)};
    launch(go({fitted.parts}, kFitThreads, (kSums + 1) * kRow + sizeof(Mixture), true),
           fit_kernel<O>, w.x, fitted, w.sums, split, w.partial, w.arrived, results, settings);
  });
  return {clean, means, variances, weights, n_iter, converged, degenerate};
}

}  // namespace

SANM_CUDA_KERNELS(m) { m.impl("fit_label_quality.cuda", TORCH_BOX(&fit_label_quality)); }

}  // namespace sanm
