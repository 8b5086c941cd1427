// SIMD vectors of float: GCC vector types, so that one source serves every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sanm {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <int N>
using Vec = typename VectorOf<float, N>::type;

template <int N>
inline Vec<N> load(const float* p) {
  Vec<N> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int N>
inline Vec<N> load(const BFloat16* p) {
  using Bits = typename VectorOf<uint16_t, N>::type;
  using Wide = typename VectorOf<uint32_t, N>::type;
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  const Wide wide = __builtin_convertvector(bits, Wide) << 16;
  Vec<N> v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

template <int N>
inline Vec<N> load(const Half* p) {
  Vec<N> v;
#if defined(__F16C__)
  for (int k = 0; k < N; k += 8) {
    const __m256 part =
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k)));
    std::memcpy(reinterpret_cast<float*>(&v) + k, &part, sizeof part);
  }
#else
  for (int k = 0; k < N; ++k) v[k] = static_cast<float>(p[k]);
#endif
  return v;
}

// Prefetches the cache line `ahead` bytes on, by default on the next page: the hardware prefetcher
// stops at the end of a page.
inline void prefetch(const void* p, int64_t ahead = 4096) {
  __builtin_prefetch(static_cast<const char*>(p) + ahead);
}

}  // namespace sanm
