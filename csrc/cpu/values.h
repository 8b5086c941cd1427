// Checks and preparations of arguments that more than one kernel needs.
#pragma once

#include "cpu/common.h"

namespace sanm {

inline std::optional<Tensor> packed(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(packed(*x)) : std::nullopt;
}

// Every element of x (n) lies in [0, 1]; NaN does not.
template <typename T>
inline void check_unit_interval(const T* x, int64_t n, const char* name) {
  for (int64_t i = 0; i < n; ++i)
    if (!(x[i] >= 0 && x[i] <= 1))
      value_error(name, ": expected values in [0, 1], got ", static_cast<double>(x[i]),
                  " at index [", i, "]");
}

}  // namespace sanm
