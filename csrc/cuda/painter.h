// Sections 2 to 4 of the method by one block: draws, fills, masked views, modulated targets.
#pragma once

#include "cuda/device.h"
#include "math/box.h"
#include "math/draws.h"
#include "math/modulation.h"

namespace sanm {

// A device function that is called rather than inlined.
#define SANM_DEVICE_CALL static __device__ __attribute__((noinline))

constexpr int kFillValues = 64;  // per-channel constants that travel as kernel arguments

// Draws of one sample: the caller's, or Philox's.
struct Draws {
  const double* given;  // (D) or null
  int64_t index, seed;
  SANM_DEVICE double operator()(int64_t number) const {
    return given ? given[number] : uniform(number, index, seed);
  }
};

// A fill as the image's type: by way of float32, but for float64.
template <typename T>
SANM_DEVICE T fill_cast(double value) {
  if constexpr (std::is_same_v<T, double>) return value;
  else return static_cast<T>(static_cast<float>(value));
}

// The same as what is stored for a number of the image's dtype.
template <typename S>
SANM_DEVICE S fill_stored(ScalarType type, double value) {
  if constexpr (!std::is_same_v<S, Bits16>) return fill_cast<S>(value);
  else return type == ScalarType::Half ? fill_cast<Half>(value).x : fill_cast<BFloat16>(value).x;
}

// One sample's image, seen as rows of `length` numbers: (Cin·H, W), or (H, W·Cin) if channels_last.
struct Canvas {
  int channels, H, W;
  bool channels_last;

  SANM_HD unsigned length() const { return channels_last ? W * channels : W; }
  SANM_DEVICE unsigned scale() const { return channels_last ? channels : 1; }
  SANM_HD unsigned size() const { return static_cast<unsigned>(channels) * H * W; }
};

// N(0, 1) of an element: Philox's, Box's and Muller's.
SANM_DEVICE_CALL double noise(uint32_t number, uint32_t stream, int64_t index, int64_t seed) {
  return normal(number, stream, index, seed);
}

// Fills of every view and channel → fill (V, Cin) in shared memory; sums: kWarp of scratch.
template <typename T>
SANM_DEVICE void prepare_fills(const Settings& s, const double* values, int value_count,
                               const Canvas& canvas, const T* image, const Draws& draws,
                               double* sums, T* fill) {
  const int C = canvas.channels, V = s.view_count();
  if (s.fill == kMean) {
    const unsigned pixels = static_cast<unsigned>(canvas.H) * canvas.W;
    for (int c = 0; c < C; ++c) {
      double sum = 0;
      for (unsigned k = threadIdx.x; k < pixels; k += blockDim.x)
        sum += widen(canvas.channels_last ? image[static_cast<int64_t>(k) * C + c]
                                          : image[static_cast<int64_t>(c) * pixels + k]);
      sum = block_sum(sum, sums);
      if (threadIdx.x == 0)
        for (int v = 0; v < V; ++v) fill[v * C + c] = fill_cast<T>(sum / pixels);
    }
  } else if (s.fill != kPixel) {
    for (int k = threadIdx.x; k < V * C; k += blockDim.x)
      fill[k] = fill_cast<T>(s.fill == kUniform ? draws(2 * s.draw_sets() + k)
                                                : values[value_count == 1 ? 0 : k % C]);
  }
  __syncthreads();
}

// One view's box, in rows and columns of the canvas.
struct Hidden {
  unsigned top, bottom, first, last;

  SANM_DEVICE Hidden(const int* box, const Canvas& canvas)
      : top(box[0]), bottom(box[2]), first(box[1] * canvas.scale()),
        last(box[3] * canvas.scale()) {}
  SANM_DEVICE bool row(const Canvas& canvas, unsigned r) const {
    const unsigned y = canvas.channels_last ? r : r % canvas.H;
    return y >= top && y < bottom;
  }
};

// N elements from (row, column) on, those inside the box filled. Not inlined, as few vectors touch
// a box and noise is much code.
template <int N, typename S>
SANM_DEVICE_CALL Vector<S, N> hide(Vector<S, N> x, ScalarType type, const Settings& s,
                                   const Canvas& canvas, Hidden box, int view, unsigned row,
                                   unsigned column, const S* fill, Draws draws) {
  const unsigned H = canvas.H, C = canvas.channels, length = canvas.length();
#pragma unroll
  for (int k = 0; k < N; ++k, ++column) {
    if (column == length) {
      column = 0;
      ++row;
    }
    if (column < box.first || column >= box.last || !box.row(canvas, row)) continue;
    const unsigned c = canvas.channels_last ? column % C : row / H;
    if (s.fill == kPixel) {
      const unsigned y = canvas.channels_last ? row : row % H;
      const uint32_t stream = 1 + (s.views == 3 ? view : static_cast<int>(s.views) - 1);
      x[k] = fill_stored<S>(type, noise((c * H + y) * canvas.W + column / canvas.scale(), stream,
                                        draws.index, draws.seed));
    } else {
      x[k] = fill[view * C + c];
    }
  }
  return x;
}

// Copies elements [begin, end) of the image into every view, each view's box filled; both are
// multiples of N. Outside its box a view is the image, bit for bit. Not inlined: compiled once for
// features of every type.
template <int N, typename S>
SANM_DEVICE_CALL void paint(
    ScalarType type,  // of the image
    const Settings& s, const Canvas& canvas,
    const S* image,  // one sample's
    S* views,        // the sample's first view; the second lies `stride` elements on
    int64_t stride,
    const int* boxes,  // (V, 4)
    const S* fill,     // (V, Cin)
    Draws draws, unsigned begin, unsigned end) {
  constexpr int kLoads = 4;
  const unsigned length = canvas.length(), step = blockDim.x * N;
  const int V = s.view_count();
  const Hidden box[2] = {Hidden(boxes, canvas), Hidden(boxes + 4 * (V - 1), canvas)};
  for (unsigned base = begin + threadIdx.x * N; base < end; base += kLoads * step) {
    Vector<S, N> x[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (base + u * step < end) x[u] = load_global<N, kStream>(image + base + u * step);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const unsigned at = base + u * step;
      if (at >= end) break;
      const unsigned row = at / length, column = at - row * length;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (v == V) break;
        // most vectors lie in one row and outside the box
        const bool touched =
            column + N > length ||
            (column < box[v].last && column + N > box[v].first && box[v].row(canvas, row));
        store_global<kStream>(views + v * stride + at,
                              touched ? hide(x[u], type, s, canvas, box[v], v, row, column, fill,
                                             draws)
                                      : x[u]);
      }
    }
  }
}

// One row of new targets: from soft targets t (K), or from the label where t is null; scratch:
// kWarp. All threads of the block take part.
template <typename Y>
SANM_DEVICE void modulate(const Y* t, int64_t stride, int64_t label, int K, float ratio, bool clamp,
                          Peak<acc_t<Y>>* scratch, Y* result) {
  using A = acc_t<Y>;
  Peak<A> top{static_cast<A>(-INFINITY), INT32_MAX};
  if (t) {
    for (int k = threadIdx.x; k < K; k += blockDim.x)
      top = Max()(top, Peak<A>{widen(t[k * stride]), k});
    top = block_first_max(top, scratch);
  } else {
    top = {A{1}, static_cast<int>(label)};
  }
  const Modulation<A> m = modulation(top.value, K, static_cast<A>(ratio), clamp);
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    const A old = t ? widen(t[k * stride]) : A{0};
    result[k] = narrow<Y>(k == top.index ? m.top : old + m.add);
  }
}

}  // namespace sanm
