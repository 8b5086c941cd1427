// The energy map E = Σ_c F² of a sample's channels, by one block, as rows of partial sums.
#pragma once

#include "cuda/device.h"

namespace sanm {

// Channels [first, first + count) of one sample's map.
struct Slice {
  int first, count;
};

constexpr int kFlight = 4;      // 16-byte loads in flight per thread
constexpr int kWarpCells = 64;  // cells of a map that is small enough for one warp

// Partial sums of E, (count, n), to be added after a barrier.
struct Rows {
  bool partial;  // stored in `partial`, not in `sums`
  int count;

  // Cell k of E.
  template <typename A>
  SANM_DEVICE A sum(const A* rows, int n, int k) const {
    A cell = 0;
#pragma unroll 8
    for (int r = 0; r < count; ++r) cell += rows[r * n + k];
    return cell;
  }
};

// E over a slice of a contiguous map, by loads of V elements. A thread's stride is a whole number
// of channels, so that its V sums always belong to the same cells. For small maps each warp adds
// its sums by cell, one row per warp. For larger maps the sums of consecutive threads form the
// rows. For the largest, whose cells exceed the block's elements, a thread sums V cells over all
// channels.
template <int V, typename Source, typename F = typename Source::Element, typename A = acc_t<F>>
SANM_DEVICE Rows energy_contiguous(
    const Source& f,       // (count, n), the slice
    int64_t count, int n,  // count·n is a multiple of V, and so is n where the map is large
    A* partial,            // blockDim.x·V of scratch
    A* sums) {             // (warps or 1, n) of scratch
  int period = n;  // the least common multiple of n and V
  while (period % V) period += n;
  const int threads = blockDim.x, thread = threadIdx.x;
  if (period > threads * V) {
    for (int p = thread * V; p < n; p += threads * V) {
      A sum[V] = {};
#pragma unroll 4
      for (int64_t c = 0; c < count; ++c) {
        const Vector<F, V> x = f.template load<V>(c * n + p);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += widen(x[k]) * widen(x[k]);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) sums[p + k] = sum[k];
    }
    return {false, 1};
  }
  const int active = threads * V / period * period / V;
  const int64_t step = int64_t{active} * V, total = count * n;
  A sum[V] = {};
  const auto add = [&](const Vector<F, V>& x) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += widen(x[k]) * widen(x[k]);
  };
  if (thread < active) {
    int64_t at = thread * V;
    for (; at + (kFlight - 1) * step < total; at += kFlight * step) {
      Vector<F, V> x[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) x[u] = f.template load<V>(at + u * step);
#pragma unroll
      for (int u = 0; u < kFlight; ++u) add(x[u]);
    }
    for (; at < total; at += step) add(f.template load<V>(at));
#pragma unroll
    for (int k = 0; k < V; ++k) partial[thread * V + k] = sum[k];
  }
  if (n > kWarpCells) return {true, active * V / n};
  __syncwarp();
  const int begin = warp() * kWarp * V, last = begin + kWarp * V;
  const int end = last < active * V ? last : active * V;
  for (int p = lane(); p < n; p += kWarp) {
    A cell = 0;
    for (int i = begin + (p + n - begin % n) % n; i < end; i += n) cell += partial[i];
    sums[warp() * n + p] = cell;
  }
  return {false, warps()};
}

// The same for a channels_last map: one cell per warp, channels across its lanes.
template <int V, typename Source, typename F = typename Source::Element, typename A = acc_t<F>>
SANM_DEVICE Rows energy_channels_last(
    const Source& f,  // (n, C), from the slice's first channel on
    int64_t C, int count, int n,
    A* sums) {  // (1, n) of scratch
  for (int p = warp(); p < n; p += warps()) {
    A sum = 0;
#pragma unroll 4
    for (int c = lane() * V; c < count; c += kWarp * V) {
      const Vector<F, V> x = f.template load<V>(p * C + c);
#pragma unroll
      for (int k = 0; k < V; ++k) sum += widen(x[k]) * widen(x[k]);
    }
    sum = warp_reduce(sum, Sum());
    if (lane() == 0) sums[p] = sum;
  }
  return {false, 1};
}

}  // namespace sanm
