// Runs of numbers converted between any floating dtype and the type that sums are taken in.
#pragma once

#include "cpu/vector.h"

namespace sanm {

// How many half-precision numbers are widened at a time: one register of floats.
#if defined(__AVX__)
constexpr int kWidened = 8;
#else
constexpr int kWidened = 4;
#endif

// So many buffers of a padded row each, from the start of a cache line on.
template <typename A>
class Rows {
 public:
  Rows(int64_t count, int64_t width)
      : step_((width + 15) / 16 * 16), memory_(count * step_ + 64 / sizeof(A)),
        first_(memory_.data() +
               (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64 / sizeof(A)) {}
  A* operator[](int64_t row) const { return first_ + row * step_; }

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

// The same for a whole row of `width` numbers, a multiple of 16: those from K on are `pad`.
template <typename T, typename A, typename Size>
inline void widen_padded(const T* __restrict x, int64_t stride, int64_t K, A pad, Size width,
                         A* __restrict out) {
#if defined(__AVX2__)
  // Short rows by masked loads, and stored in one vector as it is loaded later: a load that spans
  // several stores waits until they are in the cache.
  if constexpr (std::is_same_v<T, float> && std::is_same_v<A, float>) {
    if (width == 16 && stride == 1) {
#if defined(__AVX512F__)
      const __mmask16 mask = static_cast<__mmask16>((1u << K) - 1);
      _mm512_storeu_ps(out, _mm512_mask_loadu_ps(_mm512_set1_ps(pad), mask, x));
#else
      const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      for (int k = 0; k < 16; k += 8) {
        const __m256i mask =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(K) - k), index);
        const __m256 row = _mm256_maskload_ps(x + k, mask);
        _mm256_storeu_ps(out + k, _mm256_blendv_ps(_mm256_set1_ps(pad), row,
                                                   _mm256_castsi256_ps(mask)));
      }
#endif
      return;
    }
  }
#endif
  widen(x, stride, K, out);
  for (int64_t k = K; k < width; ++k) out[k] = pad;
}

// A row of K numbers as A, padded: the row itself if it is that, else its copy in `buffer`.
template <typename T, typename A, typename Size>
inline const A* padded_row(const T* x, int64_t K, A pad, Size width, A* buffer) {
  if constexpr (std::is_same_v<T, A>)
    if (K == width) return x;
  widen_padded(x, 1, K, pad, width, buffer);
  return buffer;
}

// widen_padded from element `offset` of a tensor of any floating dtype.
template <typename A, typename Size>
inline void widen_padded(const void* x, ScalarType type, int64_t offset, int64_t stride, int64_t K,
                         A pad, Size width, A* out) {
  dispatch(type, [&](auto zero) {
    widen_padded(static_cast<const decltype(zero)*>(x) + offset, stride, K, pad, width, out);
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
