// Bilinear upsampling from n cells to N pixels: half-pixel centres, edge clamp, no antialiasing.
#pragma once

#include "math/hd.h"

namespace sanm {

struct Tap {
  int left, right;  // cells between which the pixel lies
  float t;          // weight of the right one
};

SANM_HD Tap tap(int pixel, int n, int N) {
  const double x = (pixel + 0.5) * (static_cast<double>(n) / N) - 0.5;
  const double cell = floor(x);
  if (cell < 0) return {0, n > 1 ? 1 : 0, 0.0f};
  if (cell >= n - 1) return {n - 1, n - 1, 0.0f};
  return {static_cast<int>(cell), static_cast<int>(cell) + 1, static_cast<float>(x - cell)};
}

// Interpolation with a single rounding, used along both axes, horizontally first.
SANM_HD float lerp_fused(float a, float b, float t) { return fmaf(b - a, t, a); }

}  // namespace sanm
