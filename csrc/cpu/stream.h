// Copies that bypass the cache: stores which need not read the line they overwrite first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sanm {

// Outputs from this size on are streamed; smaller ones stay in the cache for whoever reads them.
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
struct Block { char bytes[16]; };
inline Block load_block(const char* p) { Block b; std::memcpy(&b, p, sizeof b); return b; }
inline void stream_block(char* p, Block b) { std::memcpy(p, &b, sizeof b); }
#endif

constexpr int64_t kBlock = sizeof(Block);

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kBlock == 0; }

// n bytes from src to dst, streamed where `stream` and dst's alignment allow.
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

// n bytes from src to two places, read once.
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

// Orders streamed stores before whatever the thread does next.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace sanm
