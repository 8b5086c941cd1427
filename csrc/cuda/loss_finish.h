// The final reduction of masked_loss's forward: from sums of blocks of rows to p̄ and the losses.
#pragma once

#include <atomic>

#include "cuda/softmax.h"

namespace sanm {
namespace {

constexpr int kFinishThreads = 512;

// Sums over rows: labelled and unlabelled losses, how many of them count, Σ p log p.
enum { kLabeled, kUnlabeled, kLabeledCount, kUnlabeledCount, kConfidence, kSums };

// The run-time numbers: λ, λ_u, ρ, ν.
enum { kLam, kUnlabeledWeight, kPriorWeight, kConfidenceWeight, kNumbers };

// weight·term, and 0 for weight 0 even where the term is infinite
SANM_DEVICE double weighted(double weight, double term) { return weight == 0 ? 0 : weight * term; }

// π, or the uniform prior.
template <typename A>
struct Prior {
  const A* data;  // (K,) or null
  int64_t stride;
  SANM_DEVICE A operator()(int k, int K) const { return data ? data[k * stride] : A{1} / K; }
};

template <typename A>
Prior<A> prior_of(const OptTensor& prior) {
  return {in_or_null<A>(prior), prior ? prior->stride(0) : 0};
}

// Σ of `count` numbers, by a warp; other blocks may have written them.
SANM_DEVICE double warp_sum(const double* values,  // (count,)
                            int64_t count) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = lane(); i < count; i += kWarp) sum += __ldcg(values + i);
  return warp_reduce(sum, Sum());
}

// Count the blocks of a launch that have finished; the last one resets its counter to 0.
#ifdef SANM_CUDA_HOST
constexpr int kCounters = 1;  // launches do not overlap
#else
constexpr int kCounters = 8192;
#endif
__device__ unsigned counters[2 * kCounters];

// A counter that no concurrent launch uses. Counters are reused after kCounters launches, more than
// can be pending; captured launches, which run again whenever their graph is replayed, have
// kCounters of their own, reused after so many captures.
inline int take_counter(const Tensor& on) {
  static std::atomic<unsigned> taken[2];
  const int captured = OnDevice(on).captured();
  return captured * kCounters + static_cast<int>(taken[captured]++ % kCounters);
}

// Whether this block is the last of `blocks` to arrive; it then sees what the others have written.
SANM_DEVICE bool last_of(unsigned blocks, int counter,
                         int* last) {  // () shared, unused before and after
  if (threadIdx.x == 0) {
    __threadfence();
    *last = blocks == 1 || atomicAdd(&counters[counter], 1u) == blocks - 1;
    if (*last) counters[counter] = 0;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

// For p̄ below this, a p that contributes to it may have underflowed to 0: log p̄ (< 0) is stored
// instead.
template <typename A>
constexpr A kRare = std::numeric_limits<A>::min() / std::numeric_limits<A>::epsilon();

template <typename S, typename A = acc_t<S>>
struct Finish {
  Logits<S> logits;     // (n, K)
  const A* normalizer;  // (n, 2): maximum, log-sum; other blocks may have written it
  Prior<A> prior;
  A *total, *labeled, *unlabeled, *penalty, *confidence;  // (), written
  A* p_mean;                                              // (K,), written
  int64_t* counts;  // (2,), written: labelled and unlabelled rows that count
  double* penalties;  // (blocks,), written, read by the last block; of the second launch only
  bool mean;
  Numbers<kNumbers> numbers;

  SANM_DEVICE double rows() const { return static_cast<double>(logits.n > 1 ? logits.n : 1); }

  SANM_DEVICE double log_p(int64_t i, int k) const {
    return static_cast<double>(logits.at(i, k)) - __ldcg(normalizer + 2 * i) -
           __ldcg(normalizer + 2 * i + 1);
  }

  // log p̄ of class k, from log p
  SANM_DEVICE double log_mean(int k) const {
    double top = -INFINITY;
#pragma unroll 4
    for (int64_t i = 0; i < logits.n; ++i) top = Max()(top, log_p(i, k));
    if (top == -INFINITY) return top;
    double sum = 0;
#pragma unroll 4
    for (int64_t i = 0; i < logits.n; ++i) sum += std::exp(static_cast<A>(log_p(i, k) - top));
    return top + std::log(sum / rows());
  }

  // Writes p̄ of class k and returns the class's part of the penalty. column: Σ p over the rows.
  SANM_DEVICE double mean_of(int k, double column) const {
    const double mean_k = column / rows(), pi = prior(k, logits.K);
    const bool rare = mean_k < kRare<A>;
    const double log_k = rare ? log_mean(k) : std::log(mean_k);
    p_mean[k] = static_cast<A>(rare ? log_k : mean_k);
    return pi != 0 && logits.n > 0 ? pi * (std::log(pi) - log_k) : 0;
  }

  // By one thread.
  SANM_DEVICE void write(const double* sums,  // (kSums,)
                         double divergence) const {
    double of_labeled = sums[kLabeled], of_unlabeled = sums[kUnlabeled];
    if (mean) {
      of_labeled /= Max()(1.0, sums[kLabeledCount]);
      of_unlabeled /= Max()(1.0, sums[kUnlabeledCount]);
    }
    const double of_confidence = sums[kConfidence] / rows();
    counts[0] = static_cast<int64_t>(sums[kLabeledCount]);
    counts[1] = static_cast<int64_t>(sums[kUnlabeledCount]);
    *labeled = static_cast<A>(of_labeled);
    *unlabeled = static_cast<A>(of_unlabeled);
    *penalty = static_cast<A>(divergence);
    *confidence = static_cast<A>(of_confidence);
    *total = static_cast<A>(of_labeled + weighted(numbers[kUnlabeledWeight], of_unlabeled) +
                            weighted(numbers[kPriorWeight], divergence) +
                            weighted(numbers[kConfidenceWeight], of_confidence));
  }
};

// Block j: p̄ of classes 32·j …, one per lane, the parts divided among the warps; the last block
// also the losses. Shared memory: scratch; then (warps, kWarp) doubles.
template <typename S>
__global__ void __launch_bounds__(kFinishThreads, 1) masked_loss_finish_kernel(
    const acc_t<S>* columns,  // (parts, K)
    const double* sums,       // (kSums, parts)
    int64_t parts, int counter, const Finish<S> finish) {
  double* share = shared_memory<double>(kScratch);
  const int K = finish.logits.K;
  const int k = blockIdx.x * kWarp + lane();
  double column = 0;
  if (k < K) {
#pragma unroll 16
    for (int64_t i = warp(); i < parts; i += warps()) column += columns[i * K + k];
  }
  share[warp() * kWarp + lane()] = column;
  __syncthreads();
  double* totals = shared_memory<double>();  // (kSums,), before `last`
  if (warp() > 0 && warp() <= kSums) {
    const double sum = warp_sum(sums + (warp() - 1) * parts, parts);
    if (lane() == 0) totals[warp() - 1] = sum;
  }
  if (warp() == 0) {
    column = 0;
    for (int w = 0; w < warps(); ++w) column += share[w * kWarp + lane()];
    const double term = warp_reduce(k < K ? finish.mean_of(k, column) : 0, Sum());
    if (lane() == 0) finish.penalties[blockIdx.x] = term;
  }
  if (!last_of(gridDim.x, counter, reinterpret_cast<int*>(totals + kSums)) || warp() > 0) return;
  const double divergence = warp_sum(finish.penalties, gridDim.x);
  if (lane() == 0) finish.write(totals, divergence);
}

}  // namespace
}  // namespace sanm
