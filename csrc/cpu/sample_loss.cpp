// Per-sample cross-entropy l_i = log Σ_k exp(z_ik − m_i) − (z_i[y_i] − m_i), m_i = max z_i, and its
// gradient p_ik − [k = y_i]. The maximum and the log-sum are kept apart: their sum would cost large
// logits their digits.
#include "cpu/common.h"
#include "cpu/softmax.h"

namespace sanm {
namespace {

// logits (B, K), labels (B,) int64 → loss (B,), (max, log-sum) (B, 2)
std::tuple<Tensor, Tensor> sample_loss(const Tensor& logits_, const Tensor& labels_) {
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
    with_width(K, [&](auto width) {
      torch::stable::parallel_for(0, B, row_grain(K), [&](int64_t begin, int64_t end) {
        const Rows<A> buffer(1, width);
        for (int64_t i = begin; i < end; ++i) {
          const A* x = padded_row(z + i * K, K, kLowest<A>, width, buffer[0]);
          const A top = row_max(x, width), log_sum = std::log(exp_sum(x, width, top));
          norm[2 * i] = top, norm[2 * i + 1] = log_sum;
          l[i] = log_sum - (x[y[i]] - top);
        }
      });
    });
  });
  return {loss, normalizer};
}

// grad (B,), logits (B, K), labels (B,), (max, log-sum) (B, 2) → gradient (B, K), the logits' dtype
Tensor sample_loss_backward(const Tensor& grad_, const Tensor& logits_, const Tensor& labels_,
                            const Tensor& normalizer_) {
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
    with_width(K, [&](auto width) {
      torch::stable::parallel_for(0, B, row_grain(K), [&](int64_t begin, int64_t end) {
        const Rows<A> buffers(2, width);
        for (int64_t i = begin; i < end; ++i) {
          const A* x = padded_row(z + i * K, K, kLowest<A>, width, buffers[0]);
          const A top = norm[2 * i], log_sum = norm[2 * i + 1], scale = g[i];
          A* __restrict v = buffers[1];
#pragma omp simd
          for (int64_t k = 0; k < width; ++k)
            v[k] = scale * exp_nonpositive((x[k] - top) - log_sum);
          v[y[i]] = scale * (exp_nonpositive((x[y[i]] - top) - log_sum) - 1);
          narrow(v, K, d + i * K);
        }
      });
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
