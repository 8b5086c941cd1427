// What every CPU kernel file needs: allocation, value checks, parallel loops.
//
// Each kernel file is compiled once per instruction set (see csrc/libraries.py), into a library per
// instruction set, so that no code of one can be linked into another. The flags forbid contraction
// of a*b+c: fused multiply-adds are explicit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "arguments.h"
#include "cpu/memory.h"
#include "cpu/stream.h"

namespace sanm {

// Grain size of parallel_for, in work items: about 32k elements.
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

// work(i) for every item i < n, scheduled dynamically, at least `part` items at a time; each thread
// has its own `work` from make_work(). A thread starts with the contiguous parts that parallel_for
// assigns to it and then takes parts that no other thread has started: a thread that wakes up late
// or shares its core does not delay the others.
template <typename MakeWork>
inline void share_out(int64_t n, int64_t part, const MakeWork& make_work) {
  constexpr int64_t kMostParts = 1024;
  struct alignas(64) Begun {  // a cache line each, against false sharing
    std::atomic<bool> by_someone{false};
  };
  part = std::max(part, (n + kMostParts - 1) / kMostParts);
  const int64_t parts = (n + part - 1) / part;
  std::vector<Begun> begun(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t) {
    std::optional<decltype(make_work())> work;
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t p = (first + k) % parts;
      std::atomic<bool>& taken = begun[p].by_someone;
      if (taken.load(std::memory_order_relaxed) || taken.exchange(true, std::memory_order_relaxed))
        continue;
      if (!work) work.emplace(make_work());
      for (int64_t i = p * part; i < std::min(n, (p + 1) * part); ++i) (*work)(i);
    }
    stream_fence();
  });
}

// Every index lies in [0, size) or equals `ignore`.
inline void check_indices(const int64_t* x, int64_t n, int64_t size, const char* name,
                          std::optional<int64_t> ignore = std::nullopt) {
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < n; ++i)
    outside |= static_cast<uint64_t>(x[i]) >= static_cast<uint64_t>(size);
  for (int64_t i = 0; outside && i < n; ++i) {
    const int64_t index = x[i];
    if ((index < 0 || index >= size) && !(ignore && index == *ignore))
      value_error(name, ": expected indices in [0, ", size, "), got ", index, " at index [", i, "]");
  }
}

// The index at x, read once and clamped: another thread may have changed it since it was checked.
inline int64_t index_below(const int64_t* x, int64_t size) {
  const int64_t i = *const_cast<const volatile int64_t*>(x);
  return std::clamp<int64_t>(i, 0, size - 1);
}

}  // namespace sanm
