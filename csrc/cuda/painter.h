// Sections 2 to 4 of the method, by one block: draws, fills, masked views, modulated targets.
#pragma once

#include "cuda/activation.h"
#include "cuda/device.h"
#include "math/box.h"
#include "math/draws.h"
#include "math/modulation.h"

namespace sanm {

// A device function that is not inlined.
#define SANM_DEVICE_CALL static __device__ __attribute__((noinline))

constexpr int kFillValues = 64;  // most per-channel constants, which are passed as kernel arguments

SANM_DEVICE_CALL double philox_uniform(int number, int64_t index, int64_t seed) {
  return uniform(number, index, seed);
}
SANM_DEVICE_CALL double noise(uint32_t number, uint32_t stream, int64_t index, int64_t seed) {
  return normal(number, stream, index, seed);
}

// Draws of one sample: given by the caller, or from Philox.
struct Draws {
  const double* given;  // (D) or null
  int64_t index, seed;
  SANM_DEVICE double operator()(int number) const {
    return given ? given[number] : philox_uniform(number, index, seed);
  }
};

SANM_DEVICE int bytes_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Converts a number to this dtype, stored as S: through float32, unless float64.
template <typename S>
SANM_DEVICE S stored(ScalarType type, double value) {
  if constexpr (std::is_same_v<S, double>) return value;
  const float rounded = static_cast<float>(value);
  if constexpr (std::is_same_v<S, Bits16>)
    return type == ScalarType::Half ? Half(rounded).x : BFloat16(rounded).x;
  else return rounded;
}

// Stores a number, rounded, as element k of an array of this dtype.
template <typename A>
SANM_DEVICE void store_any(ScalarType type, void* p, int64_t k, A value) {
  if constexpr (std::is_same_v<A, double>)
    store_global(static_cast<double*>(p) + k, Vector<double, 1>{value});
  else if (type == ScalarType::Float)
    store_global(static_cast<float*>(p) + k, Vector<float, 1>{value});
  else store_global(static_cast<Bits16*>(p) + k, Vector<Bits16, 1>{stored<Bits16>(type, value)});
}

// Scratch of a block: shared memory, which starts with the scratch of reductions, or, if that is
// too small, the block's part of a global workspace. One type for each, so that the compiler knows
// the address space.
template <bool kShared>
struct Memory {
  unsigned char* base;  // of the workspace

  template <typename T>
  SANM_DEVICE T* at(int64_t offset) const {
    if constexpr (kShared) return shared_memory<T>(offset);
    else return reinterpret_cast<T*>(base + offset);
  }
};

// One sample's image as a matrix with rows of `length` elements: (Cin·H, W), or (H, W·Cin) if
// channels_last.
struct Canvas {
  int channels, H, W;
  bool channels_last;

  SANM_HD unsigned length() const { return channels_last ? W * channels : W; }
  SANM_DEVICE unsigned scale() const { return channels_last ? channels : 1; }
  SANM_HD unsigned size() const { return static_cast<unsigned>(channels) * H * W; }
};

// Mean of the image's channel c, reduced over the block.
SANM_DEVICE_CALL double channel_mean(Untyped<double> image, Canvas canvas, unsigned c) {
  const unsigned C = canvas.channels, pixels = static_cast<unsigned>(canvas.H) * canvas.W;
  double sum = 0;
  for (unsigned k = threadIdx.x; k < pixels; k += blockDim.x)
    sum += image[canvas.channels_last ? int64_t{k} * C + c : int64_t{c} * pixels + k];
  return block_sum(sum, shared_memory<double>()) / pixels;
}

// A view's box in the image: [top, bottom) × [left, right).
struct Box {
  int top, left, bottom, right;
};

// The same in columns of the canvas and rows of the image.
struct Hidden {
  unsigned top, bottom, first, last;

  SANM_DEVICE Hidden(Box box, const Canvas& canvas)
      : top(box.top), bottom(box.bottom), first(box.left * canvas.scale()),
        last(box.right * canvas.scale()) {}
  SANM_DEVICE bool row(const Canvas& canvas, unsigned r) const {
    const unsigned y = canvas.channels_last ? r : r % canvas.H;
    return y >= top && y < bottom;
  }
};

// The fill of a view's box.
template <bool kShared>
struct Filling {
  ScalarType type;  // of the image
  bool noise;
  Memory<kShared> memory;
  int64_t fill;  // offset in `memory` of the (V, Cin) constants
  int64_t index, seed;
};

// 16 bytes of an image or, if it is not aligned, one element.
using Chunk = Vector<uint32_t, 4>;
template <bool kVectors>
using Piece = std::conditional_t<kVectors, Chunk, uint64_t>;

template <bool kVectors>
SANM_DEVICE Piece<kVectors> load_piece(ScalarType type, const void* p, int64_t at) {
  const unsigned char* q = static_cast<const unsigned char*>(p) + at * bytes_of(type);
  if constexpr (kVectors) return load_global<4, kStream>(reinterpret_cast<const uint32_t*>(q));
  else if (bytes_of(type) == 8) return __ldcs(reinterpret_cast<const unsigned long long*>(q));
  else if (bytes_of(type) == 4) return __ldcs(reinterpret_cast<const unsigned*>(q));
  else return __ldcs(reinterpret_cast<const unsigned short*>(q));
}

template <bool kVectors>
SANM_DEVICE void store_piece(ScalarType type, void* p, int64_t at, const Piece<kVectors>& x) {
  unsigned char* q = static_cast<unsigned char*>(p) + at * bytes_of(type);
  if constexpr (kVectors) store_global<kStream>(reinterpret_cast<uint32_t*>(q), x);
  else if (bytes_of(type) == 8)
    __stcs(reinterpret_cast<unsigned long long*>(q), static_cast<unsigned long long>(x));
  else if (bytes_of(type) == 4)
    __stcs(reinterpret_cast<unsigned*>(q), static_cast<unsigned>(x));
  else __stcs(reinterpret_cast<unsigned short*>(q), static_cast<unsigned short>(x));
}

// A piece that starts at (row, column), with its elements inside the box filled. Not inlined: few
// pieces intersect a box, and the noise is much code.
template <bool kVectors, bool kShared>
SANM_DEVICE_CALL Piece<kVectors> hide(Piece<kVectors> piece, Filling<kShared> filling,
                                      Canvas canvas, Hidden box, int view, uint32_t stream,
                                      unsigned row, unsigned column) {
  const unsigned H = canvas.H, C = canvas.channels, length = canvas.length();
  device_dispatch_stored(filling.type, [&](auto zero) {
    using S = decltype(zero);
    constexpr int N = kVectors ? kVector<S> : 1;
    Vector<S, N> x;
    memcpy(&x, &piece, sizeof(x));
#pragma unroll
    for (int k = 0; k < N; ++k, ++column) {
      if (column == length) {
        column = 0;
        ++row;
      }
      if (column < box.first || column >= box.last || !box.row(canvas, row)) continue;
      const unsigned c = canvas.channels_last ? column % C : row / H;
      double value;
      if (filling.noise) {
        const unsigned y = canvas.channels_last ? row : row % H;
        value = noise((c * H + y) * canvas.W + column / canvas.scale(), stream, filling.index,
                      filling.seed);
      } else {
        const double* constants = filling.memory.template at<double>(filling.fill);
        value = kShared ? constants[view * C + c] : __ldcg(constants + view * C + c);
      }
      x[k] = stored<S>(filling.type, value);
    }
    memcpy(&piece, &x, sizeof(x));
  });
  return piece;
}

// Copies elements [begin, end) of an image into every view, each view's box filled; by 16-byte
// accesses if kVectors. Outside its box a view is bitwise equal to the image. Not inlined: compiled
// once for all feature types.
template <bool kVectors, bool kShared>
SANM_DEVICE_CALL void paint(
    Filling<kShared> filling, Canvas canvas, int which,  // views as in Settings
    const void* images, void* views, int64_t first,      // the sample's first element in both
    int64_t stride,                                      // between views, in elements
    Box one, Box two, unsigned begin, unsigned end) {
  constexpr int kLoads = 4;
  const unsigned N = kVectors ? 16 / bytes_of(filling.type) : 1;
  const unsigned length = canvas.length(), step = blockDim.x * N;
  const int V = which == 3 ? 2 : 1;
  for (unsigned base = begin + threadIdx.x * N; base < end; base += kLoads * step) {
    Piece<kVectors> x[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (base + u * step < end)
        x[u] = load_piece<kVectors>(filling.type, images, first + base + u * step);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const unsigned at = base + u * step;
      if (at >= end) break;
      const unsigned row = at / length, column = at - row * length;
#pragma unroll 1
      for (int v = 0; v < V; ++v) {
        const Hidden box(v == 0 ? one : two, canvas);
        // most pieces lie in one row and outside the box
        const bool touched = column + N > length ||
                             (column < box.last && column + N > box.first && box.row(canvas, row));
        const uint32_t stream = 1 + (V == 2 ? v : which - 1);
        store_piece<kVectors>(filling.type, views, first + v * stride + at,
                              touched ? hide<kVectors>(x[u], filling, canvas, box, v, stream, row,
                                                       column)
                                      : x[u]);
      }
    }
  }
}

// One row of new targets, by a warp or by the block: from soft targets t (K), `stride` elements
// apart, or, unless `soft`, from the label. A: the accumulation type.
template <typename A>
SANM_DEVICE_CALL void modulate(Team team, bool soft, Untyped<A> t, int64_t stride, int64_t label,
                               int K, float ratio, bool clamp, void* result, int64_t row) {
  const Peak<A> none{static_cast<A>(-INFINITY), INT32_MAX};
  Peak<A> top{A{1}, static_cast<int>(label)};
  if (soft) {
    top = none;
    for (int k = team.rank(); k < K; k += team.size())
      top = Max()(top, Peak<A>{t[k * stride], k});
    top = team.block ? block_first_max(top, shared_memory<Peak<A>>()) : warp_reduce(top, Max());
  }
  const Modulation<A> m = modulation(top.value, K, static_cast<A>(ratio), clamp);
  for (int k = team.rank(); k < K; k += team.size())
    store_any(t.type, result, row + k,
              k == top.index ? m.top : (soft ? t[k * stride] : A{0}) + m.add);
}

}  // namespace sanm
