// Gradients of masked_forward: of the targets, of the images, and of the one-pass classifier.
//
// Sums over rows, boxes and batches are taken in float (double for double) by one warp or block
// each, in an order that depends on the sizes alone.
#include "cuda/common.h"
#include "matrix.h"

namespace sanm {
namespace {

constexpr int kThreads = 256;
// Accesses in flight per source; fewer where each brings many elements, which cost registers.
template <int N>
constexpr int kUnroll = N > 4 ? 2 : 4;
constexpr int64_t kSamples = 65535;  // along y of a grid; more of them take turns
constexpr int64_t kLongRow = 1024;  // elements from which on a row is a block's work, not a warp's

// Threads that share a row.
template <bool kBlock>
struct Team {
  SANM_DEVICE static int size() { return kBlock ? blockDim.x : kWarp; }
  SANM_DEVICE static int rank() { return kBlock ? threadIdx.x : lane(); }
  SANM_DEVICE static int64_t first() {
    return kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * warps() + warp();
  }
  SANM_DEVICE static int64_t step() {
    return kBlock ? gridDim.x : static_cast<int64_t>(gridDim.x) * warps();
  }
  template <typename X, typename Op>
  SANM_DEVICE static X reduce(X x, Op op, X identity) {
    if constexpr (kBlock)
      return block_reduce(x, op, identity, shared_memory<X>());
    else
      return warp_reduce(x, op);
  }
};

// Calls body(kBlock, grid, shared bytes) for rows of K elements, of which there are B.
template <typename Body>
void with_team(int64_t B, int64_t K, const Body& body) {
  constexpr int64_t kShared = kWarp * sizeof(Peak<double>);
  if (K >= kLongRow)
    body(std::true_type(), blocks_for(B, 1), kShared);
  else
    body(std::false_type(), blocks_for(B, kThreads / kWarp), int64_t{0});
}

// ---- Targets.

// t' = t + constants, except where the whole t[j*] was dropped: there t'[j*] = 0 and every other
// target holds t[j*]/(K − 1). Hence, summed over the draw sets,
//   dt[k] = Σ_s g_s[k]  for k ≠ j*,
//   dt[j*] = Σ_s (emptied_s ? (Σ_k g_s[k] − g_s[j*])/(K − 1) : g_s[j*]),
// emptied_s = clamp and t[j*] < ratio_s. A vector's elements are neighbours: then g_k = t_k = 1.
template <typename T, int N, bool kBlock>
__global__ void __launch_bounds__(kThreads, 4) modulate_backward_kernel(
    const T* grad,       // (S, B, K), strides (g_s, g_b, g_k)
    const T* targets,    // (B, K), strides (t_b, t_k)
    const float* ratio,  // (S, B)
    T* result,           // (B, K), written
    int64_t S, int64_t B, int64_t K, int64_t g_s, int64_t g_b, int64_t g_k, int64_t t_b,
    int64_t t_k, bool clamp) {
  using A = acc_t<T>;
  using Row = Team<kBlock>;
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
    A extra = 0;  // what j* gets on top of its own gradients
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
      with_team(B, K, [&](auto block, int64_t blocks, int64_t shared) {
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

// ---- Where an element is. Indices I into a sample are 32 bits wide where these are enough.

// Calls body(N, I()) for samples of E elements.
template <typename T, typename Body>
void with_places(int64_t E, bool vectors, const Body& body) {
  if (E > INT32_MAX)
    body(std::integral_constant<int, 1>(), uint64_t{});
  else
    with_access<T>(vectors, [&](auto access) { body(access, uint32_t{}); });
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

  // Bit e: the e-th of N elements from a place on lies inside. Run by run: of a row's elements, or
  // of a pixel's where these are neighbours.
  template <int N, bool kChannelsLast, typename I>
  SANM_DEVICE unsigned covers(Place<kChannelsLast> at, const Shape<I>& s) const {
    const auto holds = [&] {
      return at.y >= top && at.y < bottom && at.x >= left && at.x < right;
    };
    if constexpr (N == 1) return holds();
    const auto low = [](int count) { return (1u << count) - 1; };  // so many bits
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
      // The box's pixels in turn, a block of them at a time.
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

// A pixel outside a view's box passes the view's gradient on; with the mean fill every pixel of a
// channel also gets its share:  dx = share + Σ_v [outside box_v]·g_v.
// Block (tile, b); a vector that a box covers is not read.
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
      unsigned seen[kUnroll<N>];  // bit e: element e lies outside the box
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

// ---- The one-pass classifier: logits = z·Wᵀ + bias, z = Σ F·v/Σv, loss = −Σ t'·log_softmax / B.
//   d = dlogits = (softmax·Σt' − t')·grad_loss/B + grad_logits,
//   dbias = Σ_b d,  dW = dᵀ·z,  dz = d·W,  dF = dz ⊗ v/Σv.

template <typename A, typename T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) logits_backward_kernel(
    const A* grad_logits,  // (B, K), strides (g_b, g_k), or null
    const A* grad_loss,    // () or null
    const A* logits,       // (B, K)
    const T* targets,      // (B, K), strides (t_b, t_k)
    A* d,                  // (B, K), written
    int64_t B, int64_t K, int64_t g_b, int64_t g_k, int64_t t_b, int64_t t_k) {
  using Row = Team<kBlock>;
  const int64_t begin = Row::rank(), step = Row::size();
  const A scale = grad_loss ? *grad_loss / static_cast<A>(B) : A{0};
  for (int64_t b = Row::first(); b < B; b += Row::step()) {
    const A* z = logits + b * K;
    const T* t = targets + b * t_b;
    A top = static_cast<A>(-INFINITY), mass = 0, total = 0;
    if (grad_loss) {
      LongSum<A> masses, totals;
      for (int64_t k = begin; k < K; k += step) {
        top = Max()(top, z[k]);
        masses.add(static_cast<A>(widen(t[k * t_k])));
      }
      top = Row::reduce(top, Max(), static_cast<A>(-INFINITY));
      mass = Row::reduce(masses.value(), Sum(), A{0});
      for (int64_t k = begin; k < K; k += step) totals.add(std::exp(z[k] - top));
      total = Row::reduce(totals.value(), Sum(), A{0});
    }
    for (int64_t k = begin; k < K; k += step) {
      A value = 0;
      if (grad_loss)
        value = (std::exp(z[k] - top) / total * mass - static_cast<A>(widen(t[k * t_k]))) * scale;
      if (grad_logits) value += grad_logits[b * g_b + k * g_k];
      d[b * K + k] = value;
    }
  }
}

// dbias[k] = Σ_b d[b, k]. A block takes a warp's width of columns; each warp every warps()-th row.
template <typename A>
__global__ void __launch_bounds__(kThreads) bias_backward_kernel(
    const A* d,  // (B, K)
    A* bias,     // (K,), written
    int64_t B, int64_t K) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarp + lane();
  A sum = 0;
  for (int64_t b = warp(); k < K && b < B; b += warps()) sum += d[b * K + k];
  A* sums = shared_memory<A>();  // (warps(), kWarp)
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp() != 0 || k >= K) return;
  for (int w = 1; w < warps(); ++w) sum += sums[w * kWarp + lane()];
  bias[k] = sum;
}

// result[b] = left[b] ⊗ right[b]: dz ⊗ v/Σv in NCHW order, v/Σv ⊗ dz in NHWC. Block (tile, b).
template <typename T, int N, typename I>
__global__ void __launch_bounds__(kThreads) features_backward_kernel(
    const acc_t<T>* left,   // (B, height)
    const acc_t<T>* right,  // (B, width)
    T* result,              // (B, E), written
    int64_t B, I E, int64_t height, I width, Divisor<I> by_width) {
  const I start = static_cast<I>(blockIdx.x) * (kThreads * kUnroll<N> * N) + threadIdx.x * N;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const acc_t<T>*rows = left + b * height, *columns = right + b * width;
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const I at = start + u * (kThreads * N);
      if (at >= E) break;
      I column = at, row = by_width.split(column);
      Vector<T, N> product;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        product[e] = narrow<T>(rows[row] * columns[column]);
        if (++column == width) column = 0, ++row;
      }
      store_global<kStream>(result + b * E + at, product);
    }
  }
}

// grad_logits (B, K), grad_loss (), features (B, C, h, w), weight (K, C), logits (B, K),
// targets (B, K), pooled (B, C), visible (B, h, w) → gradients of features, weight, bias
std::tuple<Tensor, Tensor, Tensor> classifier_backward(
    OptTensor grad_logits, OptTensor grad_loss, const Tensor& features, const Tensor& weight,
    const Tensor& logits_, const Tensor& targets, const Tensor& pooled, const Tensor& visible_) {
  check_classifier_backward(grad_logits, grad_loss, features, weight, logits_, targets, pooled,
                            visible_);
  const Tensor logits = packed(logits_), visible = packed(visible_);
  const int64_t B = logits.size(0), K = logits.size(1), C = features.size(1),
                n = features.size(2) * features.size(3), E = C * n;
  const ScalarType type = logits.scalar_type();
  const Tensor d = new_tensor(logits, {B, K}, type), dbias = new_tensor(logits, {K}, type),
               dz = new_tensor(logits, {B, C}, type), dweight = new_tensor(logits, {K, C}, type);
  dispatch(targets.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto go = [&](auto acc_zero) {
      using A = decltype(acc_zero);
      with_team(B, K, [&](auto block, int64_t blocks, int64_t shared) {
        launch({"classifier_backward", logits, {blocks}, kThreads, shared},
               logits_backward_kernel<A, T, decltype(block)::value>,
               grad_logits ? in<A>(*grad_logits) : nullptr, grad_loss ? in<A>(*grad_loss) : nullptr,
               in<A>(logits), in<T>(targets), out<A>(d), B, K,
               grad_logits ? grad_logits->stride(0) : 0, grad_logits ? grad_logits->stride(1) : 0,
               targets.stride(0), targets.stride(1));
      });
      launch({"classifier_backward", logits, {ceil_div(K, kWarp)}, kThreads, kThreads * sizeof(A)},
             bias_backward_kernel<A>, in<A>(d), out<A>(dbias), B, K);
    };
    type == ScalarType::Double ? go(double{}) : go(float{});
  });
  multiply(d, torch::stable::to(weight, type), dz);
  multiply(torch::stable::transpose(d, 0, 1), pooled, dweight);
  const bool channels_last = is_channels_last(features);
  const Tensor result =
      new_tensor(features, {B, C, features.size(2), features.size(3)}, features.scalar_type(),
                 channels_last);
  const Tensor &left = channels_last ? visible : dz, &right = channels_last ? dz : visible;
  if (E > 0)
    dispatch(features.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const bool vectors = aligned16(result.const_data_ptr(), E * sizeof(T));
      const int64_t width = channels_last ? C : n;
      with_places<T>(E, vectors, [&](auto access, auto index) {
        constexpr int N = decltype(access)::value;
        using I = decltype(index);
        launch({"classifier_backward",
                features,
                {ceil_div(E, kThreads * kUnroll<N> * N), std::min<int64_t>(B, kSamples)},
                kThreads},
               features_backward_kernel<T, N, I>, in<acc_t<T>>(left), in<acc_t<T>>(right),
               out<T>(result), B, static_cast<I>(E), E / width, static_cast<I>(width),
               Divisor<I>(width));
      });
    });
  return {result, torch::stable::to(dweight, weight.scalar_type()), dbias};
}

}  // namespace

SANM_CUDA_KERNELS(m) {
  m.impl("modulate_backward.cuda", TORCH_BOX(&modulate_backward));
  m.impl("masked_views_backward.cuda", TORCH_BOX(&masked_views_backward));
  m.impl("classifier_backward.cuda", TORCH_BOX(&classifier_backward));
}

}  // namespace sanm
