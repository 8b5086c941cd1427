// Building blocks of fit_label_quality.cu: reductions over a block and over the grid, passes over
// the samples, arithmetic.
#pragma once

#include "cuda/common.h"

namespace sanm {
namespace {

constexpr int kThreads = 256;     // per block of range_kernel and average_kernel
constexpr int kFitThreads = 512;  // per block of fit_kernel
constexpr int kParts = 512;       // most runs of samples in these two; ≤ kFitThreads
constexpr int kPair = 2;          // doubles per 16-byte access
constexpr int kSums = 8;          // sums per reduction; at most the warps of a block
constexpr int kLloydIterations = 300;  // these two are scikit-learn's
constexpr double kLloydTolerance = 1e-4;
constexpr double kMassOffset = 10 * 2.220446049250313e-16;
// A fit is degenerate with less mass in a component, or with a standard deviation or a distance
// between the means below this fraction of the range.
constexpr double kMinMass = 0.5, kMinDeviation = 1e-6;
constexpr double kLargest = 1.7976931348623157e308;

// ---- Sums.

struct Sums {
  double v[kSums] = {};
  SANM_DEVICE double& operator[](int k) { return v[k]; }
};

// Lane l gets Σ x[l / 4] over the warp. In each step a lane passes on half of the sums that it
// still has: 9 shuffles in all, instead of 5 for each of the sums.
SANM_DEVICE double warp_sums(Sums x) {
#pragma unroll
  for (int half = kSums / 2, distance = kWarp / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane() & distance;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const double given = upper ? x[k] : x[k + half];
      x[k] = (upper ? x[k + half] : x[k]) + shuffle_xor(given, distance);
    }
  }
#pragma unroll
  for (int distance = kWarp / kSums / 2; distance > 0; distance /= 2)
    x[0] += shuffle_xor(x[0], distance);
  return x[0];
}

// Writes the block's first `count` sums to column blockIdx.x of partial (count, gridDim.x).
// scratch: (kSums, kWarp), reusable after the next barrier.
SANM_DEVICE void leave(const Sums& own, int count, double* partial, double* scratch) {
  const double sum = warp_sums(own);
  if (lane() % (kWarp / kSums) == 0) scratch[lane() / (kWarp / kSums) * kWarp + warp()] = sum;
  __syncthreads();
  if (warp() >= count) return;
  const double whole = lane() < warps() ? scratch[warp() * kWarp + lane()] : 0.0;
  const double total = warp_reduce(whole, Sum());
  if (lane() == 0) partial[warp() * static_cast<int64_t>(gridDim.x) + blockIdx.x] = total;
}

// A grid barrier of a cooperative launch, the `round`-th, from 1: what was written before is
// visible after. arrived: 0 at launch.
SANM_DEVICE void grid_sync(unsigned* arrived, unsigned round) {
#ifdef SANM_CUDA_HOST
  cuda_host::meet_grid();
#else
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    const volatile unsigned* seen = arrived;
    while (static_cast<int>(*seen - round * gridDim.x) < 0) {  // correct under wrap-around
    }
    __threadfence();
  }
  __syncthreads();
#endif
}

// Sums over all threads of a cooperative launch.
struct Together {
  double* partial;    // workspace (2, kSums, gridDim.x), double-buffered
  unsigned* arrived;  // () 0
  double* scratch;    // (kSums, kWarp), and the totals (kSums,), in shared memory
  unsigned round = 0;

  // The totals (kSums,), valid until the next call; the same bits in every block.
  SANM_DEVICE const double* sums(const Sums& own) {
    double* here = partial + (round % 2) * kSums * gridDim.x;
    double* totals = scratch + kSums * kWarp;
    leave(own, kSums, here, scratch);
    grid_sync(arrived, ++round);
    if (warp() < kSums) {
      double total = 0;
      for (unsigned p = lane(); p < gridDim.x; p += kWarp)
        total += __ldcg(here + warp() * gridDim.x + p);
      total = warp_reduce(total, Sum());
      if (lane() == 0) totals[warp()] = total;
    }
    __syncthreads();
    return totals;
  }
};

// Exclusive prefix sum over the warp; `x` becomes the sum over all lanes. By a butterfly, in which
// a lane of the upper half adds the sum of the lower half.
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

// n samples in `parts` contiguous runs of `per`, one per block; runs start at multiples of `unit`.
struct Split {
  int64_t n, per, parts;

  Split(int64_t samples, int64_t most, int64_t unit)
      : n(samples), per(ceil_div(ceil_div(n, most), unit) * unit), parts(ceil_div(n, per)) {}
  SANM_DEVICE int64_t begin(int64_t part) const { return part * per; }
  SANM_DEVICE int64_t end(int64_t part) const { return min(n, (part + 1) * per); }
};

// The rows of the history, then the losses.
template <typename T>
struct Epochs {
  const T* losses;   // (n,), elements `stride` apart
  const T* history;  // (count − 1, n), strides (row, column)
  int64_t n, stride, row, column, count;

  SANM_DEVICE acc_t<T> at(int64_t e, int64_t i) const {
    return widen(e + 1 < count ? history[e * row + i * column] : losses[i * stride]);
  }
};

// The block's samples, for many sweeps: each thread keeps its first pair in registers, and loads
// the next pair while it processes one.
class Part {
 public:
  SANM_DEVICE Part(const double* x, const Split& split)  // (n,), padded to whole pairs
      : x_(x), start_(split.begin(blockIdx.x) + threadIdx.x * kPair), end_(split.end(blockIdx.x)) {
    if (start_ < end_) first_ = load_global<kPair>(x + start_);
  }

  // Calls body(pair, index of its first sample, whether its second one exists, else it is a copy of
  // the first).
  template <typename Body>
  SANM_DEVICE void sweep(const Body& body) const {
    const int64_t step = blockDim.x * kPair;
    Vector<double, kPair> next = first_;
#pragma unroll 1
    for (int64_t i = start_; i < end_; i += step) {
      Vector<double, kPair> pair = next;
      if (i + step < end_) next = load_global<kPair>(x_ + i + step);
      const bool both = i + 1 < end_;
      if (!both) pair[1] = pair[0];
      body(pair, i, both);
    }
  }

 private:
  const double* x_;
  int64_t start_, end_;
  Vector<double, kPair> first_{};
};

// ---- Branch-free arithmetic, which the compiler interleaves for both samples of a pair.

// x > y for y ≥ 0, and for the GPU's NaN x, whose sign bit is 0: as integers, by the integer units.
SANM_DEVICE bool above(double x, double y) {
  return __double_as_longlong(x) > __double_as_longlong(y);
}

// e^−x for x ≥ 0; 0 for x > 708 and NaN. 2^k·e^r with |r| ≤ ln(2)/2, e^r by the minimax polynomial
// of degree 11, whose relative error is 3e-18.
SANM_DEVICE double exp_minus(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5·2⁵²: adding it rounds to an integer
  constexpr double kSeries[] = {1.0,
                                1.0,
                                0.5000000000000018,
                                0.1666666666666617,
                                0.04166666666649277,
                                0.008333333333559272,
                                0.0013888888951224037,
                                0.0001984126943267626,
                                2.4801486521375963e-05,
                                2.7557622533559225e-06,
                                2.7632293297497174e-07,
                                2.4994304016107807e-08};
  const bool none = above(x, 708);
  x = none ? 708 : x;
  const double shifted = std::fma(-x, 1.4426950408889634, kShift), k = shifted - kShift;
  const double r = std::fma(k, -0.69314718055994531, -x);
  double sum = kSeries[11];
#pragma unroll
  for (int n = 10; n >= 0; --n) sum = std::fma(sum, r, kSeries[n]);
  const auto bits = [](double y) { return static_cast<uint64_t>(__double_as_longlong(y)); };
  const uint64_t power = bits(sum) + (bits(shifted) << 52);
  return none ? 0.0 : __longlong_as_double(static_cast<long long>(power));
}

// 1/x for 1 ≤ x ≤ 2: two Newton steps from an approximation of 23 bits.
SANM_DEVICE double reciprocal(double x) {
#ifdef SANM_CUDA_HOST
  return 1 / x;
#else
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = std::fma(y, std::fma(-x, y, 1.0), y);
  return std::fma(y, std::fma(-x, y, 1.0), y);
#endif
}

// ---- Moments about the means: Σr, Σr·d, Σr·d² of both components, d = x − mean.

SANM_DEVICE void add_moments(Sums& m, double r0, double r1, double d0, double d1) {
  const double first0 = r0 * d0, first1 = r1 * d1;
  m[0] += r0;
  m[1] += r1;
  m[2] += first0;
  m[3] += first1;
  m[4] = std::fma(first0, d0, m[4]);
  m[5] = std::fma(first1, d1, m[5]);
}

struct Mixture {
  double mean[2], variance[2], weight[2];
  double slope[2], level[2];  // log(w·N(y; m, v)) = level + slope·(y − m)²

  // The M-step, from moments (6,) about the means:
  //   m' = m + s,  v' = Σr·d²/R − s² + reg,  w' = R/ΣR  with  R = Σr + 10ε,  s = Σr·d/R.
  // By one warp, one lane per component.
  SANM_DEVICE void maximise(const double* moments, double reg) {
    const int k = lane() % 2;
    const double mass = moments[k] + kMassOffset, other = moments[1 - k] + kMassOffset;
    const double shift = moments[2 + k] / mass, w = mass / (mass + other);
    const double v = moments[4 + k] / mass - shift * shift + reg;
    if (lane() >= 2) return;
    mean[k] += shift;
    variance[k] = v;
    weight[k] = w;
    slope[k] = -0.5 / v;
    level[k] = log(w) - 0.5 * log(2 * 3.14159265358979323846 * v);
  }
};

// Replaces NaN by 0 and infinities by the largest finite numbers.
SANM_DEVICE double finite(double x) {
  return x == x ? Min()(Max()(x, -kLargest), kLargest) : 0.0;
}

}  // namespace
}  // namespace sanm
