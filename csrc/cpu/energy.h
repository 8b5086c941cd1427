// E[y,x] = Σ_c F[c,y,x]² of one sample, in the order in which torch's sum() adds: equality with it
// to the last bit decides the peak of quantised maps.
//
// That order is a cascade of four levels: 16 terms are added to level 0, which is then emptied into
// level 1; every 16 of those go to level 2, and every 16 of those to level 3; at the end the levels
// are added in order. A column of the map is summed either plainly (one cascade over the channels)
// or interleaved (four cascades over channels c ≡ 0…3 mod 4, their totals added in order):
//
//   contiguous map, n = h·w columns: the first ⌊n/32⌋·32 plain, the rest interleaved (for n < 8
//     the first ⌊n/4⌋·4 plain);
//   channels_last map, and n = 1: eight lanes, lane l summing channels c ≡ l mod 8 interleaved, then
//     the channels past the last multiple of 8 and the eight lanes added in order; with fewer than
//     8 channels interleaved.
//
// Squares are rounded before they are added. float64 maps are summed plainly.
#pragma once

#include "cpu/vector.h"

namespace sanm {

constexpr int kCascade = 16;  // terms per level, for less than 2¹⁹ of them
constexpr int64_t kMaxCascade = int64_t{1} << 19;

// Levels 1 to 3 of the cascades of one vector of columns.
template <int N>
struct Levels {
  Vec<N> level[3] = {};

  // Takes the sum of 16 terms; `count` says how many such sums that makes.
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

// Columns [0, N) of f, stride n, summed over C channels. P = 1: plain; P = 4: interleaved. Works
// through the channels in steps that the caller chooses, so that a map is read once from memory.
template <int N, int P, typename T>
class Column {
 public:
  // 16·P channels from f on.
  void block(const T* f, int64_t n) {
    Vec<N> sum[P] = {};
    for (int j = 0; j < kCascade; ++j)
      for (int k = 0; k < P; ++k) {
        const T* p = f + (int64_t{j} * P + k) * n;
        prefetch(p);
        sum[k] += square<N>(p);
      }
    ++blocks_;
    for (int k = 0; k < P; ++k) levels_[k].add(sum[k], blocks_);
  }
  // The last channels, fewer than 16·P, and the total.
  Vec<N> finish(const T* f, int64_t n, int64_t channels) {
    Vec<N> sum[P] = {};
    int64_t c = 0;
    for (; c + P <= channels; c += P)
      for (int k = 0; k < P; ++k) sum[k] += square<N>(f + (c + k) * n);
    for (int k = 0; k < P; ++k) sum[k] = levels_[k].total(sum[k]);
    for (; c < channels; ++c) sum[0] += square<N>(f + c * n);
    for (int k = 1; k < P; ++k) sum[0] += sum[k];
    return sum[0];
  }

 private:
  Levels<N> levels_[P];
  int64_t blocks_ = 0;
};

template <int N, int P, typename T>
inline void sum_columns(const T* f, int64_t C, int64_t n, int64_t first, int64_t skip, float* e) {
  Column<N, P, T> column;
  int64_t c = 0;
  for (; c + kCascade * P <= C; c += kCascade * P) column.block(f + c * n + first, n);
  const Vec<N> total = column.finish(f + c * n + first, n, C - c);
  for (int64_t k = skip; k < N; ++k) e[first + k] = total[k];
}

// One column, any dtype: what vectors of columns do, where fewer than 8 columns exist.
template <int P, typename T>
inline float sum_column(const T* f, int64_t C, int64_t n) {
  Column<1, P, float> column;
  float terms[kCascade * P];
  int64_t c = 0;
  const auto gather = [&](int64_t count) {
    for (int64_t k = 0; k < count; ++k) terms[k] = static_cast<float>(f[(c + k) * n]);
  };
  for (; c + kCascade * P <= C; c += kCascade * P) {
    gather(kCascade * P);
    column.block(terms, 1);
  }
  gather(C - c);
  return column.finish(terms, 1, C - c)[0];
}

// f (C, n) contiguous → e (n).
template <typename T>
inline void energy_contiguous(const T* f, int64_t C, int64_t n, float* e) {
  if (n < 8) {
    for (int64_t x = 0; x < n; ++x)
      e[x] = x < n / 4 * 4 ? sum_column<1>(f + x, C, n) : sum_column<4>(f + x, C, n);
    return;
  }
  // Groups of columns, all advanced together through 64 channels at a time so that these stay in
  // the first-level cache: plain groups, then interleaved ones, of which the last is moved back
  // to end at n (its columns that are not its own are dropped).
  constexpr int N = kLanes;
  constexpr int64_t kGroups = 16, kStep = 4 * kCascade;
  const int64_t plain = n / 32 * 32;
  for (int64_t begin = 0; begin < plain; begin += kGroups * N) {
    const int64_t groups = std::min(kGroups, (plain - begin) / N);
    Column<N, 1, T> column[kGroups];
    int64_t c = 0;
    for (; c + kStep <= C; c += kStep)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t k = 0; k < kStep; k += kCascade)
          column[g].block(f + (c + k) * n + begin + g * N, n);
    for (int64_t g = 0; g < groups; ++g) {
      int64_t rest = c;
      for (; rest + kCascade <= C; rest += kCascade)
        column[g].block(f + rest * n + begin + g * N, n);
      const Vec<N> total = column[g].finish(f + rest * n + begin + g * N, n, C - rest);
      std::memcpy(e + begin + g * N, &total, sizeof total);
    }
  }
  for (int64_t x = plain; x < n;) {
    if (n - x >= N) {
      sum_columns<N, 4>(f, C, n, x, 0, e);
      x += N;
    } else {  // n ≥ 8 columns exist, but not N of them from x on
      const int64_t first = n - 8 < x ? n - 8 : x;
      sum_columns<8, 4>(f, C, n, first, x - first, e);
      x = first + 8;
    }
  }
}

// f (n, C) → e (n).
template <typename T>
inline void energy_channels_last(const T* f, int64_t C, int64_t n, float* e) {
  for (int64_t x = 0; x < n; ++x) {
    const T* row = f + x * C;
    if (C < 8) {
      e[x] = sum_column<4>(row, C, 1);
      continue;
    }
    const int64_t vectors = C / 8;
    Column<8, 4, T> column;
    int64_t v = 0;
    for (; v + 4 * kCascade <= vectors; v += 4 * kCascade) column.block(row + v * 8, 8);
    const Vec<8> lanes = column.finish(row + v * 8, 8, vectors - v);
    float sum = 0;
    for (int64_t c = vectors * 8; c < C; ++c) {
      const float value = static_cast<float>(row[c]);
      sum += value * value;
    }
    for (int l = 0; l < 8; ++l) sum += lanes[l];
    e[x] = sum;
  }
}

// float64, either layout: strides in elements of a channel and of a cell.
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
