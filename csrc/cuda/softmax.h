// Rows of K classes: how lanes share a row and its classes, and how rows are loaded and stored.
#pragma once

#include "cuda/common.h"

namespace sanm {

constexpr int kRowThreads = 256;  // per block, if no row is shared by several warps
constexpr int kScratch = 512;      // bytes at the start of shared memory, for reductions

// A compile-time bool.
template <bool kTruth>
struct Known {
  SANM_DEVICE operator bool() const { return kTruth; }
};

// G lanes share a row: a part of a warp, a warp, or (G > kWarp) several or all warps of the block.
// Each lane has C classes of a piece of G·C, in runs of N contiguous ones. A whole row (kWhole) is
// a single piece and stays in registers; longer rows are processed piece by piece, in several
// sweeps.
template <typename Number, int kLanes, int kClasses, int kRun, bool kOnePiece>
struct RowShape {
  using A = Number;
  static constexpr int G = kLanes, C = kClasses, N = kRun, kRuns = C / N, kPiece = G * C;
  static constexpr bool kWhole = kOnePiece, kBlock = G > kWarp;
  // Threads per multiprocessor: few enough that no register is spilled. Whole rows use large
  // blocks, so that there are few of them: each has column sums in masked_loss.
  static constexpr int kTogether = sizeof(A) == 8 ? 256 : kBlock && G < 256 ? 384 : 512;
  static constexpr int kThreads = !kBlock ? kRowThreads : G < 256 ? kTogether / G * G : G;
  static constexpr int kRows = kThreads / G, kResident = kTogether / kThreads;
  static constexpr int kMost = kBlock ? kResident : 1024 / kThreads;  // blocks per multiprocessor
  static_assert(C % N == 0 && kThreads % kWarp == 0, "an impossible shape");

  SANM_DEVICE static int rank() { return threadIdx.x % G; }
  // First class of the lane's run r in the piece that starts at class `first`.
  SANM_DEVICE static int start(int first, int r) { return first + (r * G + rank()) * N; }
  // Whether any lane has a class in run r: the same for all lanes.
  SANM_DEVICE static bool used(int first, int r, int K) { return first + r * G * N < K; }
  // The end of a sweep over pieces.
  SANM_DEVICE static int end(int K) { return kWhole ? 1 : K; }

  // Reduces over the lanes that share a row; all lanes of the warp, or block, take part.
  template <typename V, typename Op>
  SANM_DEVICE static V reduce(V x, Op op, V identity) {
    if constexpr (kBlock && kRows == 1) {
      return block_reduce(x, op, identity, shared_memory<V>());
    } else if constexpr (kBlock) {
      V* scratch = shared_memory<V>();
      x = warp_reduce(x, op);
      if (lane() == 0) scratch[warp()] = x;
      __syncthreads();
      constexpr int kWarps = G / kWarp;
      const V* own = scratch + warp() / kWarps * kWarps;
      x = own[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) x = op(x, own[w]);
      __syncthreads();
      return x;
    } else {
#pragma unroll
      for (int distance = G / 2; distance > 0; distance /= 2) x = op(x, shuffle_xor(x, distance));
      return x;
    }
  }
  SANM_DEVICE static A sum(A x) { return reduce(x, Sum(), A{0}); }
  SANM_DEVICE static A max(A x) { return reduce(x, Max(), static_cast<A>(-INFINITY)); }

  // A grid-stride loop over the rows, uniform in the warp or block: body(row, exists), where `row`
  // is a valid index even if not `exists`.
  template <typename Body>
  SANM_DEVICE static void each_row(int64_t n, const Body& body) {
    // Warps loop independently if a row is at most a warp's; else the block does as a whole.
    constexpr int64_t kApart = kBlock ? 1 : kThreads / kWarp, kTurn = kRows / kApart;
    const int64_t first = kBlock ? blockIdx.x : blockIdx.x * kApart + warp();
    const int64_t step = gridDim.x * kApart;
    for (int64_t i = first * kTurn; i < n; i += step * kTurn) {
      const int64_t row = i + (kBlock ? threadIdx.x : lane()) / G;
      body(row < n ? row : n - 1, row < n);
    }
  }

  // Calls body(second) for two sweeps over a row. For rows that are not whole the sweeps share most
  // of their code: a loop instantiates it once.
  template <typename Body>
  SANM_DEVICE static void two_sweeps(const Body& body) {
    if constexpr (kWhole) {
      body(Known<false>());
      body(Known<true>());
    } else {
#pragma unroll 1
      for (int sweep = 0; sweep < 2; ++sweep) body(sweep > 0);
    }
  }

  // Calls body(c, k) for the lane's classes k of a piece; c, a constant, is the index in registers.
  template <typename Body>
  SANM_DEVICE static void each_class(int first, int K, const Body& body) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (!used(first, r, K)) break;
#pragma unroll
      for (int j = 0; j < N; ++j) body(r * N + j, start(first, r) + j);
    }
  }
};

// A lane's sum over the pieces of a row.
template <typename Shape>
struct RowSum {
  using A = typename Shape::A;
  LongSum<A> pieces;

  SANM_DEVICE void add(A piece) {
    if (Shape::kWhole)
      pieces.sum += piece;
    else
      pieces.add(piece);
  }
  SANM_DEVICE A lane() const { return pieces.value(); }
  SANM_DEVICE A row() const { return Shape::sum(lane()); }
};

// ---- Conversion between storage and accumulation types.

template <typename S, typename A, int C>
SANM_DEVICE void decode(ScalarType type, const S (&stored)[C], A (&x)[C]) {
  if constexpr (!std::is_same_v<S, Bits16>) {
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = static_cast<A>(stored[c]);
  } else if (type == ScalarType::Half) {
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = widen(Half(stored[c], Half::from_bits()));
  } else {
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = widen(BFloat16(stored[c], BFloat16::from_bits()));
  }
}

template <typename S, typename A, int C>
SANM_DEVICE void encode(ScalarType type, const A (&x)[C], S (&stored)[C]) {
  if constexpr (!std::is_same_v<S, Bits16>) {
#pragma unroll
    for (int c = 0; c < C; ++c) stored[c] = x[c];
  } else if (type == ScalarType::Half) {
#pragma unroll
    for (int c = 0; c < C; ++c) stored[c] = narrow<Half>(x[c]).x;
  } else {
#pragma unroll
    for (int c = 0; c < C; ++c) stored[c] = narrow<BFloat16>(x[c]).x;
  }
}

// −∞ as S.
template <typename S>
SANM_DEVICE S lowest(ScalarType type) {
  if constexpr (std::is_same_v<S, Bits16>)
    return type == ScalarType::Half ? 0xFC00 : 0xFF80;
  else
    return static_cast<S>(-INFINITY);
}

// Loads the lane's classes of a piece of a row; `pad` from K on. vectors: stride 1, runs are
// aligned to 16 bytes or to their size. X: S, or the type it is converted to at once, which saves
// registers.
template <typename Shape, typename S, typename X>
SANM_DEVICE void load_piece(
    const S* row,  // (K,), elements `stride` apart
    int64_t stride, bool vectors, int first, int K, X pad, X (&x)[Shape::C]) {
  constexpr int N = Shape::N, kWide = kVector<S>, M = N < kWide ? N : kWide;
#pragma unroll
  for (int r = 0; r < Shape::kRuns; ++r) {
    const int k = Shape::start(first, r);
    if (N > 1 && vectors && k + N <= K) {
#pragma unroll
      for (int j = 0; j < N; j += M) {
        const Vector<S, M> some = load_global<M>(row + k + j);
#pragma unroll
        for (int i = 0; i < M; ++i) x[r * N + j + i] = static_cast<X>(some[i]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[r * N + j] = pad;
        if (k + j < K)
          x[r * N + j] = static_cast<X>(load_global<1>(row + (k + j) * stride)[0]);
      }
    }
  }
}

// Stores the lane's classes of a piece. vectors: the row's runs are aligned.
template <typename Shape, typename S>
SANM_DEVICE void store_piece(S* row,  // (K,) dense
                             bool vectors, int first, int K, const S (&x)[Shape::C]) {
  constexpr int N = Shape::N, kWide = kVector<S>, M = N < kWide ? N : kWide;
#pragma unroll
  for (int r = 0; r < Shape::kRuns; ++r) {
    const int k = Shape::start(first, r);
    if (N > 1 && vectors && k + N <= K) {
#pragma unroll
      for (int j = 0; j < N; j += M) {
        Vector<S, M> some;
#pragma unroll
        for (int i = 0; i < M; ++i) some[i] = x[r * N + j + i];
        store_global(row + k + j, some);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (k + j < K) row[k + j] = x[r * N + j];
    }
  }
}

// Loads the lane's classes of a piece of a row of a run-time dtype; 0 from K on.
template <typename Shape, typename A>
SANM_DEVICE void load_numbers(
    ScalarType type, const void* data, int64_t start,  // (K,) from element `start` on
    int64_t stride, bool vectors, int first, int K, A (&x)[Shape::C]) {
  device_dispatch_stored(type, [&](auto zero) {
    using S = decltype(zero);
    using X = std::conditional_t<std::is_same_v<S, Bits16>, S, A>;
    X loaded[Shape::C];
    load_piece<Shape>(static_cast<const S*>(data) + start, stride, vectors, first, K, X{0}, loaded);
    decode(type, loaded, x);
  });
}

// Logits with any strides.
template <typename S>
struct Logits {
  explicit Logits(const Tensor& z)
      : data(in<S>(z)), type(z.scalar_type()), n(z.size(0)), row_stride(z.stride(0)),
        class_stride(z.stride(1)), K(static_cast<int>(z.size(1))), vectors(vector_rows(z)) {}
  const S* data;  // (n, K)
  ScalarType type;
  int64_t n, row_stride, class_stride;
  int K;
  bool vectors;

  // Loads the lane's logits of a piece of row i; −∞ from K on.
  template <typename Shape>
  SANM_DEVICE void load(int64_t i, int first, typename Shape::A (&x)[Shape::C]) const {
    S stored[Shape::C];
    load_piece<Shape>(data + i * row_stride, class_stride, vectors, first, K, lowest<S>(type),
                      stored);
    decode(type, stored, x);
  }
  SANM_DEVICE acc_t<S> at(int64_t i, int64_t k) const {
    const S stored[] = {data[i * row_stride + k * class_stride]};
    acc_t<S> x[1];
    decode(type, stored, x);
    return x[0];
  }
};

// Calls body(RowShape()) with the shape for rows of K logits of storage type S.
template <typename S, typename Body>
void with_row_shape(int64_t K, bool vectors, const Body& body) {
  using A = acc_t<S>;
  constexpr int kWide = kVector<S>, kFew = 4, kMany = 64 / sizeof(A), kSwept = 8;
  constexpr int kTwo = 2 * kWarp, kBlock = 256;  // threads
  if (K <= 16)
    body(RowShape<A, 4, kFew, 1, true>());
  else if (K <= 64 || (K <= kWarp * kFew && !vectors))
    body(RowShape<A, kWarp, kFew, 1, true>());
  else if (K <= kWarp * kFew)
    body(RowShape<A, kWarp, kFew, std::min(kFew, kWide), true>());
  else if (K <= kTwo * kMany && vectors)
    body(RowShape<A, kTwo, kMany, kWide, true>());
  else if (K <= kTwo * kMany)
    body(RowShape<A, kTwo, kMany, 1, true>());
  else if (vectors)
    body(RowShape<A, kBlock, kSwept, kWide, false>());
  else
    body(RowShape<A, kBlock, kSwept, 1, false>());
}

// Blocks for n rows: several rows each, but enough blocks to occupy all multiprocessors.
template <typename Shape>
int64_t row_blocks(const Tensor& on, int64_t n) {
  constexpr int64_t kTurns = 4;
  const int64_t processors = multiprocessors(on), rows = ceil_div(n, Shape::kRows);
  const int64_t wanted = std::max(2 * processors, ceil_div(rows, kTurns));
  return std::min({rows, wanted, processors * Shape::kMost});
}

}  // namespace sanm
