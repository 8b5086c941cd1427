// Per-sample cross-entropy l_i = log Σ_k exp(z_ik − m_i) − (z_i[y_i] − m_i), m_i = max z_i, and its
// gradient p_ik − [k = y_i]. The maximum and log Σ are stored separately: in their sum, the
// log-sum-exp, a large maximum would round log Σ away.
#include "cpu/common.h"
#include "cpu/softmax.h"

namespace sanm {
namespace {

// logits (B, K), labels (B,) int64 → loss (B,), (max, log-sum) (B, 2)
std::tuple<Tensor, Tensor> sample_loss(const Tensor& logits_, const Tensor& labels_) {
  check_sample_loss(logits_, labels_);
  const Tensor logits = packed(logits_), labels = packed(labels_);
  const int64_t B = logits.size(0), K = logits.size(1);
  const int64_t* y = in<int64_t>(labels);
  check_indices(y, B, K, "labels");
  const ScalarType type = acc_type(logits);
  const Tensor loss = new_tensor({B}, type), normalizer = new_tensor({B, 2}, type);
  dispatch(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* z = in<T>(logits);
    A *l = out<A>(loss), *norm = out<A>(normalizer);
    side_by_side(K, [&](auto R) {
      torch::stable::parallel_for(0, B, row_grain(K), [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += R) {
          const int64_t count = std::min<int64_t>(end - first, R);
          const auto x = row_starts<R>(z + first * K, K, count);
          const Pack<A> top = rows_max<A, R>(x, K);
          const Pack<A> log_sum = log_from_one(exp_sums<A, R>(x, K, top));
          for (int64_t j = 0; j < count; ++j) {
            const int64_t i = first + j;
            norm[2 * i] = top[j], norm[2 * i + 1] = log_sum[j];
            l[i] = log_sum[j] - (static_cast<A>(x[j][index_below(y + i, K)]) - top[j]);
          }
        }
      });
    });
  });
  return {loss, normalizer};
}

// grad (B,), logits (B, K), labels (B,), (max, log-sum) (B, 2) → gradient (B, K), the logits' dtype
Tensor sample_loss_backward(const Tensor& grad_, const Tensor& logits_, const Tensor& labels_,
                            const Tensor& normalizer_) {
  check_sample_loss_backward(grad_, logits_, labels_, normalizer_);
  const Tensor grad = packed(grad_), logits = packed(logits_), labels = packed(labels_),
               normalizer = packed(normalizer_);
  const int64_t B = logits.size(0), K = logits.size(1);
  const int64_t* y = in<int64_t>(labels);
  check_indices(y, B, K, "labels");
  const Tensor result = new_tensor({B, K}, logits.scalar_type());
  dispatch(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* z = in<T>(logits);
    const A *g = in<A>(grad), *norm = in<A>(normalizer);
    T* d = out<T>(result);
    torch::stable::parallel_for(0, B, row_grain(K), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A top = norm[2 * i], log_sum = norm[2 * i + 1], scale = g[i];
        each_pack(K, [&](int64_t k, auto n) {
          const Pack<A> x = load_pack<A>(z + i * K + k, n, kLowest<A>),
                        p = exp_nonpositive((x - top) - log_sum);
          store_pack<A>(scale * (is_lane<A>(y[i], k) ? p - A(1) : p), n, d + i * K + k);
        });
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("sample_loss.cpu", TORCH_BOX(&sample_loss));
  m.impl("sample_loss_backward.cpu", TORCH_BOX(&sample_loss_backward));
}

}  // namespace sanm
