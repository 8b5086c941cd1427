// The one-pass classifier and its gradients: logits = z·Wᵀ + bias with z = Σ F·v/Σv, where v is the
// fraction of a cell outside the box, and loss = −Σ t·log_softmax / B.
//
// A launch for the pooling, torch's matrix product, a launch for the cross-entropies with one block
// per row, and one for their mean.
#include "cuda/common.h"
#include "cuda/gradients.h"
#include "math/box.h"
#include "matrix.h"

namespace sanm {
namespace {

constexpr int kChannels = 8;  // channels in flight per warp
constexpr int64_t kSums = kWarp * sizeof(double);  // bytes of scratch for a block's reductions

// Features (B, C, h, w), contiguous or channels_last, of images (H, W). A sample is processed by
// `parts` blocks, each of which pools `each` channels.
struct Map {
  int C, h, w, H, W, parts, each;
  bool channels_last;
};

// v / Σv of the map's cells → share; zeros if nothing is visible.
template <typename A>
SANM_DEVICE void visibility(const Map& map, const int32_t* box, A* share) {
  const int n = map.h * map.w, top = box[0], left = box[1], bottom = box[2], right = box[3];
  const auto visible = [&](int k) {
    const A rows = overlap<A>(top, bottom, k / map.w, map.h, map.H);
    const A v = A{1} - rows * overlap<A>(left, right, k % map.w, map.w, map.W);
    return v > 0 ? v : A{0};
  };
  A total = 0;
  for (int k = threadIdx.x; k < n; k += blockDim.x) total += visible(k);
  total = block_sum(total, shared_memory<A>());
  for (int k = threadIdx.x; k < n; k += blockDim.x) share[k] = total > 0 ? visible(k) / total : 0;
  __syncthreads();
}

// Block b·parts + part: z of its channels. In NHWC a thread sums N channels at a time, in NCHW a
// warp kChannels, its lanes over the cells; the result does not depend on the number of parts.
// v / Σv is in shared memory or, if it does not fit, in the result.
template <typename T, int N, bool kShared>
__global__ void __launch_bounds__(kThreads, 4) pool_kernel(
    const T* features,   // (B, C, h, w)
    const int32_t* box,  // (B, 4)
    acc_t<T>* visible,   // (B, h, w), written
    acc_t<T>* pooled,    // (B, C), written
    const Map map) {
  using A = acc_t<T>;
  const int n = map.h * map.w, part = blockIdx.x % map.parts;
  const int64_t b = blockIdx.x / map.parts;
  A *const own = visible + b * n, *const z = pooled + b * map.C;
  A* share = own;
  if constexpr (kShared) share = shared_memory<A>(kSums);
  visibility(map, box + 4 * b, share);
  if (kShared && part == 0)
    for (int k = threadIdx.x; k < n; k += blockDim.x) own[k] = share[k];
  const T* f = features + b * n * map.C;
  const int first = part * map.each, last = min(first + map.each, map.C);
  if (map.channels_last) {
    for (int c = first + threadIdx.x * N; c < last; c += blockDim.x * N) {
      A sum[N] = {};
#pragma unroll 4
      for (int k = 0; k < n; ++k) {
        const Vector<T, N> x = load_global<N>(f + static_cast<int64_t>(k) * map.C + c);
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] += share[k] * widen(x[e]);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) z[c + e] = sum[e];
    }
    return;
  }
  for (int c = first + warp(); c < last; c += kChannels * warps()) {
    A sum[kChannels] = {};
    for (int k = lane(); k < n; k += kWarp)
#pragma unroll
      for (int u = 0; u < kChannels; ++u) {
        const int channel = c + u * warps();
        if (channel >= last) break;
        sum[u] += share[k] * widen(load_global<1>(f + static_cast<int64_t>(channel) * n + k)[0]);
      }
#pragma unroll
    for (int u = 0; u < kChannels; ++u) {
      const int channel = c + u * warps();
      const A all = warp_reduce(sum[u], Sum());
      if (lane() == 0 && channel < last) z[channel] = all;
    }
  }
}

// Block b: logits of row b plus bias, and their cross-entropy −Σ_k t_k log softmax(z)_k.
template <typename A>
__global__ void __launch_bounds__(kThreads, 4) cross_entropy_kernel(
    A* logits,            // (B, K), read and written
    const A* bias,        // (K,) or null
    const void* targets,  // (B, K) of type `type`
    ScalarType type, int64_t K,
    A* rows) {  // (B,), written
  A* scratch = shared_memory<A>();
  A* z = logits + blockIdx.x * K;
  A top = static_cast<A>(-INFINITY);
  LongSum<A> sum, loss;
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
    if (bias) z[k] += bias[k];
    top = z[k] > top ? z[k] : top;
  }
  top = block_max(top, scratch);
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x) sum.add(exp(z[k] - top));
  const A log_sum = log(block_sum(sum.value(), scratch));
  device_dispatch(type, [&](auto zero) {
    const auto* t = static_cast<const decltype(zero)*>(targets) + blockIdx.x * K;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
      loss.add(static_cast<A>(widen(t[k])) * (log_sum - (z[k] - top)));
  });
  const A all = block_sum(loss.value(), scratch);
  if (threadIdx.x == 0) rows[blockIdx.x] = all;
}

// One block: the mean of rows (B,), 0 if empty → loss ().
template <typename A>
__global__ void __launch_bounds__(kThreads) mean_kernel(const A* rows, int64_t B, A* loss) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < B; b += blockDim.x) sum += rows[b];
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) *loss = static_cast<A>(sum / (B > 0 ? B : 1));
}

// features (B, C, h, w) and box (B, 4) in pixels of (H, W) → pooled (B, C), visible (B, h, w)
void pool(const Image& features, const Tensor& box, int64_t H, int64_t W, const Tensor& pooled,
          const Tensor& visible) {
  const Tensor& x = features.tensor;
  const int64_t B = x.size(0), C = x.size(1), n = x.size(2) * x.size(3);
  expect(row_elements(x) < kIntEnd, "features: a sample of less than 2^31 elements was expected");
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t shared = kSums + n * sizeof(acc_t<T>);
    const bool fits = shared <= shared_limit(x),
               vectors = features.channels_last && aligned16(x.const_data_ptr(), C * sizeof(T));
    // Two blocks per multiprocessor, unless these have less than about 64 channels, one step of
    // their warps in NCHW.
    const int64_t parts = std::min(ceil_div(2 * multiprocessors(x), std::max<int64_t>(B, 1)),
                                   ceil_div(C, 64)),
                  each = ceil_div(ceil_div(C, fits ? parts : 1), kVector<T>) * kVector<T>;
    const Map map{static_cast<int>(C),
                  static_cast<int>(x.size(2)),
                  static_cast<int>(x.size(3)),
                  static_cast<int>(H),
                  static_cast<int>(W),
                  static_cast<int>(ceil_div(C, each)),
                  static_cast<int>(each),
                  features.channels_last};
    with_access<T>(vectors, [&](auto access) {
      constexpr int N = decltype(access)::value;
      launch({"masked_classifier: pooling", x, {B * map.parts}, kThreads, fits ? shared : kSums},
             fits ? pool_kernel<T, N, true> : pool_kernel<T, N, false>, in<T>(x),
             in<int32_t>(box), out<acc_t<T>>(visible), out<acc_t<T>>(pooled), map);
    });
  });
}

// features (B, C, h, w), box (B, 4) in pixels of (H, W), targets (B, K), weight (K, C), bias (K,)
// → logits (B, K), loss (), z (B, C), v/Σv (B, h, w)
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_classifier(
    const Tensor& features, const Tensor& box, const Tensor& targets_, const Tensor& weight_,
    OptTensor bias_, int64_t H, int64_t W) {
  check_masked_classifier(features, box, targets_, weight_, bias_, H, W);
  const ScalarType type = acc_type(features);
  const int64_t B = features.size(0), C = features.size(1), K = weight_.size(0);
  const auto made = [&](const std::vector<int64_t>& size) {
    return new_tensor(features, size, type);
  };
  const Tensor logits = made({B, K}), loss = made({}), pooled = made({B, C}),
               visible = made({B, features.size(2), features.size(3)}), rows = made({B});
  pool(Image(features), packed(box), H, W, pooled, visible);
  const Tensor weight = torch::stable::to(weight_, type), targets = packed(targets_);
  multiply(pooled, torch::stable::transpose(weight, 0, 1), logits);
  const OptTensor bias = bias_ ? packed(OptTensor(torch::stable::to(*bias_, type))) : bias_;
  dispatch(type, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    launch({"masked_classifier: cross-entropy", logits, {B}, kThreads, kSums},
           cross_entropy_kernel<A>, out<A>(logits), in_or_null<A>(bias), targets.const_data_ptr(),
           targets.scalar_type(), K, out<A>(rows));
    launch({"masked_classifier: loss", logits, {1}, kThreads, kSums}, mean_kernel<A>, in<A>(rows),
           B, out<A>(loss));
  });
  return {logits, loss, pooled, visible};
}

// ---- Gradients.
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
  using Row = RowTeam<kBlock>;
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

// dbias[k] = Σ_b d[b, k]. A block sums kWarp columns, one per lane; each warp every warps()-th row.
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
std::tuple<Tensor, Tensor, Tensor> masked_classifier_backward(
    OptTensor grad_logits, OptTensor grad_loss, const Tensor& features, const Tensor& weight,
    const Tensor& logits_, const Tensor& targets, const Tensor& pooled, const Tensor& visible_) {
  check_masked_classifier_backward(grad_logits, grad_loss, features, weight, logits_, targets,
                                   pooled, visible_);
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
      with_rows(B, K, [&](auto block, int64_t blocks, int64_t shared) {
        launch({"masked_classifier_backward", logits, {blocks}, kThreads, shared},
               logits_backward_kernel<A, T, decltype(block)::value>,
               grad_logits ? in<A>(*grad_logits) : nullptr, grad_loss ? in<A>(*grad_loss) : nullptr,
               in<A>(logits), in<T>(targets), out<A>(d), B, K,
               grad_logits ? grad_logits->stride(0) : 0, grad_logits ? grad_logits->stride(1) : 0,
               targets.stride(0), targets.stride(1));
      });
      launch({"masked_classifier_backward", logits, {ceil_div(K, kWarp)}, kThreads,
              kThreads * sizeof(A)},
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
        launch({"masked_classifier_backward",
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
  m.impl("masked_classifier.cuda", TORCH_BOX(&masked_classifier));
  m.impl("masked_classifier_backward.cuda", TORCH_BOX(&masked_classifier_backward));
}

}  // namespace sanm
