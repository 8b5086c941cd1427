// What the launches of fit_label_quality.cu share: block sums, split of the samples, the M-step.
#pragma once

#include "cuda/common.h"

namespace sanm {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 512;  // blocks of a sweep at most
constexpr int kPair = 2;     // doubles of a 16-byte access
constexpr int kChunk = 2048;  // samples that are sorted by one block
constexpr int kSortThreads = 512;
constexpr int kOneBlock = 1024;        // threads where a block is alone
constexpr int kLloydIterations = 300;  // these two are scikit-learn's
constexpr double kLloydTolerance = 1e-4;
constexpr double kMassOffset = 10 * 2.220446049250313e-16;
constexpr double kMinMass = 0.5;        // less in a component, or a standard deviation or the means'
constexpr double kMinDeviation = 1e-6;  // distance below this share of the range: a degenerate fit
constexpr double kLargest = 1.7976931348623157e308;

// ---- Sums.

template <int N>
struct Sums {
  double v[N] = {};
  SANM_DEVICE double& operator[](int k) { return v[k]; }
};

// Every thread's sums added; all threads get the result. scratch: N·kWarp.
template <int N>
SANM_DEVICE Sums<N> block_sums(Sums<N> x, double* scratch) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = warp_reduce(x[k], Sum());
    if (lane() == 0) scratch[k * kWarp + warp()] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k)
    x[k] = warp_reduce(lane() < warps() ? scratch[k * kWarp + lane()] : 0.0, Sum());
  __syncthreads();
  return x;
}

// Adds the block's sums and leaves them as column blockIdx.x of partial (N, gridDim.x).
template <int N>
SANM_DEVICE void leave(const Sums<N>& own, double* partial, double* scratch) {
  Sums<N> x = block_sums(own, scratch);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < N; ++k) partial[k * static_cast<int64_t>(gridDim.x) + blockIdx.x] = x[k];
}

// Σ over the columns of partial (N, parts), in every thread.
template <int N>
SANM_DEVICE Sums<N> collect(const double* partial, int64_t parts, double* scratch) {
  Sums<N> x;
  for (int64_t p = threadIdx.x; p < parts; p += blockDim.x)
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += partial[k * parts + p];
  return block_sums(x, scratch);
}

// What the lanes before this one hold together; `x` becomes what all hold. Of the butterfly's two
// halves the lower comes before the upper one.
SANM_DEVICE double warp_prefix(double& x) {
  double before = 0;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double other = shuffle_xor(x, distance);
    if (lane() & distance) before += other;
    x += other;
  }
  return before;
}

// The same over the block. scratch: kWarp.
SANM_DEVICE double block_prefix(double& x, double* scratch) {
  const double within = warp_prefix(x);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  x = lane() < warps() ? scratch[lane()] : 0.0;
  const double before = __shfl_sync(kFullMask, warp_prefix(x), warp());
  __syncthreads();
  return before + within;
}

// ---- The samples.

// n samples in `parts` runs of `per`, one per block.
struct Split {
  int64_t n, per, parts;

  explicit Split(int64_t samples) : n(samples) {
    const int64_t unit = kThreads * kPair;
    per = ceil_div(ceil_div(n, kParts), unit) * unit;
    parts = ceil_div(n, per);
  }
  SANM_DEVICE int64_t begin(int64_t part) const { return part * per; }
  SANM_DEVICE int64_t end(int64_t part) const { return min(n, (part + 1) * per); }
};

// The rows of the history, then the losses.
template <typename T>
struct Epochs {
  const T* losses;   // (n,), elements `stride` apart
  const T* history;  // (count − 1, n), strides (row, column)
  int64_t n, stride, row, column, count;

  SANM_DEVICE double at(int64_t e, int64_t i) const {
    return widen(e + 1 < count ? history[e * row + i * column] : losses[i * stride]);
  }
};

struct Summary {
  double first, candidate[2];        // centre c0, candidates for the other
  double mean, variance, low, high;  // of all samples
};

struct Mixture {
  double mean[2], variance[2], weight[2];  // Lloyd's centres at first
  double bound;                            // mean log-likelihood of the last E-step
  double steps;                            // E-steps done; −1 before the first M-step
  double converged;                        // 0 or 1

  SANM_DEVICE void swap() {
    for (double* two : {mean, variance, weight}) {
      const double first = two[0];
      two[0] = two[1];
      two[1] = first;
    }
  }
  // log(w·N(y; m, v)) = level + slope·(y − m)²
  SANM_DEVICE double slope(int k) const { return -0.5 / variance[k]; }
  SANM_DEVICE double level(int k) const {
    return log(weight[k]) - 0.5 * log(2 * 3.14159265358979323846 * variance[k]);
  }
};

// Calls body(sample, its index) for those of the block's part, 16 bytes of x at a time.
template <typename Body>
SANM_DEVICE void over_part(const double* x, const Split& split, const Body& body) {
  const int64_t end = split.end(blockIdx.x);
#pragma unroll 2
  for (int64_t i = split.begin(blockIdx.x) + threadIdx.x * kPair; i < end; i += kThreads * kPair) {
    const Vector<double, kPair> pair = load_global<kPair>(x + i);  // x is padded to whole pairs
    body(pair[0], i);
    if (i + 1 < end) body(pair[1], i + 1);
  }
}

// ---- Moments about the means: Σr, Σr·d, Σr·d² of both components, d = x − mean; Σ log-likelihood.

SANM_DEVICE void add_moments(Sums<7>& m, double r0, double r1, double d0, double d1) {
  m[0] += r0;
  m[1] += r1;
  m[2] += r0 * d0;
  m[3] += r1 * d1;
  m[4] += r0 * d0 * d0;
  m[5] += r1 * d1 * d1;
}

// The mixture after the M-step that the moments allow, unless it has converged before:
//   m' = m + s,  v' = Σr·d²/R − s² + reg,  w' = R/ΣR  with  R = Σr + 10ε,  s = Σr·d/R.
SANM_DEVICE Mixture advance(Mixture p, const double* moments, const Split& split, double tol,
                            double reg, double* scratch) {
  if (p.converged != 0) return p;
  Sums<7> m = collect<7>(moments, split.parts, scratch);
  double mass[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    mass[k] = m[k] + kMassOffset;
    const double shift = m[2 + k] / mass[k];
    p.mean[k] += shift;
    p.variance[k] = m[4 + k] / mass[k] - shift * shift + reg;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) p.weight[k] = mass[k] / (mass[0] + mass[1]);
  if (p.steps >= 0) {
    const double bound = m[6] / static_cast<double>(split.n);
    p.converged = fabs(bound - p.bound) < tol ? 1 : 0;
    p.bound = bound;
  }
  p.steps += 1;
  return p;
}

// NaN as 0, infinities as the largest numbers.
SANM_DEVICE double finite(double x) {
  return x == x ? Min()(Max()(x, -kLargest), kLargest) : 0.0;
}

}  // namespace
}  // namespace sanm
