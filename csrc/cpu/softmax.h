// Row-wise softmax building blocks.
#pragma once

#include "cpu/pack.h"

namespace sanm {

// Padding of the last pack of a row of logits: e^x = 0.
template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

// Grain size of parallel_for, in rows; the overhead of a row is that of about 32 elements.
inline int64_t row_grain(int64_t K) { return std::max<int64_t>(1, 16384 / (K + 32)); }

// Rows to process together, pass by pass, a power of two: the passes over one row depend on each
// other, those over several rows overlap, and their intermediate values stay in the L1 cache.
constexpr int64_t kMaxRows = 64;
inline int64_t rows_at_once(int64_t K) {
  int64_t rows = 1;
  while (rows < kMaxRows && 2 * rows * padded(K) <= 2048) rows *= 2;
  return rows;
}

// body(R), R the rows to interleave, since one alone is bound by the latency of its sums: as many
// as a pack has lanes, which are then reduced together, or four where rows are long.
template <typename Body>
inline void side_by_side(int64_t K, const Body& body) {
  if (rows_at_once(K) >= kPack)
    body(std::integral_constant<int, kPack>{});
  else
    body(std::integral_constant<int, 4>{});
}

// The starts of R rows of K; if there are only `count` > 0, the last one is repeated.
template <int R, typename T>
inline std::array<T*, R> row_starts(T* x, int64_t K, int64_t count) {
  std::array<T*, R> rows;
  for (int j = 0; j < R; ++j) rows[j] = x + std::min<int64_t>(j, count - 1) * K;
  return rows;
}

// The maximum of each of R rows of K, row j's in lane j; NaN is ignored.
template <typename A, int R, typename T>
inline Pack<A> rows_max(const std::array<T*, R>& x, int64_t K) {
  std::array<Pack<A>, R> top;
  top.fill(splat(kLowest<A>));
  each_pack(K, [&](int64_t k, auto n) {
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      const Pack<A> v = load_pack<A>(x[j] + k, n, kLowest<A>);
      top[j] = v > top[j] ? v : top[j];
    }
  });
  return joined<A, R>(top, [](auto a, auto b) { return a > b ? a : b; });
}

template <typename A, typename T>
inline A row_max(const T* x, int64_t K) { return rows_max<A, 1>(std::array<const T*, 1>{x}, K)[0]; }

// The first index of the maximum of x (K); NaN is ignored, and 0 if all are NaN.
template <typename A>
inline int64_t row_argmax(const A* x, int64_t K) {
  const A top = row_max<A>(x, K);
  Index<A> first = Index<A>{} + static_cast<Integer<A>>(K);
  each_pack(K, [&](int64_t k, auto n) {
    const Index<A> here = lanes<A>() + static_cast<Integer<A>>(k);
    const Pack<A> v = load_pack<A>(x + k, n, kLowest<A>);
    first = v == top && here < first ? here : first;
  });
  const int64_t index =
      reduce<Integer<A>, kPack>(first, [](auto a, auto b) { return a < b ? a : b; });
  return index < K ? index : 0;
}

// Σ_k e^{x_k − top} of each of R rows x of K, top their maxima. Prefetches the next R rows.
template <typename A, int R, typename T>
inline Pack<A> exp_sums(const std::array<T*, R>& x, int64_t K, Pack<A> top) {
  return rows_sums<A, 1, R>(K, [&](int64_t j) {
    return [x = x[j], top = splat<A>(top[j]), K](int64_t k, auto n, Pack<A>(&sum)[1]) {
      prefetch(x + k, R * K * static_cast<int64_t>(sizeof(T)));
      sum[0] += exp_nonpositive(load_pack<A>(x + k, n, kLowest<A>) - top);
    };
  })[0];
}

// e (Kp) ← e^{x − top} for each of R rows x of K, top their maxima; returns Σ e and, if N is 2,
// Σ e·(x − top). Prefetches the rows `ahead` rows on.
template <int N, typename A, int R, typename T>
inline std::array<Pack<A>, N> exponentials(const std::array<T*, R>& x, int64_t K, Pack<A> top,
                                           const std::array<A*, R>& e, int64_t ahead) {
  return rows_sums<A, N, R>(K, [&](int64_t j) {
    return [x = x[j], e = e[j], top = splat<A>(top[j]), next = ahead * K](
               int64_t k, auto n, Pack<A>(&sum)[N]) {
      prefetch(x + k, next * static_cast<int64_t>(sizeof(T)));
      const Pack<A> centred = load_pack<A>(x + k, n, kLowest<A>) - top,
                    power = exp_nonpositive(centred);
      store_pack<A>(power, Whole{}, e + k);
      sum[0] += power;
      if constexpr (N == 2) sum[1] += power == 0 ? Pack<A>{} : power * centred;  // 0·∞ = 0
    };
  });
}

// total (Kp) += Σ_j scale_j e_j over `count` rows e_j (Kp) of e from `first` on. Four packs at a
// time, since each sum depends on the row before.
template <typename A>
inline void add_rows(const Rows<A>& e, int64_t first, const A* scale, int64_t count, int64_t K,
                     A* total) {
  const int64_t Kp = padded(K);
  const auto add = [&](int64_t k, auto packs) {
    Pack<A> sum[packs];
    for (int s = 0; s < packs; ++s) sum[s] = load_pack<A>(total + k + s * kPack, Whole{}, A(0));
    const A* row = e[first] + k;
    for (int64_t j = 0; j < count; ++j, row += e.step())
      for (int s = 0; s < packs; ++s)
        sum[s] += load_pack<A>(row + s * kPack, Whole{}, A(0)) * scale[j];
    for (int s = 0; s < packs; ++s) store_pack<A>(sum[s], Whole{}, total + k + s * kPack);
  };
  int64_t k = 0;
  for (; k + 4 * kPack <= Kp; k += 4 * kPack) add(k, std::integral_constant<int, 4>{});
  for (; k + 2 * kPack <= Kp; k += 2 * kPack) add(k, std::integral_constant<int, 2>{});
  if (k < Kp) add(k, std::integral_constant<int, 1>{});
}

// log Σ_k e^{x_k}; the maximum is subtracted first, so nothing overflows.
template <typename A>
inline A logsumexp(const A* x, int64_t K) {
  const A m = row_max<A>(x, K);
  return m + std::log(exp_sums<A, 1>(std::array<const A*, 1>{x}, K, splat(m))[0]);
}

// p_k = e^{x_k − logsumexp}
template <typename A>
inline void softmax(const A* x, int64_t K, A logsumexp, A* p) {
  each_pack(K, [&](int64_t k, auto n) {
    store_pack<A>(exp_nonpositive(load_pack<A>(x + k, n, kLowest<A>) - logsumexp), n, p + k);
  });
}

}  // namespace sanm
