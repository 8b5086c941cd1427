// Copies by non-temporal stores, which bypass the caches and do not read the line they overwrite.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sanm {

// Outputs of this size or more are streamed, that is written by non-temporal stores; smaller ones
// stay in the cache, where they are read next.
constexpr int64_t kStreamBytes = 1 << 20;

#if defined(__AVX512F__)
typedef __m512i Block;
inline Block load_block(const char* p) { return _mm512_loadu_si512(p); }
inline void stream_block(char* p, Block b) { _mm512_stream_si512(reinterpret_cast<Block*>(p), b); }
#elif defined(__AVX2__)
typedef __m256i Block;
inline Block load_block(const char* p) {
  return _mm256_loadu_si256(reinterpret_cast<const Block*>(p));
}
inline void stream_block(char* p, Block b) { _mm256_stream_si256(reinterpret_cast<Block*>(p), b); }
#elif defined(__SSE2__)
typedef __m128i Block;
inline Block load_block(const char* p) {
  return _mm_loadu_si128(reinterpret_cast<const Block*>(p));
}
inline void stream_block(char* p, Block b) { _mm_stream_si128(reinterpret_cast<Block*>(p), b); }
#else
typedef long long Block __attribute__((vector_size(16)));
inline Block load_block(const char* p) { Block b; std::memcpy(&b, p, sizeof b); return b; }
inline void stream_block(char* p, Block b) { std::memcpy(p, &b, sizeof b); }
#endif

constexpr int64_t kBlock = sizeof(Block);

inline void store_block(char* p, Block b) { std::memcpy(p, &b, sizeof b); }

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kBlock == 0; }

// n bytes from src to dst, streamed where dst is aligned, if `stream`.
inline void copy_bytes(char* dst, const char* src, int64_t n, bool stream) {
  if (!stream || (n < 4 * kBlock && !(aligned(dst) && n % kBlock == 0))) {
    std::memcpy(dst, src, n);
    return;
  }
  const int64_t head = (kBlock - reinterpret_cast<uintptr_t>(dst) % kBlock) % kBlock;
  std::memcpy(dst, src, head);
  int64_t i = head;
  for (; i + kBlock <= n; i += kBlock) stream_block(dst + i, load_block(src + i));
  std::memcpy(dst + i, src + i, n - i);
}

// n bytes from src to two destinations, read once.
inline void copy_bytes_twice(char* a, char* b, const char* src, int64_t n, bool stream) {
  if (!stream || !aligned(a) || !aligned(b)) {
    copy_bytes(a, src, n, stream);
    copy_bytes(b, src, n, stream);
    return;
  }
  int64_t i = 0;
  for (; i + 2 * kBlock <= n; i += 2 * kBlock) {
    const Block x = load_block(src + i), y = load_block(src + i + kBlock);
    stream_block(a + i, x);
    stream_block(a + i + kBlock, y);
    stream_block(b + i, x);
    stream_block(b + i + kBlock, y);
  }
  std::memcpy(a + i, src + i, n - i);
  std::memcpy(b + i, src + i, n - i);
}

// Replaces the bits of a copy by those of `fill` where `mask` has ones.
struct Overlay {
  const char *fill, *mask;

  Block over(Block source, int64_t i) const {
    const Block m = load_block(mask + i);
    return (source & ~m) | (load_block(fill + i) & m);
  }
};

// n bytes from src to dst under an overlay; no buffers overlap. A head or tail shorter than a block
// is stored as part of a whole block, which writes some bytes twice.
inline void overlay_bytes(char* dst, const char* src, const Overlay& with, int64_t n, bool stream) {
  if (n < kBlock) {
    for (int64_t i = 0; i < n; ++i)
      dst[i] = static_cast<char>((src[i] & ~with.mask[i]) | (with.fill[i] & with.mask[i]));
    return;
  }
  const auto at = [&](int64_t i) { return with.over(load_block(src + i), i); };
  int64_t i = 0;
  if (stream) {
    i = (kBlock - reinterpret_cast<uintptr_t>(dst) % kBlock) % kBlock;
    if (i > 0) store_block(dst, at(0));
    for (; i + kBlock <= n; i += kBlock) stream_block(dst + i, at(i));
  } else {
    for (; i + kBlock <= n; i += kBlock) store_block(dst + i, at(i));
  }
  if (i < n) store_block(dst + n - kBlock, at(n - kBlock));
}

// `rows` rows of n bytes from src to two destinations, read once, each row under the same overlays.
inline void overlay_rows_twice(char* a, char* b, const char* src, const Overlay with[2], int64_t n,
                               int64_t rows, bool stream) {
  const bool whole = stream && aligned(a) && aligned(b) && n % kBlock == 0;
  for (; rows > 0; --rows, a += n, b += n, src += n) {
    for (int64_t i = 0; whole && i < n; i += kBlock) {
      const Block source = load_block(src + i);
      stream_block(a + i, with[0].over(source, i));
      stream_block(b + i, with[1].over(source, i));
    }
    if (whole) continue;
    overlay_bytes(a, src, with[0], n, stream);
    overlay_bytes(b, src, with[1], n, stream);
  }
}

// Orders non-temporal stores before the thread's later stores.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace sanm
