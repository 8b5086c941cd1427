// What every CPU kernel file needs: results, value checks, and how far to split a loop.
//
// Each kernel file is compiled once per instruction set (see setup.py) into a library of its own,
// so nothing compiled for one instruction set can be linked into another. The flags forbid the
// compiler to contract a*b+c: where a fused multiply-add is wanted it is written std::fma.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "arguments.h"
#include "cpu/memory.h"

namespace sanm {

// Work items per thread below which a loop stays on one thread: about 32k elements each.
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
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
