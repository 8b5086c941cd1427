// Checks of values that several kernels need.
#pragma once

#include <string>

#include "cpu/common.h"

namespace sanm {

// The index of element i in a tensor of so many columns: "[i]", or "[row, column]".
inline std::string place_of(int64_t i, int64_t columns) {
  const std::string last = std::to_string(i % std::max<int64_t>(columns, 1));
  return columns == 1 ? "[" + std::to_string(i) + "]"
                      : "[" + std::to_string(i / columns) + ", " + last + "]";
}

// Every element of x (n) lies in [0, 1], or in [0, 1) if `open_end`; NaN does not.
template <typename T>
inline void check_unit_interval(const T* x, int64_t n, const char* name, int64_t columns = 1,
                                bool open_end = false) {
  const auto inside = [open_end](acc_t<T> v) {
    return (v >= 0) & (v <= 1) & !(open_end & (v == 1));
  };
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < n; ++i) outside |= !inside(static_cast<acc_t<T>>(x[i]));
  for (int64_t i = 0; outside && i < n; ++i) {
    const auto v = static_cast<acc_t<T>>(x[i]);
    if (!inside(v))
      value_error(name, ": expected values in ", open_end ? "[0, 1)" : "[0, 1]", ", got ",
                  static_cast<double>(v), " at index ", place_of(i, columns));
  }
}

struct Box {
  int64_t y0, x0, y1, x1;
};

// Boxes (n, 4), B per view, each inside an image of H×W: a copy, which no other thread can change.
template <typename I>
inline std::vector<Box> checked_boxes(const I* corners, int64_t n, int64_t B, int64_t H,
                                      int64_t W) {
  std::vector<Box> boxes;
  boxes.reserve(n);
  for (int64_t i = 0; i < n; ++i, corners += 4) {
    volatile const I* const once = corners;
    const Box b{once[0], once[1], once[2], once[3]};
    if (!(0 <= b.y0 && b.y0 <= b.y1 && b.y1 <= H && 0 <= b.x0 && b.x0 <= b.x1 && b.x1 <= W))
      value_error("boxes: expected 0 ≤ y0 ≤ y1 ≤ ", H, " and 0 ≤ x0 ≤ x1 ≤ ", W, ", got [", b.y0,
                  ", ", b.x0, ", ", b.y1, ", ", b.x1, "] at index [", i / B, ", ", i % B, "]");
    boxes.push_back(b);
  }
  return boxes;
}

// No element of x (n) is NaN or infinite: x − x would be NaN.
template <typename T>
inline void check_finite(const T* x, int64_t n, const char* name, int64_t columns = 1) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<acc_t<T>>(x[i]);
    sum += v - v;
  }
  if (sum == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<double>(static_cast<acc_t<T>>(x[i]));
    if (!std::isfinite(v))
      value_error(name, ": expected finite values, got ",
                  std::isnan(v) ? "nan" : v > 0 ? "inf" : "-inf", " at index ",
                  place_of(i, columns));
  }
}

}  // namespace sanm
