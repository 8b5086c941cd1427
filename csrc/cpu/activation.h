// Section 1 of the method, after the energy map: statistics, peak and trough.
#pragma once

#include "cpu/pack.h"
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

// Finds the first maximum and the first minimum of the upsampled map U (H, W) of E (h, w) without
// storing U: working memory is h·W.
//
// Rows of E are interpolated horizontally once. Between two of them, rows y of U share their cells
// and differ only in the fraction t, which grows with y. fma(b − a, t, a) is monotone in t, so over
// such a segment every column has its extremes at the ends, and U has its extremes on first or last
// rows of segments. The quantisation is monotone too: a pixel qualifies as peak if its level is
// that of max U. If the first row of a segment has no such pixel, only columns that increase with y
// can reach the level, and they then keep it: the qualifying rows are the last ones of the segment,
// and the first of them is found by bisection.
class Locator {
 public:
  Locator(int64_t h, int64_t w, int64_t H, int64_t W, bool quantize)
      : h_(h), w_(w), H_(H), W_(W), width_(padded(W)), quantize_(quantize),
        across_(h * width_ + kPack), t_(width_ + kPack), rows_(H) {
    for (int64_t x = 0; x < static_cast<int64_t>(t_.size()); ++x) {  // padded with the last column
      const Tap column = tap(std::min(x, W - 1), w, W);
      t_[x] = column.t;
      if (x < W && (x == 0 || columns_.back().left != column.left))
        columns_.push_back({x, column.left, column.right});
    }
    columns_.push_back({width_, 0, 0});
    for (int64_t y = 0; y < H; ++y) {
      rows_[y] = tap(y, h, H);
      if (y == 0 || rows_[y].left != rows_[y - 1].left) starts_.push_back(y);
    }
    starts_.push_back(H);
    ends_.resize(starts_.size() - 1);
  }

  // Bytes of memory of a Locator; nullopt if the number overflows 64 bits.
  static std::optional<int64_t> bytes(int64_t h, int64_t H, int64_t W) {
    const int64_t across[2] = {h + 1, padded(W)}, taps = static_cast<int64_t>(sizeof(Tap)) * H;
    std::optional<int64_t> sum = dense_bytes(across, 2, ScalarType::Float);
    if (sum && __builtin_add_overflow(*sum, taps, &*sum)) sum.reset();
    return sum;
  }

  // e (h, w), overwritten.
  Positions find(float* e) {
    bool finite = true;
    for (int64_t k = 0; k < h_ * w_; ++k) finite &= std::isfinite(e[k]);
    if (!finite) return {};
    if (quantize_) normalize(e, h_ * w_);
    for (int64_t r = 0; r < h_; ++r) interpolate(e + r * w_, &across_[r * width_]);
    low_ = INFINITY;
    high_ = -INFINITY;
    for (size_t s = 0; s < ends_.size(); ++s)
      for (const bool last : {false, true}) {
        Range& range = ends_[s][last];
        range = extremes(last ? starts_[s + 1] - 1 : starts_[s]);
        low_ = std::min(low_, range.low);
        high_ = std::max(high_, range.high);
      }
    range_ = (high_ - low_) + 1e-12f;
    Positions found;
    first(true, found.peak);
    first(false, found.trough);
    return found;
  }

 private:
  struct Range {
    float low, high;
  };
  struct Segment {  // columns between the same two cells, from `begin` on
    int64_t begin;
    int left, right;
  };

  // e (w) → row (width). Whole packs are written: what exceeds a segment is overwritten by the next
  // one, and what exceeds a row by the next row.
  void interpolate(const float* e, float* row) const {
    for (size_t s = 0; s + 1 < columns_.size(); ++s) {
      const Pack<float> a = splat(e[columns_[s].left]), b = splat(e[columns_[s].right]);
      for (int64_t x = columns_[s].begin; x < columns_[s + 1].begin; x += kPack)
        store_pack<float>(lerp(a, b, load_pack<float>(&t_[x], Whole{}, 0.0f)), Whole{}, row + x);
    }
  }

  static Pack<float> lerp(Pack<float> a, Pack<float> b, Pack<float> t) {
#if defined(__FMA__)
    return multiply_add(b - a, t, a);
#else
    Pack<float> u;
    for (int l = 0; l < kPack; ++l) u[l] = lerp_fused(a[l], b[l], t[l]);
    return u;
#endif
  }

  // body(x, U at columns x … of row y), for whole packs, until it returns true.
  template <typename Body>
  void each_of_row(int64_t y, const Body& body) const {
    const Tap& tap = rows_[y];
    const float *a = &across_[tap.left * width_], *b = &across_[tap.right * width_];
    const Pack<float> t = splat(tap.t);
    for (int64_t x = 0; x < W_; x += kPack)
      if (body(x, lerp(load_pack<float>(a + x, Whole{}, 0.0f),
                       load_pack<float>(b + x, Whole{}, 0.0f), t)))
        return;
  }

  // Minimum and maximum of row y.
  Range extremes(int64_t y) const {
    Pack<float> low = splat(INFINITY), high = splat(-INFINITY);
    each_of_row(y, [&](int64_t, Pack<float> u) {
      low = u < low ? u : low;
      high = u > high ? u : high;
      return false;
    });
    return {-reduce_max<float>(-low), reduce_max<float>(high)};
  }

  float level(float u) const {
    return quantize_ ? std::floor((255.0f * (u - low_)) / range_) : u;
  }

  bool qualifies(const Range& row, bool peak, float wanted) const {
    return level(peak ? row.high : row.low) == wanted;
  }

  // First pixel in row-major order at the level of the maximum (peak) or of the minimum.
  void first(bool peak, int position[2]) const {
    const float wanted = level(peak ? high_ : low_);
    int64_t y = 0;
    for (size_t s = 0; s < ends_.size(); ++s) {
      int64_t begin = starts_[s], end = starts_[s + 1] - 1;
      if (qualifies(ends_[s][0], peak, wanted)) {
        y = begin;
        break;
      }
      if (!qualifies(ends_[s][1], peak, wanted)) continue;
      while (end - begin > 1) {  // begin does not qualify, end does
        const int64_t middle = (begin + end) / 2;
        (qualifies(extremes(middle), peak, wanted) ? end : begin) = middle;
      }
      y = end;
      break;
    }
    int64_t column = W_ - 1;
    each_of_row(y, [&](int64_t x, Pack<float> u) {
      // `wanted` is an integer: ⌊v⌋ = wanted means wanted ≤ v < wanted + 1
      const Pack<float> v = quantize_ ? (255.0f * (u - low_)) / range_ : u;
      const unsigned there =
          lane_bits(v >= wanted) & (quantize_ ? lane_bits(v < wanted + 1) : lane_bits(v == wanted));
      if (there) column = std::min<int64_t>(column, x + __builtin_ctz(there));
      return there != 0;
    });
    position[0] = static_cast<int>(y);
    position[1] = static_cast<int>(column);
  }

  int64_t h_, w_, H_, W_, width_;  // width: W padded to whole packs
  bool quantize_;
  std::vector<float> across_;  // (h, width), and padding of one pack
  std::vector<float> t_;       // (width), and padding of one pack
  std::vector<Segment> columns_;  // and a sentinel
  std::vector<Tap> rows_;
  std::vector<int64_t> starts_;  // rows at which a segment begins, and H
  std::vector<std::array<Range, 2>> ends_;  // of the first and the last row of each segment
  float low_ = 0, high_ = 0, range_ = 1;
};

}  // namespace sanm
