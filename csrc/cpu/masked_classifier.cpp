// The one-pass classifier and its gradients: the visible part of each sample's features, outside
// its box, is pooled and classified, and the cross-entropy computed.
#include "cpu/common.h"
#include "cpu/softmax.h"
#include "math/box.h"
#include "matrix.h"

namespace sanm {
namespace {

// v / Σv (h, w): v is the fraction of a cell outside the box; zeros if all cells are covered.
template <typename A>
void visibility(const int32_t* box, int64_t h, int64_t w, int64_t H, int64_t W, A* v) {
  A total = 0;
  for (int64_t y = 0; y < h; ++y) {
    const A rows = overlap<A>(box[0], box[2], y, h, H);
    for (int64_t x = 0; x < w; ++x) {
      const A share = A{1} - rows * overlap<A>(box[1], box[3], x, w, W);
      v[y * w + x] = share > 0 ? share : A{0};
      total += v[y * w + x];
    }
  }
  for (int64_t k = 0; k < h * w; ++k) v[k] = total > 0 ? v[k] / total : A{0};
}

// z_c = Σ v·F: f (C, n) or (n, C) → z (C).
template <typename T, typename A>
void pool(const T* f, int64_t C, int64_t n, bool channels_last, const A* v, A* z) {
  if (channels_last) {
    std::fill_n(z, C, A{0});
    for (int64_t x = 0; x < n; ++x)
      for (int64_t c = 0; c < C; ++c) z[c] += v[x] * static_cast<A>(f[x * C + c]);
    return;
  }
  for (int64_t c = 0; c < C; ++c) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < n; ++x) sum += v[x] * static_cast<A>(f[c * n + x]);
    z[c] = sum;
  }
}

// logits (B, K) = pooled (B, C)·Wᵀ + bias.
template <typename A>
void classify(const Tensor& pooled, const Tensor& weight_, const OptTensor& bias_,
              const Tensor& logits) {
  const ScalarType type = pooled.scalar_type();
  const Tensor weight = torch::stable::to(weight_, type);
  multiply(pooled, torch::stable::transpose(weight, 0, 1), logits);
  if (!bias_) return;
  const Tensor bias = packed(torch::stable::to(*bias_, type));
  const int64_t B = logits.size(0), K = logits.size(1);
  A* z = out<A>(logits);
  for (int64_t i = 0; i < B; ++i)
    for (int64_t k = 0; k < K; ++k) z[i * K + k] += in<A>(bias)[k];
}

// Mean cross-entropy of logits (B, K) against targets (B, K) → loss ().
template <typename A, typename T>
void cross_entropy(const A* logits, const T* targets, int64_t B, int64_t K, A* loss) {
  std::vector<A> rows(B);
  torch::stable::parallel_for(0, B, grain(K), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A lse = logsumexp(logits + i * K, K);
      const T* t = targets + i * K;
      rows[i] = row_sums<A, 1>(K, [&](int64_t k, auto n, Pack<A>(&sum)[1]) {
        sum[0] += load_pack<A>(t + k, n, A(0)) * (lse - load_pack<A>(logits + i * K + k, n, A(0)));
      })[0];
    }
  });
  double sum = 0;
  for (const A row : rows) sum += row;
  *loss = static_cast<A>(sum / std::max<int64_t>(B, 1));
}

// z = Σ v·F / Σ v, logits = z·Wᵀ + bias, loss = −Σ t·log softmax / B.
// features (B, C, h, w), box (B, 4) in pixels of (H, W), targets (B, K), weight (K, C), bias (K,)
// → logits (B, K), loss (), z (B, C), v/Σv (B, h, w)
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_classifier(
    const Tensor& features_, const Tensor& box_, const Tensor& targets_, const Tensor& weight,
    OptTensor bias, int64_t H, int64_t W) {
  check_masked_classifier(features_, box_, targets_, weight, bias, H, W);
  const Image features(features_);
  const Tensor box = packed(box_), targets = packed(targets_);
  const int64_t B = features_.size(0), C = features_.size(1), h = features_.size(2),
                w = features_.size(3), K = weight.size(0);
  const ScalarType type = acc_type(features_);
  const Tensor logits = new_tensor({B, K}, type), loss = new_tensor({}, type),
               pooled = new_tensor({B, C}, type), visible = new_tensor({B, h, w}, type);
  dispatch(features_.scalar_type(), [&](auto zero) {
    using F = decltype(zero);
    using A = acc_t<F>;
    const F* f = in<F>(features.tensor);
    const int32_t* corners = in<int32_t>(box);
    A *v = out<A>(visible), *z = out<A>(pooled);
    torch::stable::parallel_for(0, B, grain(C * h * w), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        visibility(corners + 4 * i, h, w, H, W, v + i * h * w);
        pool(f + i * C * h * w, C, h * w, features.channels_last, v + i * h * w, z + i * C);
      }
    });
  });
  dispatch(type, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    classify<A>(pooled, weight, bias, logits);
    dispatch(targets.scalar_type(), [&](auto target_zero) {
      cross_entropy(in<A>(logits), in<decltype(target_zero)>(targets), B, K, out<A>(loss));
    });
  });
  return {logits, loss, pooled, visible};
}

// dlogits = (softmax·Σt' − t')·grad_loss/B + grad_logits; dz = dlogits·W; dF = dz ⊗ v/Σv;
// dW = dlogitsᵀ·z; dbias = Σ_b dlogits.
// grad_logits (B, K), grad_loss (), features (B, C, h, w), weight (K, C), logits (B, K),
// targets (B, K), pooled (B, C), visible (B, h, w) → gradients of features, weight, bias
std::tuple<Tensor, Tensor, Tensor> masked_classifier_backward(
    OptTensor grad_logits, OptTensor grad_loss, const Tensor& features, const Tensor& weight_,
    const Tensor& logits_, const Tensor& targets_, const Tensor& pooled, const Tensor& visible_) {
  check_masked_classifier_backward(grad_logits, grad_loss, features, weight_, logits_, targets_,
                                   pooled, visible_);
  const Tensor logits = packed(logits_), targets = packed(targets_), visible = packed(visible_);
  const int64_t B = logits.size(0), K = logits.size(1), C = features.size(1),
                n = features.size(2) * features.size(3);
  const bool channels_last = is_channels_last(features);
  const ScalarType type = logits.scalar_type();
  const Tensor d = new_tensor({B, K}, type), bias = new_tensor({K}, type);
  const Tensor result =
      new_image({B, C, features.size(2), features.size(3)}, features.scalar_type(), channels_last);
  dispatch(type, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    A* delta = out<A>(d);
    std::fill_n(delta, B * K, A{0});
    if (grad_loss) {
      const A scale = *in<A>(*grad_loss) / static_cast<A>(std::max<int64_t>(B, 1));
      dispatch(targets.scalar_type(), [&](auto target_zero) {
        const auto* t = in<decltype(target_zero)>(targets);
        for (int64_t i = 0; i < B; ++i) {
          const A* z = in<A>(logits) + i * K;
          const A lse = logsumexp(z, K);
          A* row = delta + i * K;
          softmax(z, K, lse, row);
          const auto mass = row_sums<A, 1>(K, [&](int64_t k, auto n, Pack<A>(&sum)[1]) {
            sum[0] += load_pack<A>(t + i * K + k, n, A(0));
          });
          for (int64_t k = 0; k < K; ++k)
            row[k] = (row[k] * mass[0] - static_cast<A>(t[i * K + k])) * scale;
        }
      });
    }
    if (grad_logits) {
      const Tensor grad = packed(*grad_logits);
      for (int64_t k = 0; k < B * K; ++k) delta[k] += in<A>(grad)[k];
    }
    A* db = out<A>(bias);
    std::fill_n(db, K, A{0});
    for (int64_t i = 0; i < B; ++i)
      for (int64_t k = 0; k < K; ++k) db[k] += delta[i * K + k];
  });
  const Tensor weight = torch::stable::to(weight_, type);
  const Tensor dz = new_tensor({B, C}, type);
  multiply(d, weight, dz);
  dispatch(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const A* v = in<A>(visible);
    T* df = out<T>(result);
    torch::stable::parallel_for(0, B, grain(C * n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A* z = in<A>(dz) + i * C;
        const A* share = v + i * n;
        T* to = df + i * C * n;
        if (channels_last)
          for (int64_t x = 0; x < n; ++x)
            for (int64_t c = 0; c < C; ++c) to[x * C + c] = static_cast<T>(z[c] * share[x]);
        else
          for (int64_t c = 0; c < C; ++c)
            for (int64_t x = 0; x < n; ++x) to[c * n + x] = static_cast<T>(z[c] * share[x]);
      }
    });
  });
  const Tensor dw = new_tensor({K, C}, type);
  multiply(torch::stable::transpose(d, 0, 1), pooled, dw);
  return {result, torch::stable::to(dw, weight_.scalar_type()), bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("masked_classifier.cpu", TORCH_BOX(&masked_classifier));
  m.impl("masked_classifier_backward.cpu", TORCH_BOX(&masked_classifier_backward));
}

}  // namespace sanm
