// Section 1 of the method by one block a sample: energy map, statistics, peak and trough.
#pragma once

#include "cuda/device.h"
#include "math/resize.h"

namespace sanm {

// Channels [first, first + count) of one sample's map.
struct Slice {
  int first, count;
};

constexpr int kFlight = 4;  // 16-byte loads that a thread issues before it needs the first

// E over a slice of a contiguous map. V numbers are read at a time; a thread's next ones lie a whole
// number of channels on, so that its V sums belong to the same cells throughout. They are added cell
// by cell, in order of the threads. For larger maps a thread takes V cells through all channels.
template <int V, typename F>
SANM_DEVICE void energy_contiguous(
    const F* f,            // (count, n), the slice
    int64_t count, int n,  // count·n is a multiple of V, and so is n where the map is large
    F* held,               // (count, n), where the slice is kept in shared memory, or null
    acc_t<F>* partial,     // blockDim.x·V of scratch
    acc_t<F>* e) {         // (n), written
  using A = acc_t<F>;
  int period = n;  // the least multiple of n that vectors divide
  while (period % V) period += n;
  const int threads = blockDim.x, thread = threadIdx.x;
  if (period <= threads * V) {
    const int active = threads * V / period * period / V;
    const int64_t step = int64_t{active} * V, total = count * n;
    A sum[V] = {};
    const auto add = [&](const Vector<F, V>& x, int64_t at) {
      if (held) store_shared(held + at, x);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += widen(x[k]) * widen(x[k]);
    };
    if (thread < active) {
      int64_t at = thread * V;
      for (; at + (kFlight - 1) * step < total; at += kFlight * step) {
        Vector<F, V> x[kFlight];
#pragma unroll
        for (int u = 0; u < kFlight; ++u) x[u] = load_global<V>(f + at + u * step);
#pragma unroll
        for (int u = 0; u < kFlight; ++u) add(x[u], at + u * step);
      }
      for (; at < total; at += step) add(load_global<V>(f + at), at);
#pragma unroll
      for (int k = 0; k < V; ++k) partial[thread * V + k] = sum[k];
    }
    __syncthreads();
    for (int p = thread; p < n; p += threads) {
      A cell = 0;
      for (int i = p; i < active * V; i += n) cell += partial[i];
      e[p] = cell;
    }
  } else {
    for (int p = thread * V; p < n; p += threads * V) {
      A sum[V] = {};
#pragma unroll 4
      for (int64_t c = 0; c < count; ++c) {
        const Vector<F, V> x = load_global<V>(f + c * n + p);
        if (held) store_shared(held + c * n + p, x);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += widen(x[k]) * widen(x[k]);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) e[p + k] = sum[k];
    }
  }
  __syncthreads();
}

// The same of a channels_last map: a warp takes a cell, its lanes the channels.
template <int V, typename F>
SANM_DEVICE void energy_channels_last(
    const F* f,  // (n, C) from the slice's first channel on
    int64_t C, int count, int n,
    F* held,         // (n, count) in shared memory, or null
    acc_t<F>* e) {   // (n), written
  for (int p = warp(); p < n; p += warps()) {
    acc_t<F> sum = 0;
#pragma unroll 4
    for (int c = lane() * V; c < count; c += kWarp * V) {
      const Vector<F, V> x = load_global<V>(f + p * C + c);
      if (held) store_shared(held + p * count + c, x);
#pragma unroll
      for (int k = 0; k < V; ++k) sum += widen(x[k]) * widen(x[k]);
    }
    sum = warp_reduce(sum, Sum());
    if (lane() == 0) e[p] = sum;
  }
  __syncthreads();
}

// Maximum, minimum, mean, standard deviation and normalised entropy of e (n); scratch: kWarp.
template <typename A>
struct Statistics {
  A value[5];

  SANM_DEVICE Statistics(const A* e, int n, A* scratch) {
    A high = static_cast<A>(-INFINITY), low = static_cast<A>(INFINITY), sum = 0, nan = 0;
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
      high = e[k] > high ? e[k] : high;
      low = e[k] < low ? e[k] : low;
      sum += e[k];
      if (e[k] != e[k]) nan = 1;
    }
    high = block_max(high, scratch);
    low = block_min(low, scratch);
    sum = block_sum(sum, scratch);
    nan = block_max(nan, scratch);
    const A mean = sum / static_cast<A>(n);
    A square = 0, entropy = 0;
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
      const A p = e[k] / sum;
      square += (e[k] - mean) * (e[k] - mean);
      if (p != 0) entropy -= p * log(p);
    }
    square = block_sum(square, scratch);
    entropy = block_sum(entropy, scratch);
    value[0] = nan != 0 ? sum : high;
    value[1] = nan != 0 ? sum : low;
    value[2] = mean;
    value[3] = sqrt(square / static_cast<A>(n));
    value[4] = n == 1 || sum == 0 ? A{1} : entropy / log(static_cast<A>(n));
  }
};

// e / max(‖e‖₂, 1e-12) in place: eight interleaved partial sums of rounded products, added in
// order, then the tail by fused multiply-add, as csrc/cpu/activation.h does. scratch: kWarp.
SANM_DEVICE void normalize(float* e, int n, float* scratch) {
  const int whole = n - n % 8;
  if (threadIdx.x < 8) {
    float sum = 0;
    for (int k = threadIdx.x; k < whole; k += 8) sum += e[k] * e[k];
    scratch[threadIdx.x] = sum;
  }
  __syncthreads();
  float total = scratch[0];
  for (int l = 1; l < 8; ++l) total += scratch[l];
  for (int k = whole; k < n; ++k) total = fmaf(e[k], e[k], total);
  const float root = sqrtf(total), norm = root < 1e-12f ? 1e-12f : root;
  __syncthreads();  // the tail is read by all threads before any of it is divided
  for (int k = threadIdx.x; k < n; k += blockDim.x) e[k] /= norm;
  __syncthreads();
}

// Finds the first largest and the first smallest pixel of the upsampled map U (H, W) of E (h, w),
// as csrc/cpu/activation.h does and for the reason given there: U has its extremes on rows that
// begin or end a segment of rows with the same cells, and within a segment the first row that
// qualifies is found by bisection. A warp takes a row.
struct Locator {
  float* map;     // (h, w): E, normalised where quantised
  int* left;      // (W): each pixel's left cell
  float* t;       // (W): how far it lies towards the right one
  int* begin;     // (h + 1): the first row of U whose upper cell is in row r or below it, and H
  float *row_low, *row_high;  // (2h): extremes of the rows that begin and end segment r
  int h, w, H, W;
  bool quantize;
  float low, high, range;

  SANM_DEVICE float value(const Tap& row, int x) const {
    const int a = left[x], b = a + 1 < w ? a + 1 : a;
    const float *upper = map + row.left * w, *lower = map + row.right * w;
    return lerp_fused(lerp_fused(upper[a], upper[b], t[x]), lerp_fused(lower[a], lower[b], t[x]),
                      row.t);
  }

  // Smallest and largest value of row y.
  SANM_DEVICE void extremes(int y, float* smallest, float* largest) const {
    const Tap row = tap(y, h, H);
    float small = INFINITY, large = -INFINITY;
    for (int x = lane(); x < W; x += kWarp) {
      const float u = value(row, x);
      small = u < small ? u : small;
      large = u > large ? u : large;
    }
    *smallest = warp_reduce(small, Min());
    *largest = warp_reduce(large, Max());
  }

  SANM_DEVICE float level(float u) const {
    return quantize ? floorf((255.0f * (u - low)) / range) : u;
  }

  // Whether a row with these extremes holds a pixel at the level of the peak, or of the trough.
  SANM_DEVICE bool qualifies(float smallest, float largest, bool peak) const {
    return peak ? level(largest) == level(high) : level(smallest) == level(low);
  }

  // By one warp: row and column of the first such pixel.
  SANM_DEVICE void first(bool peak, int* position) const {
    int found = 2 * h;
    for (int k = lane(); k < 2 * h; k += kWarp)
      if (qualifies(row_low[k], row_high[k], peak) && k < found) found = k;
    found = warp_reduce(found, Min());
    int y = 0;
    if (found < 2 * h) {
      int start = begin[found / 2], end = begin[found / 2 + 1] - 1;
      while (found % 2 == 1 && end - start > 1) {  // start does not qualify, end does
        const int middle = (start + end) / 2;
        float smallest, largest;
        extremes(middle, &smallest, &largest);
        (qualifies(smallest, largest, peak) ? end : start) = middle;
      }
      y = found % 2 == 1 ? end : start;
    }
    const float wanted = level(peak ? high : low);
    const Tap row = tap(y, h, H);
    int column = W - 1;
    for (int x0 = 0; x0 < W; x0 += kWarp) {
      const int x = x0 + lane();
      const bool here = x < W && level(value(row, x)) == wanted;
      const int hit = warp_reduce(here ? x : W, Min());
      if (hit < W) {
        column = hit;
        break;
      }
    }
    if (lane() == 0) {
      position[0] = y;
      position[1] = column;
    }
  }

  // position (2, 2) in shared memory, written: peak, trough. scratch: kWarp. Needs two warps.
  SANM_DEVICE void find(int* position, float* scratch) {
    const int n = h * w;
    if (threadIdx.x < 4) position[threadIdx.x] = 0;
    float odd = 0;  // a map with NaN or infinity counts as flat
    for (int k = threadIdx.x; k < n; k += blockDim.x)
      if (!(map[k] - map[k] == 0)) odd = 1;
    if (block_max(odd, scratch) != 0) return;
    if (quantize) normalize(map, n, scratch);
    for (int x = threadIdx.x; x < W; x += blockDim.x) {
      const Tap column = tap(x, w, W);
      left[x] = column.left;
      t[x] = column.t;
    }
    for (int r = threadIdx.x; r <= h; r += blockDim.x) {
      int y = 0, end = H;
      while (y < end) {
        const int middle = (y + end) / 2;
        if (tap(middle, h, H).left >= r)
          end = middle;
        else
          y = middle + 1;
      }
      begin[r] = y;
    }
    __syncthreads();
    for (int k = warp(); k < 2 * h; k += warps()) {
      float smallest = INFINITY, largest = -INFINITY;
      const int start = begin[k / 2], end = begin[k / 2 + 1];
      if (start < end) extremes(k % 2 == 0 ? start : end - 1, &smallest, &largest);
      if (lane() == 0) {
        row_low[k] = smallest;
        row_high[k] = largest;
      }
    }
    __syncthreads();
    low = INFINITY;
    high = -INFINITY;
    for (int k = 0; k < 2 * h; ++k) {
      low = row_low[k] < low ? row_low[k] : low;
      high = row_high[k] > high ? row_high[k] : high;
    }
    range = (high - low) + 1e-12f;
    if (warp() < 2) first(warp() == 0, position + 2 * warp());
    __syncthreads();
  }
};

}  // namespace sanm
