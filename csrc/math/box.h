// Section 2 of the method: ratio and box of one view.
#pragma once

#include "math/hd.h"

namespace sanm {

// The scalars of a MaskConfig: `Settings` of sanm_kernels/reference/masked_forward.py.
struct Settings {
  int64_t views;  // 1: max, 2: min, 3: both
  bool shared, centered, quantize, clamp;
  int64_t fill;
  double area_scale, ratio_low, ratio_high, ratio_gamma, aspect_low, aspect_high;

  SANM_HD int view_count() const { return views == 3 ? 2 : 1; }
  SANM_HD int draw_sets() const { return shared ? 1 : view_count(); }
};

enum Fill { kConstant = 0, kUniform = 1, kMean = 2, kPixel = 3 };

struct Size {
  int height, width;
};

// r = a + γ·(1 − q): a is interpolated in float64 and rounded, the rest is float32.
SANM_HD float mask_ratio(const Settings& s, double draw, float clean_prob) {
  const float a = static_cast<float>(s.ratio_low + (s.ratio_high - s.ratio_low) * draw);
  const float guided = static_cast<float>(s.ratio_gamma) * (1.0f - clean_prob);
  return a + guided;
}

SANM_HD int side(float square, int limit) {
  const double root = nearbyint(sqrt(static_cast<double>(square)));  // ties to even
  return !(root >= 1) ? 1 : root > limit ? limit : static_cast<int>(root);  // 1 for NaN too
}

// height = round(√(A·s)), width = round(√(A/s)), A = κ·r·H·W: float32 except for the root.
SANM_HD Size box_size(const Settings& s, float ratio, double draw, int H, int W) {
  const float aspect = static_cast<float>(s.aspect_low + (s.aspect_high - s.aspect_low) * draw);
  float area = ratio * static_cast<float>(static_cast<double>(H) * W);
  area = area * static_cast<float>(s.area_scale);
  return {side(area * aspect, H), side(area / aspect, W)};
}

// First row (or column) of a box of this size at the given peak, shifted to lie inside the image.
SANM_HD int corner(int peak, int size, int limit, bool centered) {
  int low = centered ? peak - size / 2 : peak;
  low = low < 0 ? 0 : low;
  return low < limit - size ? low : limit - size;
}

// Fraction of cell `cell`, of `cells` cells over `size` pixels, that the pixels [low, high) cover.
template <typename A>
SANM_HD A overlap(int low, int high, int64_t cell, int64_t cells, int64_t size) {
  const A step = static_cast<A>(static_cast<double>(size) / cells);
  const A first = cell * step, last = (cell + 1) * step;
  const A top = high < last ? static_cast<A>(high) : last;
  const A bottom = low > first ? static_cast<A>(low) : first;
  return top > bottom ? (top - bottom) / step : A{0};
}

}  // namespace sanm
