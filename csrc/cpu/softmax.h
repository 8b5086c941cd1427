// Row-wise softmax building blocks, written so that the compiler vectorises them.
#pragma once

#include <limits>

#include "cpu/common.h"
#include "cpu/convert.h"

namespace sanm {

// What pads a row of logits: its e^x is 0.
template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

// The length of a padded row: whole vectors; of 8 where rows are long, so that most need no copy.
inline int64_t padded(int64_t K) {
  const int64_t lanes = K > 256 ? 8 : kLanes;
  return std::max<int64_t>(16, (K + lanes - 1) / lanes * lanes);
}

// A multiple of kLanes, as a type that tells the compiler so: its loops then have no tail.
struct Width {
  int64_t value;
  operator int64_t() const { return value & -kLanes; }
};
using ShortWidth = std::integral_constant<int64_t, 16>;

// Calls body(padded(K)); a constant for the shortest, so that a row is two vectors and no loop.
template <typename Body>
inline void with_width(int64_t K, const Body& body) {
  const int64_t width = padded(K);
  if (width == 16) body(ShortWidth{});
  else if (width % kLanes == 0) body(Width{width});
  else body(width);
}

// Rows per thread below which a loop stays on one thread; a row costs as much as some 32 elements
// besides its own.
inline int64_t row_grain(int64_t K) { return std::max<int64_t>(1, 16384 / (K + 32)); }

// a·b + c in one rounding where the processor can, else in two.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x ≤ 0, within 2 ulp, and 0 where it would be subnormal: x = n·ln2 + r, a degree-6
// polynomial in r, 2^n by its bits. Adding 1.5·2^23 rounds to an integer and leaves it in the low
// bits. Coefficients: the minimax fit of e^r on |r| ≤ ln2/2 that Cephes' expf publishes.
inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f, kLowest = -87.3f;
  const float clipped = x < kLowest ? kLowest : x;
  const float shifted = multiply_add(clipped, 1.44269504088896341f, kRound);
  const float n = shifted - kRound;
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, clipped));
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < kLowest ? 0.0f : p * scale;
}
inline double exp_nonpositive(double x) { return std::exp(x); }

// Lengths are int64_t, or types that tell the compiler more.
template <typename A, typename Size>
inline A row_max(const A* x, Size K) {
  A m = x[0];
#pragma omp simd reduction(max : m)
  for (int64_t k = 0; k < K; ++k) m = x[k] > m ? x[k] : m;
  return m;
}

// The first index of the largest of K values, by two passes that vectorise; 0 if NaN hides it.
template <typename A, typename Size>
inline int64_t row_argmax(const A* x, Size K) {
  const A m = row_max(x, K);
  const int32_t none = static_cast<int32_t>(K);
  int32_t top = none;
#pragma omp simd reduction(min : top)
  for (int32_t k = 0; k < none; ++k) {
    const int32_t here = x[k] == m ? k : none;
    top = here < top ? here : top;
  }
  return top < none ? top : 0;
}

// Σ_k e^{x_k − m}, m the largest x_k
template <typename A, typename Size>
inline A exp_sum(const A* x, Size K, A m) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < K; ++k) sum += exp_nonpositive(x[k] - m);
  return sum;
}

// log Σ_k e^{x_k}; the maximum is taken out first, so nothing overflows.
template <typename A>
inline A logsumexp(const A* x, int64_t K) {
  const A m = row_max(x, K);
  return m + std::log(exp_sum(x, K, m));
}

// x (K) → p (K) its softmax
template <typename A, typename Size>
inline void softmax(const A* __restrict x, Size K, A* __restrict p) {
  const A m = row_max(x, K);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < K; ++k) {
    const A e = exp_nonpositive(x[k] - m);
    p[k] = e;
    sum += e;
  }
  const A scale = 1 / sum;
  for (int64_t k = 0; k < K; ++k) p[k] *= scale;
}

// p_k = e^{x_k − logsumexp}
template <typename A>
inline void softmax(const A* x, int64_t K, A logsumexp, A* p) {
  for (int64_t k = 0; k < K; ++k) p[k] = exp_nonpositive(x[k] - logsumexp);
}

}  // namespace sanm
