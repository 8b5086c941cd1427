// Refined targets: p = mean of softmax over the given logits, then q·label + (1 − q)·p where labels
// are given, then p^(1/T) / Σ p^(1/T). Row by row; dividing by the largest before the power keeps
// the sum away from 0.
#include "cpu/common.h"
#include "cpu/convert.h"
#include "cpu/softmax.h"
#include "cpu/values.h"

namespace sanm {
namespace {

// p (width) ← p^exponent / Σ p^exponent; 0 stays 0
template <typename A, typename Size>
void sharpen(A* __restrict p, Size width, A exponent) {
  const A largest = row_max(p, width);
  if (exponent == 2) {
    for (int64_t k = 0; k < width; ++k) p[k] = (p[k] / largest) * (p[k] / largest);
  } else {
    for (int64_t k = 0; k < width; ++k) p[k] = p[k] == 0 ? 0 : std::pow(p[k] / largest, exponent);
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < width; ++k) sum += p[k];
  for (int64_t k = 0; k < width; ++k) p[k] /= sum;
}

// logits (B, K) each; labels (B,) int64 or (B, K) floats with clean_prob (B,), or neither;
// temperature (1,) double → (B, K)
Tensor refine_targets(const std::vector<Tensor>& logits, const std::optional<Tensor>& labels_,
                      const std::optional<Tensor>& clean_prob_, const Tensor& temperature) {
  const int64_t B = logits[0].size(0), K = logits[0].size(1);
  const ScalarType type = acc_type(logits[0]);
  std::optional<Tensor> labels, clean_prob;
  if (labels_ && clean_prob_) {
    labels = packed(*labels_);
    clean_prob = torch::stable::to(packed(*clean_prob_), type);
    if (labels->scalar_type() == ScalarType::Long)
      check_indices(in<int64_t>(*labels), B, K, "labels");
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
    const A exponent = static_cast<A>(1 / *in<double>(temperature));
    const int64_t* label =
        labels && labels->scalar_type() == ScalarType::Long ? in<int64_t>(*labels) : nullptr;
    A* refined = out<A>(result);
    with_width(K, [&](auto width) {
      torch::stable::parallel_for(0, B, row_grain(K) / V + 1, [&](int64_t begin, int64_t end) {
        const Rows<A> rows(3, width);
        A *const buffer = rows[0], *const one = rows[1], *const p = rows[2];
        for (int64_t i = begin; i < end; ++i) {
          std::fill(p, p + width, A(0));
          for (int64_t v = 0; v < V; ++v) {
            softmax(padded_row(z[v] + i * K, K, kLowest<A>, width, buffer), width, one);
#pragma omp simd
            for (int64_t k = 0; k < width; ++k) p[k] += one[k];
          }
#pragma omp simd
          for (int64_t k = 0; k < width; ++k) p[k] /= static_cast<A>(V);
          if (q) {
            if (label) {
              std::fill(one, one + width, A(0));
              one[label[i]] = 1;
            } else {
              widen_padded(labels->const_data_ptr(), labels->scalar_type(), i * K, 1, K, A(0),
                           width, one);
            }
            const A share = q[i], rest = 1 - share;
#pragma omp simd
            for (int64_t k = 0; k < width; ++k) p[k] = share * one[k] + rest * p[k];
          }
          sharpen(p, width, exponent);
          narrow(p, K, refined + i * K);
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
