// Gradients of masked_forward: of the targets and of the images.
//
// Sums over rows, boxes and batches are accumulated in float (double for double) by one warp or
// block each, in an order that depends on the sizes alone.
#include "cuda/common.h"
#include "cuda/gradients.h"

namespace sanm {
namespace {

// ---- Targets.

// t' = t + constants, except where the whole t[j*] was dropped: there t'[j*] = 0 and every other
// target gains t[j*]/(K − 1). Hence, summed over the draw sets,
//   dt[k] = Σ_s g_s[k]  for k ≠ j*,
//   dt[j*] = Σ_s (emptied_s ? (Σ_k g_s[k] − g_s[j*])/(K − 1) : g_s[j*]),
// emptied_s = clamp and t[j*] < ratio_s. Vector accesses (N > 1) require g_k = t_k = 1.
template <typename T, int N, bool kBlock>
__global__ void __launch_bounds__(kThreads, 4) modulate_backward_kernel(
    const T* grad,       // (S, B, K), strides (g_s, g_b, g_k)
    const T* targets,    // (B, K), strides (t_b, t_k)
    const float* ratio,  // (S, B)
    T* result,           // (B, K), written
    int64_t S, int64_t B, int64_t K, int64_t g_s, int64_t g_b, int64_t g_k, int64_t t_b,
    int64_t t_k, bool clamp) {
  using A = acc_t<T>;
  using Row = RowTeam<kBlock>;
  const int64_t begin = Row::rank() * N, step = Row::size() * N;
  if (N > 1) g_k = t_k = 1;
  for (int64_t b = Row::first(); b < B; b += Row::step()) {
    const Peak<A> none{static_cast<A>(-INFINITY), INT32_MAX};
    Peak<A> best = none;
    for (int64_t k = begin; k < K; k += step) {
      const Vector<T, N> t = load_global<N>(targets + b * t_b + k * t_k);
#pragma unroll
      for (int e = 0; e < N; ++e)
        best = Max()(best, Peak<A>{widen(t[e]), static_cast<int>(k + e)});
    }
    best = Row::reduce(best, Max(), none);
    A extra = 0;  // what is added to Σ_s g_s[j*]
    for (int64_t s = 0; clamp && s < S; ++s) {
      if (!(best.value < static_cast<A>(ratio[s * B + b]))) continue;
      const T* row = grad + s * g_s + b * g_b;
      A total = 0;
      for (int64_t k = begin; k < K; k += step) {
        const Vector<T, N> g = load_global<N>(row + k * g_k);
#pragma unroll
        for (int e = 0; e < N; ++e) total += widen(g[e]);
      }
      total = Row::reduce(total, Sum(), A{0});
      const A own = best.index < K ? widen(row[best.index * g_k]) : A{0};
      extra += (total - own) / static_cast<A>(K - 1) - own;
    }
    for (int64_t k = begin; k < K; k += step) {
      A sum[N] = {};
      for (int64_t s = 0; s < S; ++s) {
        const Vector<T, N> g = load_global<N>(grad + s * g_s + b * g_b + k * g_k);
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] += widen(g[e]);
      }
      Vector<T, N> rounded;
#pragma unroll
      for (int e = 0; e < N; ++e)
        rounded[e] = narrow<T>(k + e == best.index ? sum[e] + extra : sum[e]);
      store_global(result + b * K + k, rounded);
    }
  }
}

// grad (S, B, K), targets (B, K), ratio (S, B) → (B, K)
Tensor modulate_backward(const Tensor& grad, const Tensor& targets, const Tensor& ratio_,
                         bool clamp) {
  check_modulate_backward(grad, targets, ratio_);
  const Tensor ratio = packed(ratio_);
  const int64_t S = grad.size(0), B = grad.size(1), K = grad.size(2);
  const Tensor result = new_tensor(targets, {B, K}, targets.scalar_type());
  dispatch(targets.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = K * sizeof(T) % 16 == 0 && vector_rows(grad) && vector_rows(targets) &&
                         vector_rows(result);
    with_access<T>(vectors, [&](auto access) {
      with_rows(B, K, [&](auto block, int64_t blocks, int64_t shared) {
        launch({"modulate_backward", grad, {blocks}, kThreads, shared},
               modulate_backward_kernel<T, decltype(access)::value, decltype(block)::value>,
               in<T>(grad), in<T>(targets), in<float>(ratio), out<T>(result), S, B, K,
               grad.stride(0), grad.stride(1), grad.stride(2), targets.stride(0),
               targets.stride(1), clamp);
      });
    });
  });
  return result;
}

// ---- Images.

template <typename I>
struct Shape {
  Shape(int64_t C_, int64_t H_, int64_t W_, bool channels_last)
      : C(static_cast<int>(C_)), H(static_cast<int>(H_)), W(static_cast<int>(W_)),
        inner(channels_last ? C_ : H_ * W_), width(W_) {}
  int C, H, W;
  Divisor<I> inner, width;
};

// Channel and pixel of an element of an image that is dense in NCHW or in NHWC order.
template <bool kChannelsLast>
struct Place {
  int c, y, x;

  template <typename I>
  SANM_DEVICE Place(I element, const Shape<I>& s) {
    const I major = s.inner.split(element);
    I pixel = kChannelsLast ? major : element;
    c = static_cast<int>(kChannelsLast ? element : major);
    y = static_cast<int>(s.width.split(pixel));
    x = static_cast<int>(pixel);
  }
  template <typename I>
  SANM_DEVICE void next(const Shape<I>& s) {
    if (kChannelsLast) {
      if (++c < s.C) return;
      c = 0;
    }
    if (++x < s.W) return;
    x = 0;
    if (++y < s.H || kChannelsLast) return;
    y = 0;
    ++c;
  }
};

struct Box {  // rows top … bottom − 1, columns left … right − 1
  int top, left, bottom, right;

  SANM_DEVICE explicit Box(const int32_t* corners)
      : top(corners[0]), left(corners[1]), bottom(corners[2]), right(corners[3]) {}

  // Bit e: the e-th of N elements from a place on is inside. By runs: the rest of an image row in
  // NCHW, of a pixel in NHWC.
  template <int N, bool kChannelsLast, typename I>
  SANM_DEVICE unsigned covers(Place<kChannelsLast> at, const Shape<I>& s) const {
    const auto holds = [&] {
      return at.y >= top && at.y < bottom && at.x >= left && at.x < right;
    };
    if constexpr (N == 1) return holds();
    const auto low = [](int count) { return (1u << count) - 1; };  // the lowest `count` bits
    unsigned inside = 0;
#pragma unroll 1
    for (int e = 0; e < N;) {
      const int run = min(N - e, kChannelsLast ? s.C - at.c : s.W - at.x);
      if constexpr (kChannelsLast) {
        if (holds()) inside |= low(run) << e;
        at.c += run - 1;
      } else {
        const int from = min(max(left - at.x, 0), run), to = min(max(right - at.x, from), run);
        if (at.y >= top && at.y < bottom) inside |= (low(to) & ~low(from)) << e;
        at.x += run - 1;
      }
      at.next(s);
      e += run;
    }
    return inside;
  }
};

// share[b, c] = Σ_v Σ (v's gradient inside its box) / (H·W). Block (c, b).
template <typename T>
__global__ void __launch_bounds__(kThreads) mean_fill_backward_kernel(
    const T* grad,         // (V·B, C, H, W), strides (C·H·W, g_c, g_x·W, g_x)
    const int32_t* boxes,  // (V, B, 4)
    acc_t<T>* share,       // (B, C), written
    int64_t V, int64_t B, int C, int H, int W, int64_t g_c, int64_t g_x) {
  using A = acc_t<T>;
  const int64_t area = static_cast<int64_t>(H) * W;
  const int c = blockIdx.x;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    A sum = 0;
    for (int64_t v = 0; v < V; ++v) {
      const T* plane = grad + (v * B + b) * area * C + c * g_c;
      const Box box(boxes + 4 * (v * B + b));
      const int left = max(box.left, 0), right = min(box.right, W), bottom = min(box.bottom, H);
      if (left >= right) continue;
      // A block-stride loop over the box's pixels, without a division.
      const unsigned width = right - left, rows = kThreads / width, columns = kThreads % width;
      int y = max(box.top, 0) + threadIdx.x / width, x = left + threadIdx.x % width;
      while (y < bottom) {
        sum += widen(load_global<1>(plane + (static_cast<int64_t>(y) * W + x) * g_x)[0]);
        x += columns, y += rows;
        if (x >= right) x -= width, ++y;
      }
    }
    sum = block_sum(sum, shared_memory<A>());
    if (threadIdx.x == 0) share[b * C + c] = sum / static_cast<A>(area);
  }
}

// A pixel outside a view's box gets the view's gradient; with the mean fill every pixel of a
// channel also gets its share:  dx = share + Σ_v [outside box_v]·g_v.
// Block (tile, b); a vector that a box covers entirely is not read.
template <typename T, int N, bool kChannelsLast, typename I>
__global__ void __launch_bounds__(kThreads, 3) masked_views_backward_kernel(
    const T* grad,          // (V·B, C, H, W), dense in NCHW or NHWC order
    const int32_t* boxes,   // (V, B, 4)
    const acc_t<T>* share,  // (B, C) or null
    T* result,              // (B, C, H, W) in the order of grad, written
    int64_t V, int64_t B, Shape<I> shape, I E) {
  using A = acc_t<T>;
  const I start = static_cast<I>(blockIdx.x) * (kThreads * kUnroll<N> * N) + threadIdx.x * N;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    A sum[kUnroll<N>][N] = {};
#pragma unroll
    for (int u = 0; share != nullptr && u < kUnroll<N>; ++u) {
      Place<kChannelsLast> place(start + u * (kThreads * N), shape);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (place.c < shape.C) sum[u][e] = share[b * shape.C + place.c];
        place.next(shape);
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      const Box box(boxes + 4 * (v * B + b));
      const T* from = grad + (v * B + b) * E;
      Vector<T, N> loaded[kUnroll<N>];
      unsigned seen[kUnroll<N>];  // bit e: element e is outside the box
#pragma unroll
      for (int u = 0; u < kUnroll<N>; ++u) {
        const I at = start + u * (kThreads * N);
        const Place<kChannelsLast> place(at, shape);
        seen[u] = at < E ? ~box.covers<N>(place, shape) & ((1u << N) - 1) : 0;
        if (seen[u] != 0) loaded[u] = load_global<N, kStream>(from + at);
      }
#pragma unroll
      for (int u = 0; u < kUnroll<N>; ++u)
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (seen[u] >> e & 1) sum[u][e] += widen(loaded[u][e]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const I at = start + u * (kThreads * N);
      if (at >= E) break;
      Vector<T, N> rounded;
#pragma unroll
      for (int e = 0; e < N; ++e) rounded[e] = narrow<T>(sum[u][e]);
      store_global<kStream>(result + b * E + at, rounded);
    }
  }
}

// grad (V·B, C, H, W), boxes (V, B, 4) → (B, C, H, W) in the memory format of grad
Tensor masked_views_backward(const Tensor& grad_, const Tensor& boxes_, bool mean_fill) {
  check_masked_views_backward(grad_, boxes_);
  const Image image(grad_);
  const Tensor &grad = image.tensor, boxes = packed(boxes_);
  const int64_t V = boxes.size(0), B = boxes.size(1), C = grad.size(1), H = grad.size(2),
                W = grad.size(3), E = C * H * W;
  const Tensor result = new_tensor(grad, {B, C, H, W}, grad.scalar_type(), image.channels_last);
  if (B == 0 || E == 0) return result;
  const int64_t samples = std::min<int64_t>(B, kSamples);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    std::optional<Tensor> share;
    if (mean_fill) {
      share = new_tensor(grad, {B, C}, acc_type(grad));
      launch({"masked_views_backward", grad, {C, samples}, kThreads, kWarp * sizeof(A)},
             mean_fill_backward_kernel<T>, in<T>(grad), in<int32_t>(boxes), out<A>(*share), V, B,
             static_cast<int>(C), static_cast<int>(H), static_cast<int>(W),
             image.channels_last ? int64_t{1} : H * W, image.channels_last ? C : int64_t{1});
    }
    const bool vectors = aligned16(grad.const_data_ptr(), E * sizeof(T)) &&
                         aligned16(result.const_data_ptr(), E * sizeof(T));
    with_places<T>(E, vectors, [&](auto access, auto index) {
      constexpr int N = decltype(access)::value;
      using I = decltype(index);
      launch({"masked_views_backward",
              grad,
              {ceil_div(E, kThreads * kUnroll<N> * N), samples},
              kThreads},
             image.channels_last ? masked_views_backward_kernel<T, N, true, I>
                                 : masked_views_backward_kernel<T, N, false, I>,
             in<T>(grad), in<int32_t>(boxes), share ? in<A>(*share) : nullptr, out<T>(result), V,
             B, Shape<I>(C, H, W, image.channels_last), static_cast<I>(E));
    });
  });
  return result;
}

}  // namespace

SANM_CUDA_KERNELS(m) {
  m.impl("modulate_backward.cuda", TORCH_BOX(&modulate_backward));
  m.impl("masked_views_backward.cuda", TORCH_BOX(&masked_views_backward));
}

}  // namespace sanm
