// What every CPU kernel file needs: results, value checks, and how far to split a loop.
//
// Each kernel file is compiled once per instruction set (see setup.py) into a library of its own,
// so nothing compiled for one instruction set can be linked into another. The flags forbid the
// compiler to contract a*b+c: where a fused multiply-add is wanted it is written std::fma.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "arguments.h"
#include "cpu/memory.h"
#include "cpu/stream.h"

namespace sanm {

// Work items per thread below which a loop stays on one thread: about 32k elements each.
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

// work(i) for every item i < n, `part` of them at a time; each thread that takes part in it has a `work`
// of its own from make_work(). A thread begins with the items that torch's split gives it, which lie
// beside each other, and goes on with what the others have not begun: one that was woken late, or that
// shares its core, does not keep the rest waiting.
template <typename MakeWork>
inline void share_out(int64_t n, int64_t part, const MakeWork& make_work) {
  constexpr int64_t kMostParts = 1024;
  struct alignas(64) Begun {  // a cache line each: neighbours may be other threads'
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

// The index at x, read once: another thread may have changed it since it was checked.
inline int64_t index_below(const int64_t* x, int64_t size) {
  const int64_t i = *const_cast<const volatile int64_t*>(x);
  return std::clamp<int64_t>(i, 0, size - 1);
}

}  // namespace sanm
