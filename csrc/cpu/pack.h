// Rows processed in packs: as many numbers as a vector register holds, the last pack of a row
// partly filled. Written with GCC's vector types, so that one source serves every instruction set;
// intrinsics only for what these cannot express.
#pragma once

#include <array>
#include <limits>
#include <utility>

#include "cpu/convert.h"
#include "cpu/stream.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)  // clang, GCC 12
#define SANM_HAS_SHUFFLE 1
#endif
#endif

namespace sanm {

// Lanes of a pack: one register of floats. GCC splits vectors longer than a register into elements.
#if defined(__AVX__)
constexpr int kPack = kLanes;
#else
constexpr int kPack = 4;
#endif

template <typename A>
using Pack = typename VectorOf<A, kPack>::type;
// Integers as wide as A, for indices and for masks: the results of comparing packs.
template <typename A>
using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <typename A>
using Index = typename VectorOf<Integer<A>, kPack>::type;
// The number of valid lanes of a pack: all of them, at compile time, or an int64_t.
using Whole = std::integral_constant<int64_t, kPack>;

// The length of a row rounded up to whole packs
inline int64_t padded(int64_t K) { return (K + kPack - 1) / kPack * kPack; }

// body(k, n) for each pack of a row of K: its first element and its number of valid lanes.
template <typename Body>
inline void each_pack(int64_t K, const Body& body) {
  int64_t k = 0;
  for (; k + kPack <= K; k += kPack) body(k, Whole{});
  if (k < K) body(k, K - k);
}

// x broadcast to all lanes
template <typename A>
inline Pack<A> splat(A x) { return x - Pack<A>{}; }

// 0, 1, 2, …
template <typename A>
inline Index<A> lanes() {
  Index<A> index{};
  for (int l = 0; l < kPack; ++l) index[l] = l;
  return index;
}

// Mask of the lane that holds element `at` in the pack that starts at element k. The left side of
// the comparison is loop-invariant.
template <typename A>
inline Index<A> is_lane(int64_t at, int64_t k) {
  using Unsigned = std::make_unsigned_t<Integer<A>>;
  using Lanes = typename VectorOf<Unsigned, kPack>::type;
  return static_cast<Unsigned>(at) - (Lanes)lanes<A>() == static_cast<Unsigned>(k);
}

// Bit l of the result: lane l of the mask of a comparison of floats.
inline unsigned lane_bits(Index<float> there) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)there, (__m512i)there);
#elif defined(__AVX__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)there));
#else
  unsigned bits = 0;
  for (int l = 0; l < kPack; ++l) bits |= there[l] ? 1u << l : 0;
  return bits;
#endif
}

// p (kPack) of any floating dtype
template <typename A, typename T>
inline Pack<A> load_pack(const T* p, Whole, A) {
  Pack<A> v;
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(&v, p, sizeof v);
  } else if constexpr (std::is_same_v<A, float> && sizeof(T) == 2) {
    v = load<kPack>(p);
  } else {
    for (int l = 0; l < kPack; ++l) v[l] = static_cast<A>(p[l]);
  }
  return v;
}

// p (n), n < kPack; the other lanes are `pad`.
template <typename A, typename T>
inline Pack<A> load_pack(const T* p, int64_t n, A pad) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>)
    return _mm512_mask_loadu_ps(_mm512_set1_ps(pad), static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>) {
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                                             (__m256i)lanes<float>());
    return _mm256_blendv_ps(_mm256_set1_ps(pad), _mm256_maskload_ps(p, there), (__m256)there);
  }
#endif
  A some[kPack];
  for (int64_t l = 0; l < kPack; ++l) some[l] = l < n ? static_cast<A>(p[l]) : pad;
  return load_pack<A>(some, Whole{}, pad);
}

// v → p, rounded to nearest even
template <typename A, typename T>
inline void store_pack(Pack<A> v, Whole, T* p) {
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(p, &v, sizeof v);
  } else {
    A some[kPack];
    std::memcpy(some, &v, sizeof v);
    narrow(some, kPack, p);
  }
}
template <typename A, typename T>
inline void store_pack(Pack<A> v, int64_t n, T* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>) {  // a masked store is slow
    __m128 rest = n & 4 ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v);
    if (n & 4) _mm_storeu_ps(p, _mm256_castps256_ps128(v)), p += 4;
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest), p += 2;
      rest = _mm_movehl_ps(rest, rest);
    }
    if (n & 1) _mm_store_ss(p, rest);
    return;
  }
#endif
  A some[kPack];
  std::memcpy(some, &v, sizeof v);
  narrow(some, n, p);
}

// v → p. If `stream`, p is aligned to blocks, and a whole pack of p's type is stored
// non-temporally.
template <typename A, typename T, typename Count>
inline void store_pack(Pack<A> v, Count n, T* p, bool stream) {
  if constexpr (std::is_same_v<A, T> && std::is_same_v<Count, Whole>) {
    if (stream) {
      for (size_t at = 0; at < sizeof v; at += kBlock)
        stream_block(reinterpret_cast<char*>(p) + at, load_block(reinterpret_cast<char*>(&v) + at));
      return;
    }
  }
  store_pack<A>(v, n, p);
}

// Lanes N/2·part … of v. By a shuffle if possible: a vector whose address is taken is kept in
// memory, and so would be the accumulator of a loop.
template <int part, typename E, int N, size_t... l>
inline typename VectorOf<E, N / 2>::type half(const typename VectorOf<E, N>::type& v,
                                              std::index_sequence<l...>) {
#if SANM_HAS_SHUFFLE
  return __builtin_shufflevector(v, v, static_cast<int>(N / 2 * part + l)...);
#else
  typename VectorOf<E, N / 2>::type x;
  std::memcpy(&x, reinterpret_cast<const char*>(&v) + part * sizeof x, sizeof x);
  return x;
#endif
}

// The reduction of v's lanes by `op`, halves first
template <typename E, int N, typename Op>
inline E reduce(typename VectorOf<E, N>::type v, const Op& op) {
  if constexpr (N == 2) {
    return op(v[0], v[1]);
  } else {
    const std::make_index_sequence<N / 2> l;
    return reduce<E, N / 2>(op(half<0, E, N>(v, l), half<1, E, N>(v, l)), op);
  }
}
template <typename A>
inline A reduce_add(Pack<A> v) {
  return reduce<A, kPack>(v, [](auto a, auto b) { return a + b; });
}
template <typename A>
inline A reduce_max(Pack<A> v) {
  return reduce<A, kPack>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Of each block of h lanes the first (`part` 0) or the second half: those of a, then those of b.
// For blocks of up to 128 bits that is done within each 128 bits, which is a single instruction.
template <int part, int N, int h, size_t... l>
inline Pack<float> halves(const Pack<float>& a, const Pack<float>& b, std::index_sequence<l...>) {
#if SANM_HAS_SHUFFLE
  constexpr int G = h > 4 ? N : 4;
  const auto from = [](int lane) {
    const int w = lane % G, v = w % (G / 2);
    return (w >= G / 2 ? N : 0) + lane / G * G + v / (h / 2) * h + part * (h / 2) + v % (h / 2);
  };
  return __builtin_shufflevector(a, b, from(static_cast<int>(l))...);
#else
  return a + b;  // never called
#endif
}

// Lane j: the reduction of row j's lanes by `op`, halves first; 0 from R on. Reducing kPack rows
// together takes half as many instructions as one after the other, and gives the same bits.
template <typename A, int R, typename Op>
inline Pack<A> joined(const std::array<Pack<A>, R>& rows, const Op& op) {
#if SANM_HAS_SHUFFLE
  if constexpr (std::is_same_v<A, float> && R == kPack) {
    constexpr std::make_index_sequence<kPack> l;
    std::array<Pack<float>, R> v = rows;
    const auto join = [&](auto h, int a, int b) {
      v[a] = op(halves<0, kPack, h>(v[a], v[b], l), halves<1, kPack, h>(v[a], v[b], l));
    };
    const std::integral_constant<int, 16> k16;
    const std::integral_constant<int, 8> k8;
    const std::integral_constant<int, 4> k4;
    const std::integral_constant<int, 2> k2;
    if constexpr (kPack == 16) {
      for (int j : {0, 1, 2, 3, 8, 9, 10, 11}) join(k16, j, j + 4);
      for (int j = 0; j < 4; ++j) join(k8, j, j + 8);
    } else if constexpr (kPack == 8) {
      for (int j = 0; j < 4; ++j) join(k8, j, j + 4);
    }
    join(k4, 0, 1), join(k4, 2, 3);
    join(k2, 0, 2);
    return v[0];
  }
#endif
  Pack<A> result{};
  for (int j = 0; j < R; ++j) result[j] = reduce<A, kPack>(rows[j], op);
  return result;
}

// After so many elements (a run) float sums are added to a double: the float sum of a long row, or
// of a run with one large term, would lose the small terms to rounding.
constexpr int64_t kRun = 8 * kPack;

// N sums over each of R ≤ kPack rows of K: `total`, and `sum`, which is not in `total` yet.
template <typename A, int N, int R>
struct RowSums {
  std::array<Pack<A>, R> sum[N] = {};
  double total[N][R] = {};

  // Calls add(k, n) for each pack of a row, and end_run() after each run.
  template <typename Add, typename End>
  static void packs(int64_t K, const Add& add, const End& end_run) {
    const int64_t whole = K / kPack * kPack;
    for (int64_t k = 0; k < whole;) {
      const int64_t end = std::min(k + kRun, whole);
      for (; k < end; k += kPack) add(k, Whole{});
      if (k % kRun == 0) end_run();
    }
    if (whole < K) add(whole, K - whole);
  }

  // Lane j: the sums of row j.
  std::array<Pack<A>, N> joined_sums(int64_t K) const {
    std::array<Pack<A>, N> result;
    for (int s = 0; s < N; ++s) {
      result[s] = joined<A, R>(sum[s], [](auto a, auto b) { return a + b; });
      if (K >= kRun)
        for (int j = 0; j < R; ++j) result[s][j] = static_cast<A>(total[s][j] + result[s][j]);
    }
    return result;
  }
};

// N sums over each of `count` ≤ R rows, one row after the other, for bodies that need many
// registers: row(j) returns body(k, n, sums).
template <typename A, int N, int R, typename Row>
inline std::array<Pack<A>, N> rows_sums_in_turn(int64_t count, int64_t K, const Row& row) {
  RowSums<A, N, R> rows;
  for (int64_t j = 0; j < count; ++j) {
    const auto body = row(j);
    Pack<A> sum[N] = {};
    rows.packs(
        K, [&](int64_t k, auto n) { body(k, n, sum); },
        [&] {
          for (int s = 0; s < N; ++s) rows.total[s][j] += reduce_add<A>(sum[s]), sum[s] = Pack<A>{};
        });
    for (int s = 0; s < N; ++s) rows.sum[s][j] = sum[s];
  }
  return rows.joined_sums(K);
}

// N sums over each of R rows: row(j) returns body(k, n, sums), which adds a pack of row j to each
// of its sums. The rows are interleaved, except kPack rows longer than two packs: their sums do not
// all fit into registers.
template <typename A, int N, int R, typename Row>
inline std::array<Pack<A>, N> rows_sums(int64_t K, const Row& row) {
  if constexpr (R == kPack)
    if (K > 2 * kPack) return rows_sums_in_turn<A, N, R>(R, K, row);
  RowSums<A, N, R> rows;
  const auto add = [&](int64_t k, auto n) {
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
      Pack<A> sum[N];
      for (int s = 0; s < N; ++s) sum[s] = rows.sum[s][j];
      row(j)(k, n, sum);
      for (int s = 0; s < N; ++s) rows.sum[s][j] = sum[s];
    }
  };
  rows.packs(K, add, [&] {
    for (int s = 0; s < N; ++s) {
      const Pack<A> run = joined<A, R>(rows.sum[s], [](auto a, auto b) { return a + b; });
      for (int j = 0; j < R; ++j) rows.total[s][j] += run[j];
      rows.sum[s] = {};
    }
  });
  return rows.joined_sums(K);
}

// N sums over a row of K: body(k, n, sums) adds a pack to each.
template <typename A, int N, typename Body>
inline std::array<A, N> row_sums(int64_t K, const Body& body) {
  const auto sums = rows_sums_in_turn<A, N, 1>(1, K, [&](int64_t) -> const Body& { return body; });
  std::array<A, N> result;
  for (int s = 0; s < N; ++s) result[s] = sums[s][0];
  return result;
}

// a·b + c, fused (one rounding) if the instruction set has it, else with two roundings.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Pack<float> multiply_add(Pack<float> a, Pack<float> b, Pack<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x ≤ 0, within 2 ulp, and 0 where it would be subnormal: x = n·ln2 + r, a degree-6
// polynomial in r, 2^n from its exponent bits. Adding 1.5·2^23 + 127 rounds to an integer and
// leaves n + 127 in the low bits. Coefficients: Cephes' expf, a minimax fit of e^r on |r| ≤ ln2/2.
// V is a float or a pack, Bits the unsigned integers of its size.
template <typename V, typename Bits>
inline V exp_by_bits(V x) {
  const auto all = [](float c) { return c - V{}; };
  constexpr float kRound = 12582912.0f + 127.0f, kSmallest = -87.3f;
  const V shifted = multiply_add(x, all(1.44269504088896341f), all(kRound));
  const V n = shifted - kRound;
  const V r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), x));
  V p = all(1.9875691500e-4f);
  p = multiply_add(p, r, all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < kSmallest ? V{} : p * scale;
}
inline float exp_nonpositive(float x) { return exp_by_bits<float, uint32_t>(x); }
inline double exp_nonpositive(double x) { return std::exp(x); }
inline Pack<float> exp_nonpositive(Pack<float> x) {
  return exp_by_bits<Pack<float>, VectorOf<uint32_t, kPack>::type>(x);
}
inline Pack<double> exp_nonpositive(Pack<double> x) {
  for (int l = 0; l < kPack; ++l) x[l] = std::exp(x[l]);
  return x;
}

// log x for x ≥ 1, within 2 ulp; NaN and ∞ are kept. x = m·2^n with m in [√½, √2), a degree-8
// polynomial in f = m − 1 and n·ln2 in two parts. Coefficients: those of Cephes' logf.
inline Pack<float> log_from_one(Pack<float> x) {
  const Index<float> bits = (Index<float>)x;
  const Pack<float> m = (Pack<float>)((bits & 0x7fffff) | 0x3f800000);  // in [1, 2)
  const Index<float> large = m > 1.41421356f;
  const Pack<float> n = __builtin_convertvector((bits >> 23) - 127 - large, Pack<float>);
  const Pack<float> f = (large ? 0.5f * m : m) - 1.0f, square = f * f;
  Pack<float> p = splat(7.0376836292e-2f);
  p = multiply_add(p, f, splat(-1.1514610310e-1f));
  p = multiply_add(p, f, splat(1.1676998740e-1f));
  p = multiply_add(p, f, splat(-1.2420140846e-1f));
  p = multiply_add(p, f, splat(1.4249322787e-1f));
  p = multiply_add(p, f, splat(-1.6668057665e-1f));
  p = multiply_add(p, f, splat(2.0000714765e-1f));
  p = multiply_add(p, f, splat(-2.4999993993e-1f));
  p = multiply_add(p, f, splat(3.3333331174e-1f));
  const Pack<float> rest = multiply_add(splat(-0.5f), square, p * f * square) - 2.12194440e-4f * n;
  const Pack<float> result = multiply_add(n, splat(0.693359375f), f + rest);
  return x < std::numeric_limits<float>::infinity() ? result : x;
}
inline Pack<double> log_from_one(Pack<double> x) {
  for (int l = 0; l < kPack; ++l) x[l] = std::log(x[l]);
  return x;
}

}  // namespace sanm
