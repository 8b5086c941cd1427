// The training loss on rows of logits z (n, K): cross-entropy of the first n_x rows, squared error
// of the rest, prior and confidence penalty, against targets modulated and mixed on the fly.
//
// With e_k = exp(z_k − max z) and p = e / Σe, row by row while the row is in the cache:
//   cross-entropy  Σ_k t_k (log Σe − (z_k − max z))     squared error  (1/K) Σ_k (p_k − t_k)²
//   Σ_k p_k log p_k = Σ_k p_k (z_k − max z) − log Σe,
// and p is added to its block's column sums, so that forward is one pass. Backward, the second
// pass, needs only p̄ = mean p, the maxima and log Σe:
//   dL/dz_k = p_k (h_k − Σ_j p_j h_j) + [labelled] c (p_k Σ_j t_j − t_k),
//   h_k = [unlabelled] c (2/K)(p_k − t_k) − (dL/dP) π_k / (n p̄_k) + (dL/dN) log p_k / n.
// max z and log Σe are stored separately: in their float32 sum a large maximum would round log Σe
// away. For a class whose p̄ is so small that some p underflow to 0, log p̄ (< 0) is computed from
// log p and stored instead of p̄, and p_ik/p̄_k is e^{log p_ik − log p̄_k}.
//
// Rows are processed in blocks of a fixed size, whose sums are added in order: the result does not
// depend on the number of threads. The last pack of a row is padded with logits of −∞ and targets
// of 0, which add nothing to any sum.
#include "cpu/common.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/targets.h"
#include "cpu/values.h"

namespace sanm {
namespace {

constexpr int64_t kBlockRows = kMaxRows;

// scalars (4,): λ, λ_u, ρ, ν
struct Scalars {
  explicit Scalars(const Tensor& scalars) {
    const Tensor values = packed(scalars);
    const double* s = in<double>(values);
    lam = s[0], unlabeled = s[1], prior = s[2], confidence = s[3];
  }
  double lam, unlabeled, prior, confidence;
};

// Partial sums of a block of rows.
struct Sums {
  double labeled = 0, unlabeled = 0, confidence = 0;
};

double weighted(double weight, double term) { return weight == 0 ? 0 : weight * term; }

// Grain size of parallel_for, in blocks
int64_t block_grain(int64_t K) { return std::max<int64_t>(1, row_grain(K) / kBlockRows); }

// Adds t (log-sum − (x − top)) of a row to a sum, with 0·∞ = 0.
template <typename A, typename T>
inline auto cross_entropy(const T* x, const FinalTarget<A>& target, A top, A log_sum) {
  return [=](int64_t k, auto n, Pack<A>(&sum)[1]) {
    const Pack<A> t = target.pack(k, n), centred = load_pack<A>(x + k, n, kLowest<A>) - top;
    sum[0] += t == 0 ? Pack<A>{} : t * (log_sum - centred);
  };
}

// Adds (p − t)² to a sum, p = e·scale.
template <typename A>
inline auto squared_error(const A* e, const FinalTarget<A>& target, A scale) {
  return [=](int64_t k, auto n, Pack<A>(&sum)[1]) {
    const Pack<A> error = load_pack<A>(e + k, Whole{}, A(0)) * scale - target.pack(k, n);
    sum[0] += error * error;
  };
}

// The weights in a row's gradient: of its own loss (cross-entropy: c, squared error: 2c/K), and of
// Σ p log p.
template <typename A>
struct Slopes {
  A own, entropy;
};

// With q = p h − c t: writes p, q (Kp) of a row x and adds to two sums, Σ p h and Σ t, with which
// dL/dz_k = q_k + p_k (c Σ t − Σ p h), c = 0 unless labelled. `prior` (Kp): the prior's part of h.
template <bool labeled, typename A, typename T>
inline auto gradient_parts(const T* x, const A* prior, A top, A log_sum, Slopes<A> c,
                           const FinalTarget<A>& target, A* p_row, A* q_row) {
  return [=](int64_t k, auto n, Pack<A>(&sum)[2]) {
    prefetch(x + k);
    const Pack<A> log_p = (load_pack<A>(x + k, n, kLowest<A>) - top) - log_sum,
                  p = exp_nonpositive(log_p), t = target.pack(k, n);
    Pack<A> h = load_pack<A>(prior + k, Whole{}, A(0));
    if (!labeled) h += c.own * (p - t);
    if (c.entropy != 0) h += p == 0 ? Pack<A>{} : c.entropy * log_p;
    const Pack<A> weighted = p * h;
    sum[0] += weighted;
    if (labeled) sum[1] += t;
    store_pack<A>(p, Whole{}, p_row + k);
    store_pack<A>(labeled ? weighted - c.own * t : weighted, Whole{}, q_row + k);
  };
}

// d (K) = q + shift·p
template <typename A, typename T>
inline void gradient_row(const A* p, const A* q, int64_t K, A shift, T* d, bool stream) {
  each_pack(K, [&](int64_t k, auto n) {
    store_pack<A>(load_pack<A>(q + k, Whole{}, A(0)) + shift * load_pack<A>(p + k, Whole{}, A(0)),
                  n, d + k, stream);
  });
}

// For p̄ below this, a p that contributes to it may have underflowed to 0.
template <typename A>
constexpr A kRare = std::numeric_limits<A>::min() / std::numeric_limits<A>::epsilon();

template <typename A, typename T>
inline double log_p(const T* x, const A* norm, int64_t k) {
  return static_cast<double>(static_cast<A>(x[k])) - norm[0] - norm[1];
}

// logits z (n, K), (max, log-sum) (n, 2), some classes → log p̄ of these, by a running log-sum-exp
template <typename A, typename T>
std::vector<double> log_means(const T* z, const A* norm, int64_t n, int64_t K,
                              const std::vector<int64_t>& classes) {
  const int64_t count = static_cast<int64_t>(classes.size());
  std::vector<double> top(count, -std::numeric_limits<double>::infinity()), sum(count);
  torch::stable::parallel_for(0, count, 4 * row_grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = begin; c < end; ++c) {
        const double x = log_p(z + i * K, norm + 2 * i, classes[c]);
        if (x > top[c])
          sum[c] = sum[c] * std::exp(top[c] - x) + 1, top[c] = x;
        else if (x > -std::numeric_limits<double>::infinity())
          sum[c] += std::exp(x - top[c]);
      }
    for (int64_t c = begin; c < end; ++c) top[c] += std::log(sum[c] / n);
  });
  return top;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// logits (n, K), targets (…, K) floats or (M,) int64, ratio (M,), permutation (≥ n,), prior (K,),
// scalars (4,) double λ, λ_u, ρ, ν → total, L_x, L_u, P, N (), per_sample (n,),
// (max, log-sum) (n, 2), p̄ (K,), or log p̄ if p̄ is below kRare, labelled and unlabelled rows that
// count (2,) int64
Result masked_loss(const Tensor& logits_, const Tensor& targets, const OptTensor& ratio,
                   const OptTensor& permutation, const OptTensor& prior_, const Tensor& scalars,
                   int64_t num_labeled, bool clamp, int64_t ignore_index, bool mean) {
  check_masked_loss(logits_, targets, ratio, permutation, prior_, scalars, num_labeled);
  const Scalars weight(scalars);
  const Tensor logits = packed(logits_);
  const OptTensor prior = packed(prior_);
  const int64_t n = logits.size(0), K = logits.size(1), Kp = padded(K), nx = num_labeled;
  const ScalarType type = acc_type(logits);
  const Tensor total = new_tensor({}, type), labeled = new_tensor({}, type),
               unlabeled = new_tensor({}, type), penalty = new_tensor({}, type),
               confidence = new_tensor({}, type), per_sample = new_tensor({n}, type),
               normalizer = new_tensor({n, 2}, type), p_mean = new_tensor({K}, type),
               counts = new_tensor({2}, ScalarType::Long);
  dispatch(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Targets<A> target(targets, ratio, permutation, n, K, weight.lam, clamp, ignore_index);
    const A* pi = prior ? in<A>(*prior) : nullptr;
    if (pi) check_unit_interval(pi, K, "prior");

    const T* z = in<T>(logits);
    A *rows = out<A>(per_sample), *norm = out<A>(normalizer);
    const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
    std::vector<A> columns(blocks * Kp);
    std::vector<Sums> sums(blocks);
    side_by_side(K, [&](auto R) {
      torch::stable::parallel_for(0, blocks, block_grain(K), [&](int64_t begin, int64_t end) {
        const int64_t stop = std::min(n, end * kBlockRows);
        const int64_t there = (stop - begin * kBlockRows + R - 1) / R * R;
        const int64_t group = std::min(std::max<int64_t>(rows_at_once(K), R), there);
        const Rows<A> e(group, Kp), converted(2, K);
        alignas(64) A top[kMaxRows + kPack], sum[kMaxRows + kPack], moment[kMaxRows + kPack],
            scale[kMaxRows + kPack], log_sum[kMaxRows + kPack], loss[kMaxRows + kPack];
        for (int64_t first = begin * kBlockRows; first < stop; first += group) {
          const int64_t count = std::min(stop - first, group);
          const T* x = z + first * K;
          for (int64_t j = 0; j < count; j += R) {
            const auto some = row_starts<R>(x + j * K, K, count - j);
            const auto powers = row_starts<R>(e[j], e.step(), R);
            const Pack<A> tops = rows_max<A, R>(some, K);
            const auto sums = exponentials<2, A, R>(some, K, tops, powers, group);
            store_pack<A>(tops, Whole{}, top + j);
            store_pack<A>(sums[0], Whole{}, sum + j);
            store_pack<A>(sums[1], Whole{}, moment + j);
          }
          for (int64_t j = 0; j < count; j += kPack) {
            const Pack<A> some = load_pack<A>(sum + j, Whole{}, A(1));
            store_pack<A>(log_from_one(some), Whole{}, log_sum + j);
            store_pack<A>(1 / some, Whole{}, scale + j);
          }
          add_rows(e, 0, scale, count, K, columns.data() + first / kBlockRows * Kp);
          for (int64_t j = 0, some = 0; j < count; j += some) {
            const bool is_labeled = first + j < nx;
            some = std::min<int64_t>(R, (is_labeled ? std::min(nx - first, count) : count) - j);
            const auto losses = [&](const auto& row) {
              const auto sums = rows_sums_in_turn<A, 1, R>(some, K, [&](int64_t i) {
                return row(j + i, target.row(first + j + i, converted[0], converted[1]));
              });
              store_pack<A>(sums[0], Whole{}, loss + j);
            };
            if (is_labeled)
              losses([&](int64_t i, const auto& t) {
                return cross_entropy(x + i * K, t, top[i], log_sum[i]);
              });
            else
              losses([&](int64_t i, const auto& t) { return squared_error(e[i], t, scale[i]); });
          }
          Sums& block = sums[first / kBlockRows];
          Sums here = block;
          for (int64_t j = 0; j < count; ++j) {
            const int64_t i = first + j;
            rows[i] = !target.counts(i) ? 0 : i < nx ? loss[j] : loss[j] / K;
            norm[2 * i] = top[j], norm[2 * i + 1] = log_sum[j];
            here.confidence += moment[j] * scale[j] - log_sum[j];
            here.labeled += i < nx ? rows[i] : A(0);
            here.unlabeled += i < nx ? A(0) : rows[i];
          }
          block = here;
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
    int64_t* const count = out<int64_t>(counts);
    count[0] = target.counting(0, nx), count[1] = target.counting(nx, n);
    if (mean) {
      sum.labeled /= std::max<int64_t>(1, count[0]);
      sum.unlabeled /= std::max<int64_t>(1, count[1]);
    }
    sum.confidence /= std::max<int64_t>(1, n);
    A* const means = out<A>(p_mean);
    std::vector<int64_t> rare;
    const double all_rows = static_cast<double>(n), uniform = 1.0 / K;
    double divergence = 0;
    for (int64_t k = 0; k < K && n > 0; ++k) {
      const double mean_k = column[k] / all_rows, pi_k = pi ? pi[k] : uniform;
      means[k] = static_cast<A>(mean_k);
      if (mean_k < kRare<A>)
        rare.push_back(k);
      else if (pi_k != 0)
        divergence += pi_k * std::log(pi_k / mean_k);
    }
    const std::vector<double> logs = log_means(z, norm, n, K, rare);
    for (size_t c = 0; c < rare.size(); ++c) {
      const double pi_k = pi ? pi[rare[c]] : uniform;
      means[rare[c]] = static_cast<A>(logs[c]);
      if (pi_k != 0) divergence += pi_k * (std::log(pi_k) - logs[c]);
    }
    *out<A>(labeled) = static_cast<A>(sum.labeled);
    *out<A>(unlabeled) = static_cast<A>(sum.unlabeled);
    *out<A>(penalty) = static_cast<A>(divergence);
    *out<A>(confidence) = static_cast<A>(sum.confidence);
    *out<A>(total) = static_cast<A>(sum.labeled + weighted(weight.unlabeled, sum.unlabeled) +
                                    weighted(weight.prior, divergence) +
                                    weighted(weight.confidence, sum.confidence));
  });
  return {total,      labeled,    unlabeled, penalty, confidence,
          per_sample, normalizer, p_mean,    counts};
}

// The upstream gradient of one scalar output; absent: 0.
template <typename A>
double upstream(const OptTensor& grad) { return grad ? static_cast<double>(*in<A>(*grad)) : 0; }

// Upstream gradients of forward's first six outputs, its inputs, and of its outputs (max, log-sum)
// (n, 2), p̄ (K,) and the counts (2,) → gradient (n, K) in the logits' dtype
Tensor masked_loss_backward(const OptTensor& grad_total, const OptTensor& grad_labeled,
                            const OptTensor& grad_unlabeled, const OptTensor& grad_prior,
                            const OptTensor& grad_confidence, const OptTensor& grad_per_sample,
                            const Tensor& logits_, const Tensor& targets, const OptTensor& ratio,
                            const OptTensor& permutation, const OptTensor& prior_,
                            const Tensor& scalars, const Tensor& normalizer_,
                            const Tensor& p_mean_, const Tensor& counts_, int64_t num_labeled,
                            bool clamp, int64_t ignore_index, bool mean) {
  check_masked_loss(logits_, targets, ratio, permutation, prior_, scalars, num_labeled);
  check_masked_loss_backward(
      {&grad_total, &grad_labeled, &grad_unlabeled, &grad_prior, &grad_confidence},
      grad_per_sample, logits_, normalizer_, p_mean_, counts_);
  const Scalars weight(scalars);
  const Tensor logits = packed(logits_);
  const OptTensor prior = packed(prior_);
  const Tensor normalizer = packed(normalizer_), p_mean = packed(p_mean_),
               counts = packed(counts_);
  const OptTensor grad_rows = packed(grad_per_sample);
  const int64_t n = logits.size(0), K = logits.size(1), nx = num_labeled;
  const Tensor result = new_tensor({n, K}, logits.scalar_type());
  dispatch(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Targets<A> target(targets, ratio, permutation, n, K, weight.lam, clamp, ignore_index);
    const double g = upstream<A>(grad_total);
    double cx = upstream<A>(grad_labeled) + g,
           cu = upstream<A>(grad_unlabeled) + weighted(weight.unlabeled, g);
    if (mean) {
      cx /= std::max<int64_t>(1, in<int64_t>(counts)[0]);
      cu /= std::max<int64_t>(1, in<int64_t>(counts)[1]);
    }
    const double gp = upstream<A>(grad_prior) + weighted(weight.prior, g);
    const A gn = static_cast<A>((upstream<A>(grad_confidence) +
                                 weighted(weight.confidence, g)) / std::max<int64_t>(1, n));
    const A* grow = grad_rows ? in<A>(*grad_rows) : nullptr;

    // The prior's part of h; for a rare class, that of p·h divided by p/p̄. A class of probability
    // 0 gets none: its p cannot change.
    std::vector<A> slope(padded(K));
    std::vector<std::pair<int64_t, double>> rare;
    const A *pi = prior ? in<A>(*prior) : nullptr, *pm = in<A>(p_mean);
    const double scale = -gp / std::max<int64_t>(1, n), uniform = 1.0 / K;
    for (int64_t k = 0; k < K && gp != 0; ++k) {
      const double share = scale * (pi ? pi[k] : uniform);
      if (!(pm[k] < 0))
        slope[k] = static_cast<A>(share / pm[k]);
      else if (pm[k] > kLowest<A>)
        rare.push_back({k, share});
    }

    const T* z = in<T>(logits);
    const A* norm = in<A>(normalizer);
    T* d = out<T>(result);
    const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
    const bool stream = n * K * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    side_by_side(K, [&](auto R) {
      constexpr int kRows = R == kPack ? R : 1;
      torch::stable::parallel_for(0, blocks, block_grain(K), [&](int64_t begin, int64_t end) {
        const int64_t stop = std::min(n, end * kBlockRows);
        const Rows<A> p(kRows, padded(K)), q(kRows, padded(K)), converted(2, K);
        for (int64_t first = begin * kBlockRows, count = 0; first < stop; first += count) {
          const bool is_labeled = first < nx;
          count = std::min<int64_t>(kRows, (is_labeled ? std::min(nx, stop) : stop) - first);
          A weight[kRows];
          const auto parts = [&](auto labeled) {
            return rows_sums_in_turn<A, 2, kRows>(count, K, [&](int64_t j) {
              const int64_t i = first + j;
              weight[j] = 0;
              if (target.counts(i))
                weight[j] = static_cast<A>(labeled ? cx : cu) + (grow ? grow[i] : A(0));
              return gradient_parts<labeled>(
                  z + i * K, slope.data(), norm[2 * i], norm[2 * i + 1],
                  Slopes<A>{labeled ? weight[j] : 2 * weight[j] / K, gn},
                  target.row(i, converted[0], converted[1]), p[j], q[j]);
            });
          };
          const auto sums = is_labeled ? parts(std::true_type{}) : parts(std::false_type{});
          for (int64_t j = 0; j < count; ++j) {
            const int64_t i = first + j;
            A shift = (is_labeled ? weight[j] * sums[1][j] : 0) - sums[0][j];
            if (!rare.empty()) {
              double all = shift;
              for (const auto& [k, share] : rare) {
                const double part = share * std::exp(log_p(z + i * K, norm + 2 * i, k) -
                                                     static_cast<double>(pm[k]));
                q[j][k] += static_cast<A>(part), all -= part;
              }
              shift = static_cast<A>(all);
            }
            T* const row = d + i * K;
            gradient_row(p[j], q[j], K, shift, row, stream && aligned(row));
          }
        }
        if (stream) stream_fence();
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
