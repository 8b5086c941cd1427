// The one-pass classifier of masked_forward: pooling of what a box leaves visible, logits, loss.
#pragma once

#include "cuda/activation.h"
#include "cuda/common.h"
#include "cuda/energy.h"
#include "cuda/painter.h"
#include "masked_forward.h"
#include "matrix.h"

namespace sanm {

constexpr int kRowThreads = 256;
constexpr int64_t kSums = kWarp * sizeof(double);  // scratch of a block's reductions

// v / Σv (h, w) → share: v is the part of a cell that the box leaves visible; zeros where none is.
template <typename A>
SANM_DEVICE void visibility(const Team& team, const Taps& taps, const Box& box, A* share) {
  const int n = taps.h * taps.w;
  const auto visible = [&](int k) {
    const A rows = overlap<A>(box.top, box.bottom, k / taps.w, taps.h, taps.H);
    const A v = A{1} - rows * overlap<A>(box.left, box.right, k % taps.w, taps.w, taps.W);
    return v > 0 ? v : A{0};
  };
  const A total = team.reduce(n, visible, Sum(), A{0}, shared_memory<A>());
  for (int k = team.rank(); k < n; k += team.size())
    share[k] = total > 0 ? visible(k) / total : 0;
  team.sync();
}

// z_c = Σ v·F of the channels `own`. source: element (c, k) of the slice is at c·c_step + k·k_step.
template <typename Source, typename A>
SANM_DEVICE void pool(const Source& source, int64_t c_step, int64_t k_step, const Slice& own, int n,
                      const A* share, A* pooled) {
  if (k_step == 1) {  // cells lie together: a warp takes a channel
    for (int c = warp(); c < own.count; c += warps()) {
      A sum = 0;
      for (int k = lane(); k < n; k += kWarp) sum += share[k] * widen(source[c * c_step + k]);
      sum = warp_reduce(sum, Sum());
      if (lane() == 0) pooled[own.first + c] = sum;
    }
    return;
  }
  for (int c = threadIdx.x; c < own.count; c += blockDim.x) {
    A sum = 0;
    for (int k = 0; k < n; ++k) sum += share[k] * widen(source[c * c_step + k * k_step]);
    pooled[own.first + c] = sum;
  }
}

// Block b: logits of row b plus bias, and their cross-entropy −Σ_k t_k log softmax(z)_k.
template <typename A>
__global__ void __launch_bounds__(kRowThreads, 4) cross_entropy_kernel(
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

// One block: the mean of rows (B,), 0 of none → loss ().
template <typename A>
__global__ void __launch_bounds__(kRowThreads) mean_kernel(const A* rows, int64_t B, A* loss) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < B; b += blockDim.x) sum += rows[b];
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) *loss = static_cast<A>(sum / (B > 0 ? B : 1));
}

// logits (B, K) = pooled (B, C)·Wᵀ + bias, and the mean cross-entropy against targets (B, K).
inline void classify(const Inputs& in, const Outputs& o) {
  const ScalarType type = o.pooled.scalar_type();
  const Tensor weight = torch::stable::to(*in.weight, type);
  multiply(o.pooled, torch::stable::transpose(weight, 0, 1), o.logits);
  const OptTensor bias = in.bias ? packed(OptTensor(torch::stable::to(*in.bias, type))) : in.bias;
  const int64_t B = o.logits.size(0), K = o.logits.size(1);
  const Tensor rows = new_tensor(o.logits, {B}, type);
  dispatch(type, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    launch({"masked_forward: cross-entropy", o.logits, {B}, kRowThreads, kSums},
           cross_entropy_kernel<A>, out<A>(o.logits), in_or_null<A>(bias),
           o.targets.const_data_ptr(), o.targets.scalar_type(), K, out<A>(rows));
    launch({"masked_forward: loss", o.logits, {1}, kRowThreads, kSums}, mean_kernel<A>,
           sanm::in<A>(rows), B, out<A>(o.loss));
  });
}

}  // namespace sanm
