// The training loss on rows of logits z (n, K): cross-entropy of the first n_x rows, squared error
// of the rest, prior and confidence penalty, against targets modulated and mixed on the fly.
//
// With e_k = exp(z_k − max z) and p = e / Σe, kept in registers (K ≤ 1024, or 512 doubles) or
// shared memory, or, for the longest rows, computed twice:
//   cross-entropy  Σ_k t_k (log Σe − (z_k − max z))     squared error  (1/K) Σ_k (p_k − t_k)²
//   Σ_k p_k log p_k = Σ_k p_k (z_k − max z) − log Σe.
// Forward is one launch: each block sums p over its rows, a cluster adds the column sums of its
// blocks through (distributed) shared memory, and the last cluster to finish adds those of all, in
// order, and writes the losses. If that is too much for one block (many classes, or no clusters), a
// second launch does it. Backward is one launch and needs p̄ = mean p, maxima, log Σe and counts:
//   dL/dz_k = p_k (h_k − Σ_j p_j h_j) + [labelled] c (p_k Σ_j t_j − t_k),
//   h_k = [unlabelled] c (2/K)(p_k − t_k) − (dL/dP) π_k / (n p̄_k) + (dL/dN) log p_k / n.
// max z and log Σe are stored separately: in their float32 sum a large maximum would round log Σe
// away. For a class whose p̄ is so small that some p underflow to 0, log p̄ (< 0) is computed from
// log p and stored instead of p̄, and p_ik/p̄_k is e^{log p_ik − log p̄_k}; the other terms of its
// gradient are negligible.
#include "cuda/loss_finish.h"
#include "cuda/targets.h"

namespace sanm {
namespace {

constexpr int kCluster = 8;                   // largest cluster, in blocks
constexpr int kColumns = kScratch + 64;       // offset of the column sums or the row, in bytes
constexpr int kHoldBytes = 47 * 1024;         // largest row in shared memory, in all below 48 KiB
constexpr int64_t kFinishBytes = 128 * 1024;  // most column sums that one block adds, in bytes

// A row's maximum; a row that is not whole is copied to `held`, if given.
template <typename Shape, typename S, typename A>
SANM_DEVICE A max_row(const Logits<S>& logits, int64_t i, A (&x)[Shape::C],
                      A* held) {  // (K,) or null
  const int K = logits.K;
  A top = static_cast<A>(-INFINITY);
  for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
    if (!Shape::kWhole) logits.template load<Shape>(i, first, x);
    Shape::each_class(first, K, [&](int c, int k) {
      top = Max()(top, x[c]);
      if (!Shape::kWhole && held && k < K) held[k] = x[c];
    });
  }
  return Shape::max(top);
}

// Parts of a block that each sum p over their rows: the warps, or the groups of warps per row.
template <typename Shape>
constexpr int kParts = Shape::kThreads / (Shape::kBlock ? Shape::G : kWarp);

// Reduces the lanes' sums of p, `mine`, to the block's column sums.
template <typename Shape, typename A>
SANM_DEVICE void add_columns(const A (&mine)[Shape::C], int K,
                             double* columns) {  // shared (K,), written; then (kParts, K) of A
  A* const parts = reinterpret_cast<A*>(columns + K);
  Shape::each_class(0, K, [&](int c, int k) {
    A sum = mine[c];
#pragma unroll
    for (int distance = Shape::G; distance < kWarp; distance *= 2)
      sum += shuffle_xor(sum, distance);
    const int part = Shape::kBlock ? threadIdx.x / Shape::G : warp();
    if (k < K && (Shape::kBlock || lane() < Shape::G)) parts[part * K + k] = sum;
  });
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += Shape::kThreads) {
    double sum = 0;
#pragma unroll
    for (int part = 0; part < kParts<Shape>; ++part) sum += parts[part * K + k];
    columns[k] = sum;
  }
}

// Grid-stride over rows. Shared memory: scratch; the block's sums; then its column sums (K,) and
// those of its parts (kParts<Shape>, K) or, if rows are not whole and `hold`, the row (K,).
template <typename Shape, typename S>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) masked_loss_kernel(
    const Logits<S> logits,                    // (n, K)
    const Targets<typename Shape::A> targets,  // (M, K) or (M,)
    typename Shape::A* per_sample,             // (n,), written
    typename Shape::A* normalizer,             // (n, 2), written: maximum, log-sum
    typename Shape::A* columns,  // (clusters, K), written: Σ p over the rows of a cluster's blocks
    double* sums,                // (kSums, clusters), written
    int64_t num_labeled, bool hold,
    int counter,  // −1: the second launch finishes
    const Finish<S> finish) {
  using A = typename Shape::A;
  const int K = logits.K;
  const int rank = cluster_rank(), blocks = cluster_size();
  const int64_t cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  A* const column = columns + cluster * K;  // if rows are not whole, clusters are single blocks
  A* const held = hold ? shared_memory<A>(kColumns) : nullptr;
  A mine[Shape::C] = {};
  double sum[kSums] = {};
  bool started = false;
  Shape::each_row(logits.n, [&](int64_t i, bool exists) {
    A x[Shape::C];
    Target<Shape> target;
    if (Shape::kWhole) logits.template load<Shape>(i, 0, x);
    target.open(targets, i);
    const A top = max_row<Shape>(logits, i, x, held);
    const bool labeled = i < num_labeled;
    bool valid = false;
    // x, or `held`, becomes e.
    RowSum<Shape> totals, moments, masses, dots, squares;
    A log_sum = 0, scale = 0;
    Shape::two_sweeps([&](auto second) {
      for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
        if (!Shape::kWhole && !held) logits.template load<Shape>(i, first, x);
        // a whole row's target is still in registers
        if (!second || !(Shape::kWhole || labeled)) target.piece(targets, first);
        const A(&t)[Shape::C] = target.own.t;
        A total = 0, moment = 0, mass = 0, dot = 0, square = 0;
        if (!second) {
          Shape::each_class(first, K, [&](int c, int k) {
            if (!Shape::kWhole && held) x[c] = k < K ? held[k] : static_cast<A>(-INFINITY);
            const A centred = x[c] - top, e = std::exp(centred);
            total += e;
            moment += e == 0 ? A{0} : e * centred;
            mass += t[c];
            dot += t[c] == 0 ? A{0} : t[c] * centred;  // 0·log 0 = 0
            x[c] = e;
            if (!Shape::kWhole && held && k < K) held[k] = e;
          });
          totals.add(total), moments.add(moment), masses.add(mass), dots.add(dot);
        } else {
          Shape::each_class(first, K, [&](int c, int k) {
            A e = x[c];
            if (!Shape::kWhole) e = held ? (k < K ? held[k] : A{0}) : std::exp(x[c] - top);
            const A p = e * scale;
            if (Shape::kWhole) {
              mine[c] += exists ? p : A{0};
            } else if (k < K) {
              column[k] = (started ? column[k] : A{0}) + p;
            }
            if (!labeled) square += (p - t[c]) * (p - t[c]);
          });
          squares.add(square);
        }
      }
      if (second) return;
      const A total = totals.row();
      log_sum = std::log(total), scale = 1 / total;
      valid = exists && targets.counts(i);
    });
    started = true;
    const A cross = log_sum * masses.lane() - dots.lane(),
            loss = Shape::sum(labeled ? cross : squares.lane()) / (labeled ? 1 : K) +
                   targets.poison(i),
            entropy = moments.row() * scale - log_sum;
    if (Shape::rank() != 0 || !exists) return;
    per_sample[i] = valid ? loss : A{0};
    normalizer[2 * i] = top, normalizer[2 * i + 1] = log_sum;
    sum[kConfidence] += entropy;
    if (!valid) return;
    sum[kLabeled] += labeled ? loss : A{0};
    sum[kUnlabeled] += labeled ? A{0} : loss;
    sum[kLabeledCount] += labeled;
    sum[kUnlabeledCount] += !labeled;
  });
  double* const whole = shared_memory<double>(kColumns);  // (K,): the block's column sums
  if (Shape::kWhole)
    add_columns<Shape>(mine, K, whole);
  else if (!started)  // the block had no row
    for (int k = threadIdx.x; k < K; k += Shape::kThreads) column[k] = 0;
  double* share = shared_memory<double>();  // (kSums, warps): the scratch of the rows, free now
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const double added = warp_reduce(sum[s], Sum());
    if (lane() == 0) share[s * warps() + warp()] = added;
  }
  __syncthreads();
  double* const totals = shared_memory<double>(kScratch);  // (kSums,), before `last`
  if (threadIdx.x < kSums) {
    double added = 0;
    for (int w = 0; w < warps(); ++w) added += share[threadIdx.x * warps() + w];
    totals[threadIdx.x] = added;
  }
  cluster_sync();
  // x: an address in the shared memory of each of the cluster's blocks
  const auto over_blocks = [&](const double* x) {
    double added = 0;
#pragma unroll
    for (int b = 0; b < kCluster; ++b)
      if (b < blocks) added += cluster_load(x, b);
    return added;
  };
  if (Shape::kWhole)
    for (int k = rank * Shape::kThreads + threadIdx.x; k < K; k += blocks * Shape::kThreads)
      column[k] = static_cast<A>(over_blocks(whole + k));
  if (rank == 0 && threadIdx.x < kSums)
    sums[threadIdx.x * clusters + cluster] = over_blocks(totals + threadIdx.x);
  cluster_sync();
  if (!Shape::kWhole || counter < 0 || rank > 0) return;
  if (!last_of(clusters, counter, reinterpret_cast<int*>(totals + kSums))) return;
  double term = 0;
  for (int k = threadIdx.x; k < K; k += Shape::kThreads) {
    double added = 0;
#pragma unroll 16
    for (int64_t i = 0; i < clusters; ++i) added += __ldcg(columns + i * K + k);
    term += finish.mean_of(k, added);
  }
  if (warp() < kSums) {
    const double added = warp_sum(sums + warp() * clusters, clusters);
    if (lane() == 0) totals[warp()] = added;
  }
  term = block_sum(term, share);
  if (threadIdx.x == 0) finish.write(totals, term);
}

// Upstream gradients of forward's first six outputs; null stands for zeros.
template <typename A>
struct Upstream {
  const A *total, *labeled, *unlabeled, *prior, *confidence;  // ()
  const A* per_sample;                                        // (n,)
  int64_t stride;                                             // of per_sample

  // The upstream gradient of one part of the loss: its own, plus the total's times its weight.
  SANM_DEVICE double at(const A* part, double weight) const {
    return (part ? static_cast<double>(*part) : 0) + (total ? weighted(weight, *total) : 0);
  }
};

// Grid-stride over rows. Shared memory: scratch; then, if `hold`, the prior's part of h (K,). For
// whole rows it always fits.
template <typename Shape, typename S>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) masked_loss_backward_kernel(
    const Upstream<typename Shape::A> upstream,
    const Logits<S> logits,                    // (n, K)
    const Targets<typename Shape::A> targets,  // (M, K) or (M,)
    const Prior<typename Shape::A> prior,
    const typename Shape::A* normalizer,  // (n, 2)
    const typename Shape::A* p_mean,      // (K,)
    const int64_t* counts,                // (2,): labelled and unlabelled rows that count
    S* result,                            // (n, K), written, of the logits' dtype
    int64_t num_labeled, bool mean, bool hold, bool vectors, const Numbers<kNumbers> numbers) {
  using A = typename Shape::A;
  const int64_t n = logits.n;
  const int K = logits.K;
  double labeled_slope = upstream.at(upstream.labeled, 1),
         unlabeled_slope = upstream.at(upstream.unlabeled, numbers[kUnlabeledWeight]);
  const A entropy_slope = static_cast<A>(
      upstream.at(upstream.confidence, numbers[kConfidenceWeight]) / static_cast<double>(n));
  const A prior_slope = static_cast<A>(
      -upstream.at(upstream.prior, numbers[kPriorWeight]) / static_cast<double>(n));
  // The prior's part of h or, for a rare class, the factor of e^{log p − log p̄}. A class of
  // probability 0 gets none: its p cannot change.
  const auto slope = [&](int k) {
    if (prior_slope == 0) return A{0};
    const A mean_k = p_mean[k], share = prior_slope * prior(k, K);
    if (!(mean_k < 0)) return share / mean_k;
    return mean_k > static_cast<A>(-INFINITY) ? share : A{0};
  };
  A* const slopes = shared_memory<A>(kScratch);
  const bool held = Shape::kWhole || hold;
  bool some_rare = !held;
  for (int k = threadIdx.x; held && k < K; k += blockDim.x) {
    slopes[k] = slope(k);
    some_rare = some_rare || p_mean[k] < 0;
  }
  some_rare = __syncthreads_or(some_rare);
  if (mean) {
    labeled_slope /= Max()(1.0, static_cast<double>(counts[0]));
    unlabeled_slope /= Max()(1.0, static_cast<double>(counts[1]));
  }
  Shape::each_row(n, [&](int64_t i, bool exists) {
    A x[Shape::C], h[Shape::C];
    Target<Shape> target;
    if (Shape::kWhole) logits.template load<Shape>(i, 0, x);
    target.open(targets, i);
    const bool labeled = i < num_labeled;
    const A top = normalizer[2 * i], log_sum = normalizer[2 * i + 1];
    A c = 0;
    if (targets.counts(i)) {
      c = static_cast<A>(labeled ? labeled_slope : unlabeled_slope) + targets.poison(i);
      if (upstream.per_sample) c += upstream.per_sample[i * upstream.stride];
    }
    const A cross = labeled ? c : A{0}, square = labeled ? A{0} : 2 * c / K;
    unsigned rare = 0;  // bit c: x and h are those of a rare class
    // x becomes p; h (C,) as above
    const auto work = [&](int first) {
      if (!Shape::kWhole) logits.template load<Shape>(i, first, x);
      const auto& t = target.piece(targets, first);
      rare = 0;
      Shape::each_class(first, K, [&](int c, int k) {
        const A from_prior = k >= K ? A{0} : held ? slopes[k] : slope(k);
        const A log_mean = some_rare && from_prior != 0 ? Min()(p_mean[k], A{0}) : A{0};
        const A log_p = (x[c] - top) - log_sum, p = std::exp(log_p - log_mean);
        x[c] = p;
        h[c] = from_prior + square * (p - t[c]) + (p == 0 ? A{0} : entropy_slope * log_p);
        if (log_mean < 0) rare |= 1u << c, h[c] = from_prior;
      });
    };
    RowSum<Shape> shifts;
    A shift = 0;
    Shape::two_sweeps([&](auto second) {
      for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
        if (!Shape::kWhole || !second) work(first);
        if (!second) {
          A part = 0;
          Shape::each_class(first, K, [&](int c, int k) {
            part += cross * target.own.t[c] - (k < K ? x[c] * h[c] : A{0});
          });
          shifts.add(part);
        } else {
          Shape::each_class(first, K, [&](int c, int) {
            x[c] = x[c] * (h[c] + (rare >> c & 1 ? A{0} : shift)) - cross * target.own.t[c];
          });
          S stored[Shape::C];
          encode(logits.type, x, stored);
          if (exists) store_piece<Shape>(result + i * K, vectors, first, K, stored);
        }
      }
      if (!second) shift = shifts.row();
    });
  });
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// logits (n, K), targets (…, K) floats or (M,) int64, ratio (M,), permutation (≥ n,), prior (K,),
// scalars (4,) double: λ, λ_u, ρ, ν → total, L_x, L_u, P, N (), per_sample (n,),
// (max, log-sum) (n, 2), p̄ (K,), or log p̄ if p̄ is below kRare, labelled and unlabelled rows that
// count (2,) int64
Result masked_loss(const Tensor& logits, const Tensor& targets, const OptTensor& ratio,
                   const OptTensor& permutation, const OptTensor& prior, const Tensor& scalars,
                   int64_t num_labeled, bool clamp, int64_t ignore_index, bool mean) {
  check_masked_loss(logits, targets, ratio, permutation, prior, scalars, num_labeled);
  const Numbers<kNumbers> numbers(scalars);
  const int64_t n = logits.size(0), K = logits.size(1);
  const ScalarType type = acc_type(logits);
  const auto make = [&](const std::vector<int64_t>& size, ScalarType kind) {
    return new_tensor(logits, size, kind);
  };
  const Tensor total = make({}, type), labeled = make({}, type), unlabeled = make({}, type),
               penalty = make({}, type), confidence = make({}, type), per_sample = make({n}, type),
               normalizer = make({n, 2}, type), p_mean = make({K}, type),
               counts = make({2}, ScalarType::Long);
  dispatch_stored(logits.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using A = acc_t<S>;
    const Targets<A> target(targets, ratio, permutation, K, Share<A>(numbers), clamp, ignore_index);
    with_row_shape<S>(K, vector_rows(logits), [&](auto shape) {
      using Shape = decltype(shape);
      const auto kernel = masked_loss_kernel<Shape, S>;
      // One block at least: its sums are zeros. As large a cluster as they fill.
      const int64_t wanted = std::max<int64_t>(1, row_blocks<Shape>(logits, n));
      int64_t cluster = Shape::kWhole ? std::min(kCluster, cluster_limit(logits, kernel)) : 1;
      while (cluster > wanted) cluster /= 2;
      const int64_t most = std::max<int64_t>(1, multiprocessors(logits) * Shape::kMost / cluster),
                    clusters = std::min(ceil_div(wanted, cluster), most);
      const int64_t row = K * static_cast<int64_t>(sizeof(A)), chunks = ceil_div(K, kWarp);
      const bool hold = !Shape::kWhole && row <= kHoldBytes;
      const bool one = Shape::kWhole && clusters * row <= kFinishBytes;
      const Tensor columns = make({clusters, K}, type),
                   sums = make({kSums, clusters}, ScalarType::Double),
                   penalties = make({one ? 0 : chunks}, ScalarType::Double);
      const Finish<S> finish{Logits<S>(logits), out<A>(normalizer),   prior_of<A>(prior),
                             out<A>(total),     out<A>(labeled),      out<A>(unlabeled),
                             out<A>(penalty),   out<A>(confidence),   out<A>(p_mean),
                             out<int64_t>(counts), out<double>(penalties), mean, numbers};
      const int counter = take_counter(logits);
      const int64_t sums_of_columns = K * sizeof(double) + kParts<Shape> * row,
                    shared = kColumns + (Shape::kWhole ? sums_of_columns : hold ? row : 0);
      launch({"masked_loss", logits, {clusters * cluster}, Shape::kThreads, shared, cluster}, kernel,
             Logits<S>(logits), target, out<A>(per_sample), out<A>(normalizer), out<A>(columns),
             out<double>(sums), num_labeled, hold, one ? counter : -1, finish);
      if (one) return;
      launch({"masked_loss", logits, {chunks}, kFinishThreads,
              kScratch + kFinishThreads * static_cast<int64_t>(sizeof(double))},
             masked_loss_finish_kernel<S>, in<A>(columns), in<double>(sums), clusters, counter,
             finish);
    });
  });
  return {total, labeled, unlabeled, penalty, confidence, per_sample, normalizer, p_mean,
          counts};
}

// Upstream gradients of forward's first six outputs, its inputs, and of its outputs (max, log-sum)
// (n, 2), p̄ (K,) and the counts (2,) → gradient (n, K) in the logits' dtype
Tensor masked_loss_backward(const OptTensor& grad_total, const OptTensor& grad_labeled,
                            const OptTensor& grad_unlabeled, const OptTensor& grad_prior,
                            const OptTensor& grad_confidence, const OptTensor& grad_per_sample,
                            const Tensor& logits, const Tensor& targets, const OptTensor& ratio,
                            const OptTensor& permutation, const OptTensor& prior,
                            const Tensor& scalars, const Tensor& normalizer_,
                            const Tensor& p_mean_, const Tensor& counts_, int64_t num_labeled,
                            bool clamp, int64_t ignore_index, bool mean) {
  check_masked_loss(logits, targets, ratio, permutation, prior, scalars, num_labeled);
  check_masked_loss_backward(
      {&grad_total, &grad_labeled, &grad_unlabeled, &grad_prior, &grad_confidence},
      grad_per_sample, logits, normalizer_, p_mean_, counts_);
  const Numbers<kNumbers> numbers(scalars);
  const Tensor normalizer = packed(normalizer_), p_mean = packed(p_mean_),
               counts = packed(counts_);
  const int64_t n = logits.size(0), K = logits.size(1);
  const Tensor result = new_tensor(logits, {n, K}, logits.scalar_type());
  dispatch_stored(logits.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using A = acc_t<S>;
    const Targets<A> target(targets, ratio, permutation, K, Share<A>(numbers), clamp, ignore_index);
    const Upstream<A> upstream{
        in_or_null<A>(grad_total),      in_or_null<A>(grad_labeled),
        in_or_null<A>(grad_unlabeled),  in_or_null<A>(grad_prior),
        in_or_null<A>(grad_confidence), in_or_null<A>(grad_per_sample),
        grad_per_sample ? grad_per_sample->stride(0) : 0};
    with_row_shape<S>(K, vector_rows(logits), [&](auto shape) {
      using Shape = decltype(shape);
      const int64_t row = K * static_cast<int64_t>(sizeof(A));
      const bool hold = row <= kHoldBytes;
      launch({"masked_loss_backward", logits, {row_blocks<Shape>(logits, n)}, Shape::kThreads,
              kScratch + (hold ? row : 0)},
             masked_loss_backward_kernel<Shape, S>, upstream, Logits<S>(logits), target,
             prior_of<A>(prior), in<A>(normalizer), in<A>(p_mean), in<int64_t>(counts),
             out<S>(result), num_labeled, mean, hold, vector_rows(result), numbers);
    });
  });
  return result;
}

}  // namespace

SANM_CUDA_KERNELS(m) {
  m.impl("masked_loss.cuda", TORCH_BOX(&masked_loss));
  m.impl("masked_loss_backward.cuda", TORCH_BOX(&masked_loss_backward));
}

}  // namespace sanm
