// Section 1 of the method from the energy map on: statistics, peak and trough.
#pragma once

#include "cpu/vector.h"
#include "math/resize.h"

namespace sanm {

// e (n) → maximum, minimum, mean, standard deviation, normalised entropy at stats[k·stride].
template <typename A>
inline void statistics(const A* e, int64_t n, A* stats, int64_t stride) {
  A high = e[0], low = e[0];
  double total = 0, square = 0, entropy = 0;
  bool nan = false;
  for (int64_t k = 0; k < n; ++k) {
    high = e[k] > high ? e[k] : high;
    low = e[k] < low ? e[k] : low;
    total += e[k];
    nan |= e[k] != e[k];
  }
  const A sum = static_cast<A>(total), mean = sum / static_cast<A>(n);
  for (int64_t k = 0; k < n; ++k) {
    const A p = e[k] / sum;
    square += (e[k] - mean) * (e[k] - mean);
    if (p != 0) entropy -= p * std::log(p);
  }
  entropy = n == 1 || sum == 0 ? 1 : entropy / std::log(static_cast<double>(n));
  const A values[5] = {nan ? sum : high, nan ? sum : low, mean,
                       static_cast<A>(std::sqrt(square / n)), static_cast<A>(entropy)};
  for (int k = 0; k < 5; ++k) stats[k * stride] = values[k];
}

// e / max(‖e‖₂, 1e-12) in place: eight interleaved partial sums of rounded products, added in
// order, then the tail by fused multiply-add.
inline void normalize(float* e, int64_t n) {
  float lanes[8] = {};
  const int64_t whole = n - n % 8;
  for (int64_t k = 0; k < whole; k += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += e[k + l] * e[k + l];
  float total = lanes[0];
  for (int l = 1; l < 8; ++l) total += lanes[l];
  for (int64_t k = whole; k < n; ++k) total = fmaf(e[k], e[k], total);
  const float norm = std::max(std::sqrt(total), 1e-12f);
  for (int64_t k = 0; k < n; ++k) e[k] /= norm;
}

struct Positions {
  int peak[2] = {0, 0}, trough[2] = {0, 0};  // row, column
};

// Finds the first largest and the first smallest pixel of the upsampled map U (H, W) of E (h, w)
// without storing U: working memory is h·W.
//
// Rows of E are interpolated horizontally once. Between two of them, rows y of U share their cells
// and differ in the fraction t only, which grows with y. fma(b − a, t, a) is monotone in t, so over
// such a segment every column has its extremes at the segment's ends, and U has its extremes on
// rows that end a segment. The quantisation is monotone too: a pixel qualifies as peak if its level
// is that of max U. If the first row of a segment has no such pixel, only columns that grow with y
// can come to qualify, and they stay so: the rows that have one are the end of the segment, and the
// first of them is found by bisection.
class Locator {
 public:
  Locator(int64_t h, int64_t w, int64_t H, int64_t W, bool quantize)
      : h_(h), w_(w), H_(H), W_(W), quantize_(quantize), columns_(W), rows_(H), across_(h * W) {
    for (int64_t x = 0; x < W; ++x) columns_[x] = tap(x, w, W);
    for (int64_t y = 0; y < H; ++y) {
      rows_[y] = tap(y, h, H);
      if (y == 0 || rows_[y].left != rows_[y - 1].left) starts_.push_back(y);
    }
    starts_.push_back(H);
  }

  // What one keeps; none where their number does not fit into 64 bits.
  static std::optional<int64_t> bytes(int64_t h, int64_t H, int64_t W) {
    const int64_t across[2] = {h, W}, taps = static_cast<int64_t>(sizeof(Tap)) * (H + W);
    std::optional<int64_t> sum = dense_bytes(across, 2, ScalarType::Float);
    if (sum && __builtin_add_overflow(*sum, taps, &*sum)) sum.reset();
    return sum;
  }

  // e (h, w), overwritten.
  Positions find(float* e) {
    for (int64_t k = 0; k < h_ * w_; ++k)
      if (!std::isfinite(e[k])) return {};
    if (quantize_) normalize(e, h_ * w_);
    for (int64_t r = 0; r < h_; ++r)
      for (int64_t x = 0; x < W_; ++x)
        across_[r * W_ + x] =
            lerp_fused(e[r * w_ + columns_[x].left], e[r * w_ + columns_[x].right], columns_[x].t);
    low_ = INFINITY;
    high_ = -INFINITY;
    for (size_t s = 0; s + 1 < starts_.size(); ++s)
      for (const int64_t y : {starts_[s], starts_[s + 1] - 1}) {
        const auto [low, high] = extremes(y);
        low_ = std::min(low_, low);
        high_ = std::max(high_, high);
      }
    range_ = (high_ - low_) + 1e-12f;
    Positions found;
    first(true, found.peak);
    first(false, found.trough);
    return found;
  }

 private:
  float value(int64_t y, int64_t x) const {
    const Tap& tap = rows_[y];
    return lerp_fused(across_[tap.left * W_ + x], across_[tap.right * W_ + x], tap.t);
  }

  // Smallest and largest value of row y.
  std::pair<float, float> extremes(int64_t y) const {
    const Tap& tap = rows_[y];
    const float *a = &across_[tap.left * W_], *b = &across_[tap.right * W_];
    float low = INFINITY, high = -INFINITY;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t x = 0; x < W_; ++x) {
      const float u = lerp_fused(a[x], b[x], tap.t);
      low = u < low ? u : low;
      high = u > high ? u : high;
    }
    return {low, high};
  }

  float level(float u) const {
    return quantize_ ? std::floor((255.0f * (u - low_)) / range_) : u;
  }

  bool qualifies(int64_t y, bool peak) const {
    const auto [low, high] = extremes(y);
    return peak ? level(high) == level(high_) : level(low) == level(low_);
  }

  // First pixel in row-major order at the level of the maximum (peak) or of the minimum.
  void first(bool peak, int position[2]) const {
    int64_t y = 0;
    for (size_t s = 0; s + 1 < starts_.size(); ++s) {
      int64_t begin = starts_[s], end = starts_[s + 1] - 1;
      if (qualifies(begin, peak)) {
        y = begin;
        break;
      }
      if (!qualifies(end, peak)) continue;
      while (end - begin > 1) {  // begin does not qualify, end does
        const int64_t middle = (begin + end) / 2;
        (qualifies(middle, peak) ? end : begin) = middle;
      }
      y = end;
      break;
    }
    const float wanted = level(peak ? high_ : low_);
    int64_t x = 0;
    while (x + 1 < W_ && level(value(y, x)) != wanted) ++x;
    position[0] = static_cast<int>(y);
    position[1] = static_cast<int>(x);
  }

  int64_t h_, w_, H_, W_;
  bool quantize_;
  std::vector<Tap> columns_, rows_;
  std::vector<int64_t> starts_;  // rows at which a segment begins, and H
  std::vector<float> across_;    // (h, W)
  float low_ = 0, high_ = 0, range_ = 1;
};

}  // namespace sanm
