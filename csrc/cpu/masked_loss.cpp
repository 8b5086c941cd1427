// The training loss on rows of logits z (n, K): cross-entropy of the first n_x rows, squared error
// of the rest, prior and confidence penalty, against targets modulated and mixed on the fly.
//
// With e_k = exp(z_k − max z) and p = e / Σe, row by row while the row is in the cache:
//   cross-entropy  Σ_k t_k (log Σe − (z_k − max z))     squared error  (1/K) Σ_k (p_k − t_k)²
//   Σ_k p_k log p_k = Σ_k p_k (z_k − max z) − log Σe,
// and p is added to its block's column sums, so that forward is one sweep. Backward, the second one,
// needs p̄ = mean p, the maxima and log Σe, no more:
//   dL/dz_k = p_k (h_k − Σ_j p_j h_j) + [labelled] c (p_k Σ_j t_j − t_k),
//   h_k = [unlabelled] c (2/K)(p_k − t_k) − (dL/dP) π_k / (n p̄_k) + (dL/dN) log p_k / n.
// max z and log Σe are kept apart: their float32 sum would cost large logits their digits.
//
// Rows are worked on in blocks of a fixed size, whose sums are added in order: the result does not
// depend on the number of threads. A row's buffers are padded to whole vectors, with logits of −∞
// and targets of 0, which add nothing to any sum.
#include "cpu/common.h"
#include "cpu/convert.h"
#include "cpu/softmax.h"
#include "cpu/targets.h"
#include "cpu/values.h"

namespace sanm {
namespace {

constexpr int64_t kBlockRows = 64;

// scalars (4,): λ, λ_u, ρ, ν
struct Scalars {
  explicit Scalars(const Tensor& scalars) {
    const Tensor values = packed(scalars);
    const double* s = in<double>(values);
    lam = s[0], unlabeled = s[1], prior = s[2], confidence = s[3];
  }
  double lam, unlabeled, prior, confidence;
};

// The buffers of one row.
template <typename A>
struct Scratch {
  explicit Scratch(int64_t K) : rows(4, padded(K)) {}

  Rows<A> rows;
  A *const x = rows[0], *const p = rows[1];      // logits, probabilities
  A *const t = rows[2], *const spare = rows[3];  // target, a second target
};

// What a block of rows adds to the scalars.
struct Sums {
  double labeled = 0, unlabeled = 0, confidence = 0;
};

double weighted(double weight, double term) { return weight == 0 ? 0 : weight * term; }

// Blocks per task of parallel_for
int64_t block_grain(int64_t K) { return std::max<int64_t>(1, row_grain(K) / kBlockRows); }

// x (Kp) → p (Kp) its softmax, added to `column` (Kp); returns max, log-sum and Σ p log p.
template <typename A, typename Size>
std::tuple<A, A, A> softmax_row(const A* __restrict x, Size Kp, A* __restrict p,
                                A* __restrict column) {
  const A top = row_max(x, Kp);
  A sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
  for (int64_t k = 0; k < Kp; ++k) {
    const A centred = x[k] - top, e = exp_nonpositive(centred);
    p[k] = e;
    sum += e;
    moment += e == 0 ? A(0) : e * centred;
  }
  const A scale = 1 / sum, log_sum = std::log(sum);
#pragma omp simd
  for (int64_t k = 0; k < Kp; ++k) {
    p[k] *= scale;
    column[k] += p[k];
  }
  return {top, log_sum, moment * scale - log_sum};
}

// Σ t (log-sum − (x − max)), where 0·∞ = 0
template <typename A, typename Size>
A cross_entropy(const A* __restrict x, const A* __restrict t, Size Kp, A top, A log_sum) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < Kp; ++k) sum += t[k] == 0 ? A(0) : t[k] * (log_sum - (x[k] - top));
  return sum;
}

// Σ (p − t)²
template <typename A, typename Size>
A squared_error(const A* __restrict p, const A* __restrict t, Size Kp) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < Kp; ++k) sum += (p[k] - t[k]) * (p[k] - t[k]);
  return sum;
}

// The weights in a row's gradient: of cross-entropy, of squared error (2c/K), of Σ p log p.
template <typename A>
struct Slopes {
  A cross, square, entropy;
};

// x (Kp) and the target t (Kp) → dL/dx, in t's place; `prior` (Kp) is the prior's part of h.
template <typename A, typename Size>
void gradient_row(const A* __restrict x, const A* __restrict prior, Size Kp, A top, A log_sum,
                  Slopes<A> c, A* __restrict p, A* __restrict h, A* __restrict t) {
  A inner = 0, mass = 0;
#pragma omp simd reduction(+ : inner, mass)
  for (int64_t k = 0; k < Kp; ++k) {
    const A log_p = (x[k] - top) - log_sum, p_k = exp_nonpositive(log_p);
    const A entropy = p_k == 0 ? A(0) : c.entropy * log_p;
    const A h_k = prior[k] + c.square * (p_k - t[k]) + entropy;
    p[k] = p_k;
    h[k] = h_k;
    inner += p_k * h_k;
    mass += t[k];
  }
  const A shift = c.cross * mass - inner;
#pragma omp simd
  for (int64_t k = 0; k < Kp; ++k) t[k] = p[k] * (h[k] + shift) - c.cross * t[k];
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// logits (n, K), targets (…, K) floats or (M,) int64, ratio (M,), permutation (≥ n,), prior (K,),
// scalars (4,) double λ, λ_u, ρ, ν → total, L_x, L_u, P, N (), per_sample (n,),
// (max, log-sum) (n, 2), p̄ (K,)
Result masked_loss(const Tensor& logits_, const Tensor& targets, const OptTensor& ratio,
                   const OptTensor& permutation, const OptTensor& prior_, const Tensor& scalars,
                   int64_t num_labeled, bool clamp, int64_t ignore_index, bool mean) {
  const Scalars weight(scalars);
  const Tensor logits = packed(logits_);
  const OptTensor prior = packed(prior_);
  const int64_t n = logits.size(0), K = logits.size(1), Kp = padded(K), nx = num_labeled;
  const ScalarType type = acc_type(logits);
  const Tensor total = new_tensor({}, type), labeled = new_tensor({}, type),
               unlabeled = new_tensor({}, type), penalty = new_tensor({}, type),
               confidence = new_tensor({}, type), per_sample = new_tensor({n}, type),
               normalizer = new_tensor({n, 2}, type), p_mean = new_tensor({K}, type);
  dispatch(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Targets<A> target(targets, ratio, permutation, K, weight.lam, clamp, ignore_index);
    target.check(n);
    const A* pi = prior ? in<A>(*prior) : nullptr;
    if (pi) check_unit_interval(pi, K, "prior");

    const T* z = in<T>(logits);
    A *rows = out<A>(per_sample), *norm = out<A>(normalizer);
    const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
    std::vector<A> columns(blocks * Kp);
    std::vector<Sums> sums(blocks);
    with_width(K, [&](auto width) {
      torch::stable::parallel_for(0, blocks, block_grain(K), [&](int64_t begin, int64_t end) {
        Scratch<A> s(K);
        for (int64_t block = begin; block < end; ++block) {
          A* column = columns.data() + block * Kp;
          Sums sum;
          const int64_t stop = std::min(n, (block + 1) * kBlockRows);
          for (int64_t i = block * kBlockRows; i < stop; ++i) {
            const A* x = padded_row(z + i * K, K, kLowest<A>, width, s.x);
            const auto [top, log_sum, entropy] = softmax_row(x, width, s.p, column);
            norm[2 * i] = top, norm[2 * i + 1] = log_sum;
            sum.confidence += entropy;
            rows[i] = 0;
            if (!target.counts(i)) continue;
            target.row(i, width, s.t, s.spare);
            if (i < nx)
              sum.labeled += rows[i] = cross_entropy(x, s.t, width, top, log_sum);
            else
              sum.unlabeled += rows[i] = squared_error(s.p, s.t, width) / K;
          }
          sums[block] = sum;
        }
      });
    });

    Sums sum;
    std::vector<double> column(K);
    for (int64_t block = 0; block < blocks; ++block) {
      sum.labeled += sums[block].labeled;
      sum.unlabeled += sums[block].unlabeled;
      sum.confidence += sums[block].confidence;
      for (int64_t k = 0; k < K; ++k) column[k] += columns[block * Kp + k];
    }
    if (mean) {
      sum.labeled /= std::max<int64_t>(1, target.counting(0, nx));
      sum.unlabeled /= std::max<int64_t>(1, target.counting(nx, n));
    }
    sum.confidence /= std::max<int64_t>(1, n);
    double divergence = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double mean_k = column[k] / std::max<int64_t>(1, n), pi_k = pi ? pi[k] : 1.0 / K;
      if (pi_k != 0 && n > 0) divergence += pi_k * std::log(pi_k / mean_k);
      out<A>(p_mean)[k] = static_cast<A>(mean_k);
    }
    *out<A>(labeled) = static_cast<A>(sum.labeled);
    *out<A>(unlabeled) = static_cast<A>(sum.unlabeled);
    *out<A>(penalty) = static_cast<A>(divergence);
    *out<A>(confidence) = static_cast<A>(sum.confidence);
    *out<A>(total) = static_cast<A>(sum.labeled + weighted(weight.unlabeled, sum.unlabeled) +
                                    weighted(weight.prior, divergence) +
                                    weighted(weight.confidence, sum.confidence));
  });
  return {total, labeled, unlabeled, penalty, confidence, per_sample, normalizer, p_mean};
}

// The upstream gradient of one scalar output; absent: 0.
template <typename A>
double upstream(const OptTensor& grad) { return grad ? static_cast<double>(*in<A>(*grad)) : 0; }

// Upstream gradients of forward's first six outputs, its inputs, (max, log-sum) (n, 2) and p̄ (K,)
// → gradient (n, K) in the logits' dtype
Tensor masked_loss_backward(const OptTensor& grad_total, const OptTensor& grad_labeled,
                            const OptTensor& grad_unlabeled, const OptTensor& grad_prior,
                            const OptTensor& grad_confidence, const OptTensor& grad_per_sample,
                            const Tensor& logits_, const Tensor& targets, const OptTensor& ratio,
                            const OptTensor& permutation, const OptTensor& prior_,
                            const Tensor& scalars, const Tensor& normalizer_,
                            const Tensor& p_mean_, int64_t num_labeled, bool clamp,
                            int64_t ignore_index, bool mean) {
  const Scalars weight(scalars);
  const Tensor logits = packed(logits_);
  const OptTensor prior = packed(prior_);
  const Tensor normalizer = packed(normalizer_), p_mean = packed(p_mean_);
  const OptTensor grad_rows = packed(grad_per_sample);
  const int64_t n = logits.size(0), K = logits.size(1), nx = num_labeled;
  const Tensor result = new_tensor({n, K}, logits.scalar_type());
  dispatch(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Targets<A> target(targets, ratio, permutation, K, weight.lam, clamp, ignore_index);
    target.check(n);
    const double g = upstream<A>(grad_total);
    double cx = upstream<A>(grad_labeled) + g,
           cu = upstream<A>(grad_unlabeled) + weighted(weight.unlabeled, g);
    if (mean) {
      cx /= std::max<int64_t>(1, target.counting(0, nx));
      cu /= std::max<int64_t>(1, target.counting(nx, n));
    }
    const double gp = upstream<A>(grad_prior) + weighted(weight.prior, g);
    const A gn = static_cast<A>((upstream<A>(grad_confidence) +
                                 weighted(weight.confidence, g)) / std::max<int64_t>(1, n));
    const A* grow = grad_rows ? in<A>(*grad_rows) : nullptr;

    // The prior's part of h. A class of no probability, or of so little that 1/p̄ overflows, gets
    // none: its p cannot move.
    std::vector<A> slope(padded(K));
    const A *pi = prior ? in<A>(*prior) : nullptr, *pm = in<A>(p_mean);
    for (int64_t k = 0; k < K && gp != 0; ++k)
      if (!(pm[k] < std::numeric_limits<A>::min()))
        slope[k] = static_cast<A>(-gp * (pi ? pi[k] : 1.0 / K) / (static_cast<double>(pm[k]) * n));

    const T* z = in<T>(logits);
    const A* norm = in<A>(normalizer);
    T* d = out<T>(result);
    const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
    with_width(K, [&](auto width) {
      torch::stable::parallel_for(0, blocks, block_grain(K), [&](int64_t begin, int64_t end) {
        Scratch<A> s(K);
        const int64_t stop = std::min(n, end * kBlockRows);
        for (int64_t i = begin * kBlockRows; i < stop; ++i) {
          const A* x = padded_row(z + i * K, K, kLowest<A>, width, s.x);
          A c = 0;
          if (target.counts(i)) {
            target.row(i, width, s.t, s.spare);
            c = static_cast<A>(i < nx ? cx : cu) + (grow ? grow[i] : A(0));
          } else {
            std::fill(s.t, s.t + width, A(0));
          }
          const Slopes<A> slopes =
              i < nx ? Slopes<A>{c, A(0), gn} : Slopes<A>{A(0), 2 * c / K, gn};
          gradient_row(x, slope.data(), width, norm[2 * i], norm[2 * i + 1], slopes, s.p,
                       s.spare, s.t);
          narrow(s.t, K, d + i * K);
        }
      });
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("masked_loss.cpu", TORCH_BOX(&masked_loss));
  m.impl("masked_loss_backward.cpu", TORCH_BOX(&masked_loss_backward));
}

}  // namespace sanm
