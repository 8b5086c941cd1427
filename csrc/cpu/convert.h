// Arrays converted between any floating dtype and the accumulation type.
#pragma once

#include "cpu/vector.h"

namespace sanm {

// How many half-precision numbers are widened at a time: a 256-bit or 128-bit register of floats.
#if defined(__AVX__)
constexpr int kWidened = 8;
#else
constexpr int kWidened = 4;
#endif

// `count` buffers of a row each, aligned and padded to whole cache lines.
template <typename A>
class Rows {
 public:
  Rows(int64_t count, int64_t width)
      : step_((width + 15) / 16 * 16), memory_(count * step_ + 64 / sizeof(A)),
        first_(memory_.data() +
               (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64 / sizeof(A)) {}
  A* operator[](int64_t row) const { return first_ + row * step_; }
  int64_t step() const { return step_; }  // stride between rows, in elements

 private:
  const int64_t step_;
  std::vector<A> memory_;
  A* const first_;
};

// x (n), `stride` elements apart → out (n)
template <typename T, typename A>
inline void widen(const T* __restrict x, int64_t stride, int64_t n, A* __restrict out) {
  if (stride != 1) {
    for (int64_t k = 0; k < n; ++k) out[k] = static_cast<A>(x[k * stride]);
    return;
  }
  int64_t k = 0;
  if constexpr (std::is_same_v<A, float> && sizeof(T) == 2)
    for (; k + kWidened <= n; k += kWidened) {
      const Vec<kWidened> v = load<kWidened>(x + k);
      std::memcpy(out + k, &v, sizeof v);
    }
  for (; k < n; ++k) out[k] = static_cast<A>(x[k]);
}

// widen from element `offset` of a tensor of any floating dtype.
template <typename A>
inline void widen(const void* x, ScalarType type, int64_t offset, int64_t stride, int64_t n,
                  A* out) {
  dispatch(type, [&](auto zero) {
    widen(static_cast<const decltype(zero)*>(x) + offset, stride, n, out);
  });
}

// x (n) → out (n), rounded to nearest even
template <typename A, typename T>
inline void narrow(const A* __restrict x, int64_t n, T* __restrict out) {
  int64_t k = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, Half>)
    for (; k + 8 <= n; k += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k),
                       _mm256_cvtps_ph(_mm256_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; k < n; ++k) out[k] = static_cast<T>(x[k]);
}

}  // namespace sanm
