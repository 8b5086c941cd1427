// Refined targets: p = mean of softmax over the given logits, then q·label + (1 − q)·p where labels
// are given, then p^(1/T) / Σ p^(1/T). Row by row; dividing by the maximum before the power keeps
// the sum from underflowing to 0.
#include "cpu/common.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/values.h"

namespace sanm {
namespace {

// p^exponent, with 0^exponent = 0
template <typename A>
inline Pack<A> power(Pack<A> p, A exponent) {
  if (exponent == 2) return p * p;
  for (int l = 0; l < kPack; ++l) p[l] = p[l] == 0 ? 0 : std::pow(p[l], exponent);
  return p;
}

// The first `count` of R rows p (Kp) → p^exponent / Σ p^exponent in out (count, K). Overwrites p.
template <typename A, size_t R>
void sharpen(const std::array<A*, R>& p, int64_t count, int64_t K, A exponent, A* out) {
  const Pack<A> top = rows_max<A, R>(p, K), scale = 1 / top;
  const auto sum = rows_sums<A, 1, R>(padded(K), [&](int64_t j) {
    return [x = p[j], top = splat<A>(top[j]), scale = splat<A>(scale[j]), exponent](
               int64_t k, auto n, Pack<A>(&sums)[1]) {
      const Pack<A> v = load_pack<A>(x + k, n, A(0));
      // the maximum becomes exactly 1: a high power of 1 − ε would be 0
      const Pack<A> sharp = power<A>(v == top ? splat<A>(1) : v * scale, exponent);
      store_pack<A>(sharp, n, x + k);
      sums[0] += sharp;
    };
  });
  const Pack<A> share = 1 / sum[0];
  for (int64_t j = 0; j < count; ++j)
    each_pack(K, [&](int64_t k, auto n) {
      store_pack<A>(load_pack<A>(p[j] + k, Whole{}, A(0)) * share[j], n, out + j * K + k);
    });
}

// logits (B, K) each; labels (B,) int64 or (B, K) floats with clean_prob (B,), or neither;
// 1/T (1,) double → (B, K)
Tensor refine_targets(const std::vector<Tensor>& logits, const std::optional<Tensor>& labels_,
                      const std::optional<Tensor>& clean_prob_, const Tensor& exponent_) {
  check_refine_targets(logits, labels_, clean_prob_, exponent_);
  const int64_t B = logits[0].size(0), K = logits[0].size(1);
  const ScalarType type = acc_type(logits[0]);
  std::optional<Tensor> labels, clean_prob;
  if (labels_ && clean_prob_) {
    labels = packed(*labels_);
    clean_prob = packed(*clean_prob_);
    if (clean_prob->scalar_type() != type) clean_prob = torch::stable::to(*clean_prob, type);
    if (labels->scalar_type() == ScalarType::Long)
      check_indices(in<int64_t>(*labels), B, K, "labels");
    else
      dispatch(labels->scalar_type(), [&](auto zero) {
        check_unit_interval(in<decltype(zero)>(*labels), B * K, "labels", K);
      });
  }
  const Tensor result = new_tensor({B, K}, type);
  dispatch(logits[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const A* q = clean_prob ? in<A>(*clean_prob) : nullptr;
    if (q) check_unit_interval(q, B, "clean_prob");
    std::vector<Tensor> dense;
    std::vector<const T*> z;
    for (const Tensor& x : logits) {
      dense.push_back(packed(x));
      z.push_back(in<T>(dense.back()));
    }
    const int64_t V = static_cast<int64_t>(z.size());
    const A exponent = static_cast<A>(*in<double>(exponent_));
    const int64_t* label =
        labels && labels->scalar_type() == ScalarType::Long ? in<int64_t>(*labels) : nullptr;
    A* refined = out<A>(result);
    const int64_t Kp = padded(K);
    side_by_side(K, [&](auto R) {
      constexpr int kRows = R == kPack ? R : 1;  // for long rows, the predictions are interleaved
      torch::stable::parallel_for(0, B, row_grain(K) / V + 1, [&](int64_t begin, int64_t end) {
        const Rows<A> e(kRows * V, Kp), p(kRows, Kp), given(1, Kp);
        std::vector<A> scale(kRows * V + R);
        for (int64_t first = begin; first < end; first += kRows) {
          const int64_t count = std::min<int64_t>(end - first, kRows), all = count * V;
          for (int64_t at = 0, i = 0, v = 0, here = 0; at < all; at += R) {
            std::array<const T*, R> x;
            std::array<A*, R> powers;
            for (int j = 0; j < R; ++j) {
              x[j] = z[v] + (first + i) * K, powers[j] = e[here];
              if (here + 1 == all) continue;  // the last one is repeated
              ++here;
              if (++v == V) v = 0, ++i;
            }
            const Pack<A> top = rows_max<A, R>(x, K);
            const Pack<A> sum = exponentials<1, A, R>(x, K, top, powers, kRows)[0];
            for (int j = 0; j < R; ++j) scale[at + j] = 1 / (V * sum[j]);
          }
          for (int64_t j = 0; j < count; ++j) {
            const int64_t i = first + j;
            A* const mean = p[j];
            std::fill_n(mean, Kp, A(0));
            add_rows(e, j * V, scale.data() + j * V, V, K, mean);
            if (!q) continue;
            if (!label)
              widen(labels->const_data_ptr(), labels->scalar_type(), i * K, 1, K, given[0]);
            const A share = q[i], rest = 1 - share;
            const int64_t own = label ? label[i] : 0;
            for (int64_t k = 0; k < Kp; k += kPack) {
              const Pack<A> t = label ? (is_lane<A>(own, k) ? splat(share) : Pack<A>{})
                                      : share * load_pack<A>(given[0] + k, Whole{}, A(0));
              store_pack<A>(t + rest * load_pack<A>(mean + k, Whole{}, A(0)), Whole{}, mean + k);
            }
          }
          sharpen(row_starts<kRows>(p[0], p.step(), kRows), count, K, exponent,
                  refined + first * K);
        }
      });
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("refine_targets.cpu", TORCH_BOX(&refine_targets));
}

}  // namespace sanm
