// One-dimensional two-component Gaussian mixture: each pass over samples yields a few sums, which
// are all that `update` needs. Passes are plain functions with arguments by value (captures of a
// lambda would prevent vectorisation) over one block of samples y (n,) in A.
#pragma once

#include <array>
#include <limits>

#include "cpu/common.h"
#include "cpu/softmax.h"

namespace sanm {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kMassOffset = 10 * std::numeric_limits<double>::epsilon();  // scikit-learn's
// A fit is degenerate with less mass in a component, or with a standard deviation or a distance
// between the means below this fraction of the range.
constexpr double kMinMass = 0.5;
constexpr double kMinDeviation = 1e-6;

using Two = std::array<double, 2>;  // per component

struct Mixture {
  Two mean{}, variance{}, weight{};
  // Both variances are positive and finite, not NaN: the densities exist.
  bool proper() const {
    return variance[0] > 0 && variance[1] > 0 && std::max(variance[0], variance[1]) < kInfinity;
  }
  // The fit to n samples that span [0, 1] is not degenerate.
  bool sound(int64_t n) const {
    return proper() && std::abs(mean[0] - mean[1]) > kMinDeviation &&
           std::min(weight[0], weight[1]) * n >= kMinMass &&
           std::min(variance[0], variance[1]) > kMinDeviation * kMinDeviation;
  }
};

template <size_t N>
struct Sums : std::array<double, N> {
  void operator+=(const Sums& o) {
    for (size_t k = 0; k < N; ++k) (*this)[k] += o[k];
  }
};

// Per component Σr, Σr·(y − c), Σr·(y − c)² about a centre c; Σ log-likelihood.
struct Moments {
  Two mass{}, first{}, second{};
  double log_sum = 0;
  void operator+=(const Moments& o) {
    for (int k = 0; k < 2; ++k) {
      mass[k] += o.mass[k];
      first[k] += o.first[k];
      second[k] += o.second[k];
    }
    log_sum += o.log_sum;
  }
};

struct Range {
  double low = kInfinity, high = -kInfinity;
  bool finite = true;
  void operator+=(const Range& o) {
    low = std::min(low, o.low);
    high = std::max(high, o.high);
    finite = finite && o.finite;
  }
};

// Minimum and maximum, ignoring NaN; any NaN or infinity clears `finite`.
template <typename T>
Range range_pass(const T* x, int64_t n) {
  using A = acc_t<T>;
  A low = std::numeric_limits<A>::infinity(), high = -low;
  A poison = 0;  // 0·x is NaN for an x that is not finite
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : poison)
  for (int64_t i = 0; i < n; ++i) {
    const A v = static_cast<A>(x[i]);
    low = v < low ? v : low;
    high = v > high ? v : high;
    poison += 0 * v;
  }
  Range r;
  r.low = low, r.high = high, r.finite = poison == 0;
  return r;
}

// Σ(y − c), Σ(y − c)²
template <typename A>
Sums<2> deviations_pass(const A* y, int64_t n, double c) {
  double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < n; ++i) {
    const double d = y[i] - c;
    first += d;
    second += d * d;
  }
  return {{first, second}};
}

// Σ min((y − c)², (y − c1)²) and the same with c2
template <typename A>
Sums<2> potentials_pass(const A* y, int64_t n, A c, A c1, A c2) {
  A p1 = 0, p2 = 0;
#pragma omp simd reduction(+ : p1, p2)
  for (int64_t i = 0; i < n; ++i) {
    const A d = (y[i] - c) * (y[i] - c), d1 = (y[i] - c1) * (y[i] - c1),
            d2 = (y[i] - c2) * (y[i] - c2);
    p1 += std::min(d, d1);
    p2 += std::min(d, d2);
  }
  return {{p1, p2}};
}

// The number of y < t, their Σ(y − t), and Σ(y − t) of the others: by minima and maxima, because
// the compiler turns conditional sums into slow blends.
template <typename A>
Sums<3> split_pass(const A* y, int64_t n, A t) {
  int32_t mass = 0;
  A below = 0, above = 0;
#pragma omp simd reduction(+ : mass, below, above)
  for (int64_t i = 0; i < n; ++i) {
    const A d = y[i] - t;
    mass += d < 0;
    below += std::min(d, A(0));
    above += std::max(d, A(0));
  }
  return {{static_cast<double>(mass), below, above}};
}

// Moments of the samples y < t about c0 and of the others about c1
template <typename A>
Moments split_moments_pass(const A* y, int64_t n, A t, A c0, A c1) {
  A mass = 0, first0 = 0, first1 = 0, second0 = 0, second1 = 0;
#pragma omp simd reduction(+ : mass, first0, first1, second0, second1)
  for (int64_t i = 0; i < n; ++i) {
    const A low = y[i] < t ? A(1) : A(0), d0 = low * (y[i] - c0), d1 = (1 - low) * (y[i] - c1);
    mass += low;
    first0 += d0;
    first1 += d1;
    second0 += d0 * d0;
    second1 += d1 * d1;
  }
  return {{mass, n - static_cast<double>(mass)}, {first0, first1}, {second0, second1}};
}

// log(w·N(y; m, v)) = level + slope·(y − m)²
template <typename A>
struct LogDensity {
  A mean, slope, level;
  LogDensity(const Mixture& p, int k)
      : mean(static_cast<A>(p.mean[k])),
        slope(static_cast<A>(-0.5 / p.variance[k])),
        level(static_cast<A>(std::log(p.weight[k]) -
                             0.5 * std::log(2 * 3.14159265358979323846 * p.variance[k]))) {}
  A at(A y) const { return slope * (y - mean) * (y - mean) + level; }
};

// log(1 + e) for e in [0, 1]: 2·artanh(e/(2 + e)) by its series, within 1e-7.
inline float log1p_unit(float e) {
  const float s = e / (2 + e), q = s * s;
  return 2 * s * (1 + q * (1.f / 3 + q * (1.f / 5 + q * (1.f / 7 + q * (1.f / 9 + q / 11)))));
}
inline double log1p_unit(double e) { return std::log1p(e); }

// The E-step's moments about the means, each sample counted w[i] times (once without w):
// responsibilities 1/(1 + e^(l0 − l1)) and log-likelihood log(e^l0 + e^l1) from the log densities,
// with e = e^−|l0 − l1| ≤ 1.
template <bool kWeighted, typename A>
Moments expectation_pass(const A* y, [[maybe_unused]] const A* w, int64_t n, LogDensity<A> low,
                         LogDensity<A> high) {
  A mass0 = 0, mass1 = 0, first0 = 0, first1 = 0, second0 = 0, second1 = 0, log_sum = 0;
#pragma omp simd reduction(+ : mass0, mass1, first0, first1, second0, second1, log_sum)
  for (int64_t i = 0; i < n; ++i) {
    const A l0 = low.at(y[i]), l1 = high.at(y[i]), d0 = y[i] - low.mean, d1 = y[i] - high.mean;
    const A e = exp_nonpositive(-std::abs(l1 - l0)), likelier = 1 / (1 + e);
    A weight = 1;
    if constexpr (kWeighted) weight = w[i];
    const A r0 = weight * (l1 > l0 ? e * likelier : likelier);
    const A r1 = weight * (l1 > l0 ? likelier : e * likelier);
    mass0 += r0;
    mass1 += r1;
    first0 += r0 * d0;
    first1 += r1 * d1;
    second0 += r0 * d0 * d0;
    second1 += r1 * d1 * d1;
    log_sum += weight * ((l1 > l0 ? l1 : l0) + log1p_unit(e));
  }
  return {{mass0, mass1}, {first0, first1}, {second0, second1}, log_sum};
}

// clean (n,) = the posterior of the component `low`; may be in-place.
template <typename A, typename O>
void posterior_pass(const A* y, int64_t n, LogDensity<A> low, LogDensity<A> high, O* clean) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A odds = high.at(y[i]) - low.at(y[i]);
    const A e = exp_nonpositive(-std::abs(odds)), likelier = 1 / (1 + e);
    clean[i] = static_cast<O>(odds > 0 ? e * likelier : likelier);
  }
}

// The M-step, from moments about `centre`.
inline Mixture update(const Moments& m, const Two& centre, double reg) {
  Mixture p;
  for (int k = 0; k < 2; ++k) {
    const double mass = m.mass[k] + kMassOffset, shift = m.first[k] / mass;
    p.mean[k] = centre[k] + shift;
    p.variance[k] = m.second[k] / mass - shift * shift + reg;
    p.weight[k] = mass;
  }
  const double total = p.weight[0] + p.weight[1];
  for (double& w : p.weight) w /= total;
  return p;
}

}  // namespace sanm
