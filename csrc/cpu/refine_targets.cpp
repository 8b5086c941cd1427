// Refined targets: p = mean of softmax over the given logits, then q·label + (1 − q)·p where labels
// are given, then p^(1/T) / Σ p^(1/T). Row by row; dividing by the largest before the power keeps
// the sum away from 0.
#include "cpu/common.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/values.h"

namespace sanm {
namespace {

// p^exponent, 0 stays 0
template <typename A>
inline Pack<A> power(Pack<A> p, A exponent) {
  if (exponent == 2) return p * p;
  for (int l = 0; l < kPack; ++l) p[l] = p[l] == 0 ? 0 : std::pow(p[l], exponent);
  return p;
}

// p (Kp) → p^exponent / Σ p^exponent in out (K); p is overwritten.
template <typename A>
void sharpen(A* p, int64_t K, A exponent, A* out) {
  const A top = row_max<A>(p, K), scale = 1 / top;
  const auto sum = row_sums<A, 1>(padded(K), [&](int64_t k, auto n, Pack<A>(&sums)[1]) {
    const Pack<A> x = load_pack<A>(p + k, n, A(0));
    // the largest becomes 1 itself: next to it a high power would already be 0
    const Pack<A> sharp = power<A>(x == top ? splat<A>(1) : x * scale, exponent);
    store_pack<A>(sharp, n, p + k);
    sums[0] += sharp;
  });
  const A share = 1 / sum[0];
  each_pack(K, [&](int64_t k, auto n) {
    store_pack<A>(load_pack<A>(p + k, n, A(0)) * share, n, out + k);
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
    clean_prob = torch::stable::to(packed(*clean_prob_), type);
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
    torch::stable::parallel_for(0, B, row_grain(K) / V + 1, [&](int64_t begin, int64_t end) {
      const Rows<A> e(V, padded(K)), rows(2, padded(K));
      A *const p = rows[0], *const given = rows[1];
      std::vector<A> top(V), scale(V);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t v = 0; v < V; ++v) top[v] = row_max<A>(z[v] + i * K, K);
        for (int64_t v = 0; v < V; ++v)
          scale[v] = 1 / (V * exponentials<1>(z[v] + i * K, K, top[v], e[v], 1)[0]);
        std::fill_n(p, padded(K), A(0));
        add_rows(e, scale.data(), V, K, p);
        if (q) {
          if (!label)
            widen(labels->const_data_ptr(), labels->scalar_type(), i * K, 1, K, given);
          const A share = q[i], rest = 1 - share;
          each_pack(K, [&](int64_t k, auto n) {
            const Pack<A> mean = rest * load_pack<A>(p + k, n, A(0)),
                          t = label ? (is_lane<A>(label[i], k) ? splat(share) : Pack<A>{})
                                    : share * load_pack<A>(given + k, n, A(0));
            store_pack<A>(t + mean, n, p + k);
          });
        }
        sharpen(p, K, exponent, refined + i * K);
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("refine_targets.cpu", TORCH_BOX(&refine_targets));
}

}  // namespace sanm
