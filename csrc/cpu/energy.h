// E[y,x] = Σ_c F[c,y,x]² of one sample, in the summation order of torch's sum(): the peak of a
// quantised map depends on bitwise equality with it.
//
// That order is a cascade of four levels: 16 terms are added to level 0, which is then flushed to
// level 1; every 16 of those are flushed to level 2, and every 16 of those to level 3; at the end
// the levels are added in order. A column of the map is summed plainly (one cascade over the
// channels) or interleaved (four cascades over channels c ≡ 0…3 mod 4, totals added in order):
//
//   contiguous map, n = h·w columns: the first ⌊n/32⌋·32 plain, the rest interleaved (for n < 8
//     the first ⌊n/4⌋·4 plain);
//   channels_last map, and n = 1: eight lanes, lane l summing channels c ≡ l mod 8 interleaved;
//     then the channels after the last multiple of 8 and the eight lanes are added in order. With
//     fewer than 8 channels, interleaved.
//
// Squares are rounded before they are added. float64 maps are summed plainly.
#pragma once

#include "cpu/vector.h"

namespace sanm {

constexpr int kCascade = 16;  // terms per level, for fewer than 2¹⁹ terms in all

// Levels 1 to 3 of the cascades of one vector of columns.
template <int N>
struct Levels {
  Vec<N> level[3] = {};

  // Adds the sum of 16 terms, the `count`-th such sum.
  void add(Vec<N> sum, int64_t count) {
    level[0] += sum;
    if (count % 16) return;
    level[1] += level[0];
    level[0] = Vec<N>{};
    if (count % 256) return;
    level[2] += level[1];
    level[1] = Vec<N>{};
  }
  Vec<N> total(Vec<N> rest) const { return ((rest + level[0]) + level[1]) + level[2]; }
};

template <int N, typename T>
inline Vec<N> square(const T* p) {
  const Vec<N> v = load<N>(p);
  return v * v;
}
template <>
inline Vec<1> square<1, float>(const float* p) {
  return Vec<1>{*p * *p};
}

// Columns [begin, end) of a map of n ≥ N columns, each summed over the channels, plainly (P = 1) or
// interleaved (P = 4). In groups of N, the last of which is shifted back to end at n if it would
// exceed it (its sums of earlier columns are dropped). Channels are the outer loop, groups the
// inner one: the map is read in memory order, which the hardware prefetcher follows.
template <int N, int P, int kMost>
class Columns {
 public:
  Columns(int64_t begin, int64_t end, int64_t n)
      : n_(n), begin_(begin), groups_((end - begin + N - 1) / N) {
    for (int64_t g = 0; g < groups_; ++g) {
      first_[g] = std::min(begin + g * N, n - N);
      for (int k = 0; k < P; ++k) levels_[g][k] = {};
    }
  }

  // Adds 16·P channels from f on. The sums of few groups stay in registers.
  template <typename T>
  void block(const T* f) {
    if (kMost == 1 || groups_ == 1) return add<1>(f);
    if (groups_ * P == 8) return add<8 / P>(f);
    if (groups_ * P == 4) return add<4 / P>(f);
    if (groups_ > 0) add<0>(f);
  }

  // Adds the remaining channels; the totals → e (n).
  template <typename T>
  void finish(const T* f, int64_t channels, float* e) {
    for (; channels >= kCascade * P; channels -= kCascade * P, f += kCascade * P * n_) block(f);
    for (int64_t g = 0; g < groups_; ++g) {
      const T* p = f + first_[g];
      Vec<N> sum[P] = {};
      int64_t c = 0;
      for (; c + P <= channels; c += P)
        for (int k = 0; k < P; ++k) sum[k] += square<N>(p + (c + k) * n_);
      for (int k = 0; k < P; ++k) sum[k] = levels_[g][k].total(sum[k]);
      for (; c < channels; ++c) sum[0] += square<N>(p + c * n_);
      for (int k = 1; k < P; ++k) sum[0] += sum[k];
      const int64_t dropped = begin_ + g * N - first_[g];
      if (dropped == 0)
        std::memcpy(e + first_[g], &sum[0], sizeof sum[0]);
      else
        for (int64_t l = dropped; l < N; ++l) e[first_[g] + l] = sum[0][l];
    }
  }

 private:
  // kGroups: the number of groups, or 0 if it is not known at compile time.
  template <int kGroups, typename T>
  void add(const T* f) {
    const int64_t groups = kGroups ? kGroups : groups_;
    Vec<N> sum[kGroups ? kGroups : kMost][P];
    for (int64_t g = 0; g < groups; ++g)
      for (int k = 0; k < P; ++k) sum[g][k] = Vec<N>{};
    for (int64_t j = 0; j < kCascade; ++j)
      for (int k = 0; k < P; ++k)
        for (int64_t g = 0; g < groups; ++g)
          sum[g][k] += square<N>(f + (j * P + k) * n_ + first_[g]);
    ++blocks_;
    for (int64_t g = 0; g < groups; ++g)
      for (int k = 0; k < P; ++k) levels_[g][k].add(sum[g][k], blocks_);
  }

  int64_t n_, begin_, groups_, blocks_ = 0;
  int64_t first_[kMost];
  Levels<N> levels_[kMost][P];
};

// One column, any dtype, as above, for maps of fewer than 8 columns.
template <int P, typename T>
inline void sum_column(const T* f, int64_t C, int64_t n, float* e) {
  Columns<1, P, 1> column(0, 1, 1);
  float terms[kCascade * P];
  int64_t c = 0;
  const auto gather = [&](int64_t count) {
    for (int64_t k = 0; k < count; ++k) terms[k] = static_cast<float>(f[(c + k) * n]);
  };
  for (; c + kCascade * P <= C; c += kCascade * P) {
    gather(kCascade * P);
    column.block(terms);
  }
  gather(C - c);
  column.finish(terms, C - c, e);
}

// f (C, n) contiguous → e (n), n ≥ N, by strips of columns, the interleaved ones with the last.
template <int N, typename T>
inline void energy_strips(const T* f, int64_t C, int64_t n, float* e) {
  constexpr int64_t kStrip = 256, kStep = 4 * kCascade;
  const int64_t plain_end = n / 32 * 32;
  for (int64_t begin = 0; begin == 0 || begin < plain_end; begin += kStrip) {
    const int64_t end = std::min(begin + kStrip, plain_end);
    Columns<N, 1, kStrip / N> plain(begin, end, n);
    Columns<N, 4, 32 / N> interleaved(end == plain_end ? end : n, n, n);
    int64_t c = 0;
    for (; c + kStep <= C; c += kStep) {
      for (int64_t k = 0; k < kStep; k += kCascade) plain.block(f + (c + k) * n);
      interleaved.block(f + c * n);
    }
    plain.finish(f + c * n, C - c, e);
    interleaved.finish(f + c * n, C - c, e);
  }
}

template <typename T>
inline void energy_contiguous(const T* f, int64_t C, int64_t n, float* e) {
  // At most 32 bytes at a time: rows are not aligned, and 64 bytes would span two cache lines.
  constexpr int N = sizeof(T) == 2 ? kLanes : 8;
  if (n >= N) return energy_strips<N>(f, C, n, e);
  if (n >= 8) return energy_strips<8>(f, C, n, e);
  for (int64_t x = 0; x < n; ++x)
    x < n / 4 * 4 ? sum_column<1>(f + x, C, n, e + x) : sum_column<4>(f + x, C, n, e + x);
}

// f (n, C) → e (n).
template <typename T>
inline void energy_channels_last(const T* f, int64_t C, int64_t n, float* e) {
  for (int64_t x = 0; x < n; ++x) {
    const T* row = f + x * C;
    if (C < 8) {
      sum_column<4>(row, C, 1, e + x);
      continue;
    }
    const int64_t vectors = C / 8;
    Columns<8, 4, 1> lanes(0, 8, 8);
    float totals[8];
    lanes.finish(row, vectors, totals);
    float sum = 0;
    for (int64_t c = vectors * 8; c < C; ++c) {
      const float value = static_cast<float>(row[c]);
      sum += value * value;
    }
    for (int l = 0; l < 8; ++l) sum += totals[l];
    e[x] = sum;
  }
}

// float64, either memory format; `channel` and `cell` are strides in elements.
inline void energy_double(const double* f, int64_t C, int64_t n, int64_t channel, int64_t cell,
                          double* e) {
  std::fill_n(e, n, 0.0);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t x = 0; x < n; ++x) {
      const double value = f[c * channel + x * cell];
      e[x] += value * value;
    }
}

// One sample's map, contiguous or channels_last → e (n).
template <typename T>
inline void energy(const T* f, int64_t C, int64_t n, bool channels_last, acc_t<T>* e) {
  if constexpr (std::is_same_v<T, double>)
    energy_double(f, C, n, channels_last ? 1 : n, channels_last ? C : 1, e);
  else if (channels_last || n == 1)
    energy_channels_last(f, C, n, e);
  else
    energy_contiguous(f, C, n, e);
}

}  // namespace sanm
