// Section 1 of the method, one block per sample, after the energy map: statistics, peak, trough.
//
// A map of up to kWarpCells cells is processed by every warp redundantly, on a copy of its own:
// warps synchronise only to divide rows and columns of the upsampled map among them.
#pragma once

#include "cuda/device.h"
#include "math/resize.h"

namespace sanm {

// The threads that share a map: those of a warp, or of the block.
struct Team {
  bool block;

  SANM_DEVICE int rank() const { return block ? threadIdx.x : lane(); }
  SANM_DEVICE int size() const { return block ? blockDim.x : kWarp; }
  SANM_DEVICE void sync() const { block ? __syncthreads() : __syncwarp(); }
  SANM_DEVICE bool any(bool here) const {  // includes sync()
    if (block) return __syncthreads_or(here);
    __syncwarp();
    return __any_sync(kFullMask, here);
  }
  // Reduces f(0) … f(n − 1) by op; scratch: kWarp entries, for a block.
  template <typename T, typename F, typename Op>
  SANM_DEVICE T reduce(int n, const F& f, Op op, T identity, T* scratch) const {
    T result = identity;
    if (block) {
      for (int k = threadIdx.x; k < n; k += blockDim.x) result = op(result, f(k));
      return block_reduce(result, op, identity, scratch);
    }
    for (int k = lane(); k - lane() < n; k += kWarp)
      result = op(result, warp_reduce(k < n ? f(k) : identity, op));
    return result;
  }
};

// Partial results of the statistics: of the first and of the second pass over the map.
template <typename A>
struct Range {
  A high, low, sum;
};
template <typename A>
struct Spread {
  A square, entropy;
};
template <typename A>
SANM_DEVICE Range<A> shuffle_xor(Range<A> x, int distance) {
  return {shuffle_xor(x.high, distance), shuffle_xor(x.low, distance),
          shuffle_xor(x.sum, distance)};
}
template <typename A>
SANM_DEVICE Spread<A> shuffle_xor(Spread<A> x, int distance) {
  return {shuffle_xor(x.square, distance), shuffle_xor(x.entropy, distance)};
}
struct Merge {
  template <typename A>
  SANM_DEVICE Range<A> operator()(Range<A> a, Range<A> b) const {
    return {b.high > a.high ? b.high : a.high, b.low < a.low ? b.low : a.low, a.sum + b.sum};
  }
  template <typename A>
  SANM_DEVICE Spread<A> operator()(Spread<A> a, Spread<A> b) const {
    return {a.square + b.square, a.entropy + b.entropy};
  }
};

// Maximum, minimum, mean, standard deviation and normalised entropy of e (n) → value[k·stride], by
// one thread.
template <typename A>
SANM_DEVICE void statistics(const Team& team, const A* e, int n, A* value, int64_t stride) {
  const A inf = static_cast<A>(INFINITY);
  const Range<A> range = team.reduce(
      n,
      [&](int k) {
        const A x = e[k];  // maximum and minimum ignore NaN
        return Range<A>{x > -inf ? x : -inf, x < inf ? x : inf, x};
      },
      Merge(), Range<A>{-inf, inf, A{0}}, shared_memory<Range<A>>());
  const A sum = range.sum, mean = sum / static_cast<A>(n);
  const Spread<A> spread = team.reduce(
      n,
      [&](int k) {
        const A p = e[k] / sum;
        return Spread<A>{(e[k] - mean) * (e[k] - mean),
                         p != 0 ? static_cast<A>(-p * log(p)) : A{0}};
      },
      Merge(), Spread<A>{A{0}, A{0}}, shared_memory<Spread<A>>());
  if (team.rank() != 0) return;
  value[0] = sum != sum ? sum : range.high;  // a sum of squares is NaN only if a term is NaN
  value[stride] = sum != sum ? sum : range.low;
  value[2 * stride] = mean;
  value[3 * stride] = sqrt(spread.square / static_cast<A>(n));
  value[4 * stride] =
      n == 1 || sum == 0 ? A{1} : spread.entropy / log(static_cast<A>(n));
}

// e / max(‖e‖₂, 1e-12) in place: eight interleaved partial sums of rounded products, added in
// order, then the tail by fused multiply-add, as csrc/cpu/activation.h does. scratch: 8.
SANM_DEVICE void normalize(const Team& team, float* e, int n, float* scratch) {
  const int whole = n - n % 8;
  if (team.rank() < 8) {
    float sum = 0;
    for (int k = team.rank(); k < whole; k += 8) sum += e[k] * e[k];
    scratch[team.rank()] = sum;
  }
  team.sync();
  float total = scratch[0];
  for (int l = 1; l < 8; ++l) total += scratch[l];
  for (int k = whole; k < n; ++k) total = fmaf(e[k], e[k], total);
  const float root = sqrtf(total), norm = root < 1e-12f ? 1e-12f : root;
  team.sync();  // all threads have read the tail before it is divided
  for (int k = team.rank(); k < n; k += team.size()) e[k] /= norm;
  team.sync();
}

// Interpolation from the cells (h, w) to the pixels (H, W) of the upsampled map U; it does not
// depend on the map's values.
struct Taps {
  int* left;      // (W): each column's left cell
  float* across;  // (W): its weight of the right one
  float* down;    // (H): each row's weight of the lower cell
  int* begin;     // (h + 1): the first row of U whose upper cell is in row r or below it, and H
  int h, w, H, W;

  // By the block; a barrier follows.
  SANM_DEVICE void fill() const {
    for (int x = threadIdx.x; x < W; x += blockDim.x) {
      const Tap column = tap(x, w, W);
      left[x] = column.left;
      across[x] = column.t;
    }
    for (int y = threadIdx.x; y <= H; y += blockDim.x) {
      const Tap row = tap(y, h, H);
      const int upper = y < H ? row.left : h;
      for (int r = y > 0 ? tap(y - 1, h, H).left + 1 : 0; r <= upper; ++r) begin[r] = y;
      if (y < H) down[y] = row.t;
    }
  }
};

struct Pixel {
  int y, x;
};

// Finds the first maximum and the first minimum of the upsampled map U of E, as
// csrc/cpu/activation.h does and for the reason given there: U has its extremes on rows that begin
// or end a segment of rows with the same cells. In the first segment that has a pixel at the level
// of the peak (or trough), a column that reaches the level keeps it: its first row is found by
// bisection, one thread per column, half of the warps for each extreme.
struct Locator {
  Taps taps;
  const float* map;           // (h, w): E, normalised where quantised
  float *row_low, *row_high;  // (2h): extremes of the rows that begin and end segment r
  Pixel* hit;                 // (warps): first pixel that each warp found, in its columns
  bool quantize;

  // Row y of U at column x is interpolated between these two, with weight down[y].
  SANM_DEVICE void ends(int r, int x, float* upper, float* lower) const {
    const int a = taps.left[x], b = a + 1 < taps.w ? a + 1 : a;
    const float* top = map + r * taps.w;
    const float* bottom = r + 1 < taps.h ? top + taps.w : top;
    *upper = lerp_fused(top[a], top[b], taps.across[x]);
    *lower = lerp_fused(bottom[a], bottom[b], taps.across[x]);
  }

  // Extremes of the rows, one warp per row. A barrier follows.
  SANM_DEVICE void scan() const {
    for (int k = warp(); k < 2 * taps.h; k += warps()) {
      float low = INFINITY, high = -INFINITY;
      const int r = k / 2, start = taps.begin[r], end = taps.begin[r + 1];
      if (start < end) {
        const float t = taps.down[k % 2 == 0 ? start : end - 1];
        for (int x = lane(); x < taps.W; x += kWarp) {
          float upper, lower;
          ends(r, x, &upper, &lower);
          const float u = lerp_fused(upper, lower, t);
          low = u < low ? u : low;
          high = u > high ? u : high;
        }
      }
      low = warp_min(low);
      high = warp_max(high);
      if (lane() == 0) {
        row_low[k] = low;
        row_high[k] = high;
      }
    }
  }

  // Searches this warp's columns for this warp's extreme → hit. A barrier follows.
  SANM_DEVICE void search() const {
    const int rows = 2 * taps.h;
    const bool peak = warp() % 2 == 0;
    float low = INFINITY, high = -INFINITY;
    for (int k = lane(); k < rows; k += kWarp) {
      low = row_low[k] < low ? row_low[k] : low;
      high = row_high[k] > high ? row_high[k] : high;
    }
    low = warp_min(low);
    high = warp_max(high);
    const float range = (high - low) + 1e-12f;
    const auto level = [&](float u) {
      return quantize ? floorf((255.0f * (u - low)) / range) : u;
    };
    const float wanted = level(peak ? high : low);
    int found = rows;
    for (int k = lane(); k < rows; k += kWarp)
      if (level(peak ? row_high[k] : row_low[k]) == wanted && k < found) found = k;
    found = warp_min(found);
    Pixel best{INT32_MAX, INT32_MAX};
    if (found < rows) {
      const int r = found / 2, start = taps.begin[r];
      const int end = found % 2 == 0 ? start : taps.begin[r + 1] - 1;
      for (int x = warp() / 2 * kWarp + lane(); x < taps.W; x += warps() / 2 * kWarp) {
        float upper, lower;
        ends(r, x, &upper, &lower);
        const auto reached = [&](int y) {
          return level(lerp_fused(upper, lower, taps.down[y])) == wanted;
        };
        if (!reached(end)) continue;
        int before = start, y = end;  // the level is reached at y, and not at `before` unless equal
        while (y - before > 1) {
          const int middle = (before + y) / 2;
          const bool here = reached(middle);
          y = here ? middle : y;
          before = here ? before : middle;
        }
        if (y < best.y) best = {y, x};
      }
    }
    const int y = warp_min(best.y), x = warp_min(best.y == y ? best.x : INT32_MAX);
    if (lane() == 0) hit[warp()] = {y, x};
  }

  // The first pixel over all warps.
  SANM_DEVICE Pixel found(bool peak) const {
    Pixel best{INT32_MAX, INT32_MAX};
    for (int k = peak ? 0 : 1; k < warps(); k += 2) {
      const Pixel other = hit[k];
      if (other.y < best.y || (other.y == best.y && other.x < best.x)) best = other;
    }
    return best.y == INT32_MAX ? Pixel{0, taps.W - 1} : best;
  }
};

}  // namespace sanm
