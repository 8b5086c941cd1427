// Building blocks of kernels: shared memory, warp, block and cluster operations, 16-byte accesses.
//
// Blocks are one-dimensional, of a whole number of warps, all of which take part in every
// collective function. The order of a reduction depends on the block size only. There are no
// floating-point atomics: the same input gives the same bits.
//
// The same code is compiled by g++ against tests/cuda_host: so shared memory is dynamic and comes
// from shared_memory() only, and only device functions that cuda_host.h defines are used.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "stable.h"

#define SANM_DEVICE __device__ __forceinline__
#ifndef SANM_DEVICE_CHECK  // checked by tests/cuda_host only
#define SANM_DEVICE_CHECK(condition, message)
#endif

namespace sanm {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xFFFFFFFFu;

// ---- Conversions: 16-bit floats to float and back, rounded to nearest even; float and double are
// unchanged.

template <typename T>
SANM_DEVICE acc_t<T> widen(T x) { return static_cast<acc_t<T>>(x); }
template <typename T>
SANM_DEVICE T narrow(acc_t<T> x) { return static_cast<T>(x); }

// Calls body(T{}) with T the C++ type of a floating dtype, as dispatch() does on the host.
template <typename Body>
SANM_DEVICE void device_dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    default: return body(BFloat16{});
  }
}

// The storage type of float16 and bfloat16, which are loaded and stored alike: kernels that use it
// are instantiated once for both and choose the conversion at run time.
using Bits16 = uint16_t;

// Calls body(S{}) with S the storage type of a floating dtype: float, double or Bits16.
template <typename Body>
SANM_DEVICE void device_dispatch_stored(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    default: return body(Bits16{});
  }
}

// ---- Shared memory: the block's dynamic part, 16-byte aligned, `shared` bytes of the Launch.

template <typename T>
SANM_DEVICE T* shared_memory(size_t byte_offset = 0) {
#ifdef SANM_CUDA_HOST
  return reinterpret_cast<T*>(cuda_host::shared_memory() + byte_offset);
#else
  extern __shared__ __align__(16) unsigned char sanm_shared[];
  return reinterpret_cast<T*>(sanm_shared + byte_offset);
#endif
}

// ---- Thread indices. Grids may have more than 2³¹ threads.

SANM_DEVICE int lane() { return threadIdx.x % kWarp; }
SANM_DEVICE int warp() { return threadIdx.x / kWarp; }
SANM_DEVICE int warps() { return blockDim.x / kWarp; }
// for (int64_t i = global_thread(); i < n; i += global_threads())
SANM_DEVICE int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
SANM_DEVICE int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// ---- Reductions. Every lane, or thread, gets the result.

// A value and its index, for a first argmax.
template <typename A>
struct Peak {
  A value;
  int index;
};

struct Sum {
  template <typename T>
  SANM_DEVICE T operator()(T a, T b) const { return a + b; }
};
struct Max {
  template <typename T>
  SANM_DEVICE T operator()(T a, T b) const { return b > a ? b : a; }
  template <typename A>
  SANM_DEVICE Peak<A> operator()(Peak<A> a, Peak<A> b) const {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }
};
struct Min {
  template <typename T>
  SANM_DEVICE T operator()(T a, T b) const { return b < a ? b : a; }
};

// A compensated sum (Knuth's two-sum): next to one large term, the many small ones of a long row
// would be rounded away.
template <typename A>
struct LongSum {
  A sum = 0, lost = 0;

  SANM_DEVICE void add(A x) {
    const A before = sum;
    sum += x;
    const A added = sum - before;
    lost += (before - (sum - added)) + (x - added);
  }
  SANM_DEVICE A value() const { return lost == lost ? sum + lost : sum; }  // ∞ makes `lost` NaN
};

template <typename T>
SANM_DEVICE T shuffle_xor(T x, int distance) { return __shfl_xor_sync(kFullMask, x, distance); }
template <typename A>
SANM_DEVICE Peak<A> shuffle_xor(Peak<A> x, int distance) {
  return {shuffle_xor(x.value, distance), shuffle_xor(x.index, distance)};
}

// A butterfly reduction: op is commutative, so that all lanes compute the same bits.
template <typename T, typename Op>
SANM_DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = op(x, shuffle_xor(x, distance));
  return x;
}

// Warp minimum and maximum by one instruction (sm_80); of floats, which must not be NaN, as
// integers in the same order.
SANM_DEVICE int warp_min(int x) { return __reduce_min_sync(kFullMask, x); }
SANM_DEVICE int warp_max(int x) { return __reduce_max_sync(kFullMask, x); }
SANM_DEVICE int ordered(int bits) { return bits ^ (bits >> 31 & INT32_MAX); }  // its own inverse
SANM_DEVICE float warp_min(float x) {
  return __int_as_float(ordered(warp_min(ordered(__float_as_int(x)))));
}
SANM_DEVICE float warp_max(float x) {
  return __int_as_float(ordered(warp_max(ordered(__float_as_int(x)))));
}

// scratch: kWarp entries of shared memory, reusable when the function returns.
template <typename T, typename Op>
SANM_DEVICE T block_reduce(T x, Op op, T identity, T* scratch) {
  x = warp_reduce(x, op);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  x = warp_reduce(lane() < warps() ? scratch[lane()] : identity, op);
  __syncthreads();
  return x;
}

template <typename A>
SANM_DEVICE A block_sum(A x, A* scratch) { return block_reduce(x, Sum(), A{0}, scratch); }
template <typename A>
SANM_DEVICE A block_max(A x, A* scratch) {
  return block_reduce(x, Max(), static_cast<A>(-INFINITY), scratch);
}
template <typename A>
SANM_DEVICE A block_min(A x, A* scratch) {
  return block_reduce(x, Min(), static_cast<A>(INFINITY), scratch);
}
template <typename A>
SANM_DEVICE Peak<A> block_first_max(Peak<A> x, Peak<A>* scratch) {
  return block_reduce(x, Max(), Peak<A>{static_cast<A>(-INFINITY), INT32_MAX}, scratch);
}

// ---- Vectors of 16 bytes (or N elements). Addresses are aligned to the vector's size.

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int N = kVector<T>>
struct alignas(N * sizeof(T)) Vector {
  T v[N];
  SANM_DEVICE T& operator[](int i) { return v[i]; }
  SANM_DEVICE const T& operator[](int i) const { return v[i]; }
};

namespace detail {

template <size_t bytes>
struct Word;
template <>
struct Word<2> { using type = unsigned short; };
template <>
struct Word<4> { using type = unsigned; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<16> { using type = uint4; };

template <typename V>
using word_t = typename Word<sizeof(V)>::type;

template <typename V>
SANM_DEVICE V from_word(word_t<V> raw) {
  V x;
  memcpy(&x, &raw, sizeof(V));
  return x;
}

}  // namespace detail

#ifdef SANM_CUDA_HOST
SANM_DEVICE void prefetch_line(const void*) {}
#else
SANM_DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#endif

// Cache policy of a global access: kKeep, the default; kStream, evict-first, for data used once.
enum Cache { kKeep, kStream };

// Loads data that no thread of the launch writes (through the read-only cache).
template <int N, Cache cache = kKeep, typename T>
SANM_DEVICE Vector<T, N> load_global(const T* p) {
  using V = Vector<T, N>;
  using W = detail::word_t<V>;
  SANM_DEVICE_CHECK(reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0, "a misaligned vector load");
  const W* q = reinterpret_cast<const W*>(p);
  return detail::from_word<V>(cache == kStream ? __ldcs(q) : __ldg(q));
}

template <Cache cache = kKeep, typename T, int N>
SANM_DEVICE void store_global(T* p, const Vector<T, N>& x) {
  using W = detail::word_t<Vector<T, N>>;
  SANM_DEVICE_CHECK(reinterpret_cast<uintptr_t>(p) % sizeof(x) == 0, "a misaligned vector store");
  W raw;
  memcpy(&raw, &x, sizeof(raw));
  if (cache == kStream)
    __stcs(reinterpret_cast<W*>(p), raw);
  else
    __stwb(reinterpret_cast<W*>(p), raw);
}

// Arrays in global memory that no thread of the launch writes: of elements T, N per load, …
template <typename T>
struct Typed {
  using Element = T;
  const T* p;

  SANM_DEVICE Typed operator+(int64_t offset) const { return {p + offset}; }
  template <int N>
  SANM_DEVICE Vector<T, N> load(int64_t at) const { return load_global<N>(p + at); }
};

// … or of a dtype known at run time, one per load, widened to A.
template <typename A>
struct Untyped {
  using Element = A;
  ScalarType type;
  const void* p;
  int64_t start;

  SANM_DEVICE Untyped operator+(int64_t offset) const { return {type, p, start + offset}; }
  template <int N = 1>
  SANM_DEVICE Vector<A, 1> load(int64_t at) const { return {(*this)[at]}; }
  SANM_DEVICE A operator[](int64_t at) const {
    if constexpr (sizeof(A) == 8)
      if (type == ScalarType::Double) return __ldg(static_cast<const double*>(p) + start + at);
    if (type == ScalarType::Float) return __ldg(static_cast<const float*>(p) + start + at);
    const Bits16 x = __ldg(static_cast<const Bits16*>(p) + start + at);
    return type == ScalarType::Half ? static_cast<float>(Half(x, Half::from_bits()))
                                    : static_cast<float>(BFloat16(x, BFloat16::from_bits()));
  }
};

// Prefetches memory into the L2 cache, by the block, without waiting.
SANM_DEVICE void prefetch(const void* p, int64_t bytes) {
  constexpr int kLine = 128;
  for (int64_t at = threadIdx.x * kLine; at < bytes; at += blockDim.x * kLine)
    prefetch_line(static_cast<const unsigned char*>(p) + at);
}

// ---- Thread-block clusters (sm_90 and later). Elsewhere a cluster is one block; the host launches
// clusters only where cluster_limit() allows. A block must not exit while others may still read its
// shared memory: cluster_sync() comes first.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
SANM_DEVICE int cluster_rank() { return 0; }
SANM_DEVICE int cluster_size() { return 1; }
SANM_DEVICE void cluster_arrive() {}
SANM_DEVICE void cluster_wait() { __syncthreads(); }
template <typename T>
SANM_DEVICE T cluster_load(const T* shared, int) { return *shared; }
#else
SANM_DEVICE int cluster_rank() { return __clusterRelativeBlockRank(); }
SANM_DEVICE int cluster_size() { return __clusterSizeInBlocks(); }
SANM_DEVICE void cluster_arrive() { __cluster_barrier_arrive(); }
SANM_DEVICE void cluster_wait() { __cluster_barrier_wait(); }
// The value at the same offset in the shared memory of the cluster's block `rank`.
template <typename T>
SANM_DEVICE T cluster_load(const T* shared, int rank) {
  return *static_cast<const T*>(
      __cluster_map_shared_rank(const_cast<T*>(shared), static_cast<unsigned>(rank)));
}
#endif
// The cluster barrier, which also orders accesses to the shared memory of its blocks.
SANM_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace sanm
