// Row-wise softmax building blocks.
#pragma once

#include "cpu/pack.h"

namespace sanm {

// What fills the last pack of a row of logits: its e^x is 0.
template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

// Rows per thread below which a loop stays on one thread; a row costs as much as some 32 elements
// besides its own.
inline int64_t row_grain(int64_t K) { return std::max<int64_t>(1, 16384 / (K + 32)); }

// Rows to work on together, pass by pass, a power of two: the passes of one row wait for each other,
// those of several do not, and what they keep stays in the first cache.
constexpr int64_t kMaxRows = 64;
inline int64_t rows_at_once(int64_t K) {
  int64_t rows = 1;
  while (rows < kMaxRows && 2 * rows * padded(K) <= 2048) rows *= 2;
  return rows;
}

// The largest of x (K); NaN is passed over.
template <typename A, typename T>
inline A row_max(const T* x, int64_t K) {
  Pack<A> top = splat(kLowest<A>);
  each_pack(K, [&](int64_t k, auto n) {
    const Pack<A> v = load_pack<A>(x + k, n, kLowest<A>);
    top = v > top ? v : top;
  });
  return reduce_max<A>(top);
}

// The first index of the largest of x (K); 0 if NaN hides it.
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

// Σ_k e^{x_k − m}, m the largest x_k. Asks for the row `ahead` rows on, which is wanted next.
template <typename A, typename T>
inline A exp_sum(const T* x, int64_t K, A m, int64_t ahead = 0) {
  return row_sums<A, 1>(K, [&](int64_t k, auto n, Pack<A>(&sum)[1]) {
    prefetch(x + k, ahead * K * static_cast<int64_t>(sizeof(T)));
    sum[0] += exp_nonpositive(load_pack<A>(x + k, n, kLowest<A>) - m);
  })[0];
}

// Σ e and, if N is 2, Σ e·(x − top) of e (Kp) ← e^{x − top} of a row x (K), top its largest. Asks for
// the row `ahead` rows on.
template <int N, typename A, typename T>
inline std::array<A, N> exponentials(const T* x, int64_t K, A top, A* e, int64_t ahead) {
  return row_sums<A, N>(K, [&](int64_t k, auto n, Pack<A>(&sum)[N]) {
    prefetch(x + k, ahead * K * static_cast<int64_t>(sizeof(T)));
    const Pack<A> centred = load_pack<A>(x + k, n, kLowest<A>) - top,
                  power = exp_nonpositive(centred);
    store_pack<A>(power, Whole{}, e + k);
    sum[0] += power;
    if constexpr (N == 2) sum[1] += power == 0 ? Pack<A>{} : power * centred;  // 0·∞ = 0
  });
}

// total (Kp) += Σ_j scale_j e_j over `count` rows e_j (Kp)
template <typename A>
inline void add_rows(const Rows<A>& e, const A* scale, int64_t count, int64_t K, A* total) {
  each_pack(padded(K), [&](int64_t k, auto n) {
    Pack<A> sum = load_pack<A>(total + k, n, A(0));
    for (int64_t j = 0; j < count; ++j) sum += load_pack<A>(e[j] + k, n, A(0)) * scale[j];
    store_pack<A>(sum, n, total + k);
  });
}

// log Σ_k e^{x_k}; the maximum is taken out first, so nothing overflows.
template <typename A>
inline A logsumexp(const A* x, int64_t K) {
  const A m = row_max<A>(x, K);
  return m + std::log(exp_sum(x, K, m));
}

// p_k = e^{x_k − logsumexp}
template <typename A>
inline void softmax(const A* x, int64_t K, A logsumexp, A* p) {
  each_pack(K, [&](int64_t k, auto n) {
    store_pack<A>(exp_nonpositive(load_pack<A>(x + k, n, kLowest<A>) - logsumexp), n, p + k);
  });
}

}  // namespace sanm
