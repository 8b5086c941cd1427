// Gradients of masked_forward: of the targets, of the images, and of the one-pass classifier.
#include "cpu/common.h"
#include "cpu/softmax.h"
#include "cpu/values.h"
#include "math/modulation.h"
#include "matrix.h"

namespace sanm {
namespace {

// t' = t + constants, except where the whole t[j*] was dropped: there t'[j*] = 0 and every other
// target holds t[j*]/(K − 1), so that dt[j*] = Σ_{k≠j*} dt'[k]/(K − 1).
// grad (S, B, K), targets (B, K), ratio (S, B) → (B, K)
Tensor modulate_backward(const Tensor& grad_, const Tensor& targets_, const Tensor& ratio_,
                         bool clamp) {
  check_modulate_backward(grad_, targets_, ratio_);
  const Tensor grad = packed(grad_), targets = packed(targets_), ratio = packed(ratio_);
  const int64_t S = grad.size(0), B = grad.size(1), K = grad.size(2);
  const Tensor result = new_tensor({B, K}, targets.scalar_type());
  dispatch(targets.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T *g = in<T>(grad), *t = in<T>(targets);
    const float* r = in<float>(ratio);
    torch::stable::parallel_for(0, B, grain(S * K), [&](int64_t begin, int64_t end) {
      std::vector<A> sum(K);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t top = first_argmax(t + i * K, K);
        std::fill(sum.begin(), sum.end(), A{0});
        for (int64_t s = 0; s < S; ++s) {
          const T* row = g + (s * B + i) * K;
          const auto total = row_sums<A, 1>(K, [&](int64_t k, auto n, Pack<A>(&sums)[1]) {
            const Pack<A> some = load_pack<A>(row + k, n, A(0));
            store_pack<A>(load_pack<A>(&sum[k], n, A(0)) + some, n, &sum[k]);
            sums[0] += some;
          });
          const A own = static_cast<A>(row[top]);
          if (clamp && static_cast<A>(t[i * K + top]) < static_cast<A>(r[s * B + i]))
            sum[top] += (total[0] - own) / static_cast<A>(K - 1) - own;
        }
        for (int64_t k = 0; k < K; ++k) out<T>(result)[i * K + k] = static_cast<T>(sum[k]);
      }
    });
  });
  return result;
}

// A pixel outside a view's box passes the view's gradient on; with the mean fill every pixel of a
// channel also gets 1/(H·W) of what arrives inside the box.
// grad (V·B, C, H, W), boxes (V, B, 4) → (B, C, H, W) in the memory format of grad
Tensor masked_views_backward(const Tensor& grad_, const Tensor& boxes_, bool mean_fill) {
  check_masked_views_backward(grad_, boxes_);
  const Image grad(grad_);
  const int64_t V = boxes_.size(0), B = boxes_.size(1), C = grad_.size(1), H = grad_.size(2),
                W = grad_.size(3), pixels = C * H * W;
  const Tensor corners = packed(boxes_);
  const std::vector<Box> boxes = checked_boxes(in<int32_t>(corners), V * B, B, H, W);
  const Tensor result = new_image({B, C, H, W}, grad_.scalar_type(), grad.channels_last);
  const int64_t step = grad.channels_last ? C : 1, planes = grad.channels_last ? 1 : C;
  dispatch(grad_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* g = in<T>(grad.tensor);
    torch::stable::parallel_for(0, B, grain(V * pixels), [&](int64_t begin, int64_t end) {
      std::vector<A> sum(W * step);
      std::vector<A> share(C);  // of the mean fill, per channel
      for (int64_t i = begin; i < end; ++i) {
        const auto row = [&](int64_t v, int64_t plane, int64_t y) {
          return g + (v * B + i) * pixels + (plane * H + y) * W * step;
        };
        const auto box = [&](int64_t v) -> const Box& { return boxes[v * B + i]; };
        std::fill(share.begin(), share.end(), A{0});
        if (mean_fill) {
          for (int64_t v = 0; v < V; ++v)
            for (int64_t plane = 0; plane < planes; ++plane)
              for (int64_t y = box(v).y0; y < box(v).y1; ++y)
                for (int64_t x = box(v).x0; x < box(v).x1; ++x)
                  for (int64_t c = 0; c < step; ++c)
                    share[plane + c] += static_cast<A>(row(v, plane, y)[x * step + c]);
          for (A& value : share) value /= static_cast<A>(H * W);
        }
        for (int64_t plane = 0; plane < planes; ++plane)
          for (int64_t y = 0; y < H; ++y) {
            for (int64_t k = 0; k < W * step; ++k) sum[k] = share[plane + k % step];
            for (int64_t v = 0; v < V; ++v) {
              const T* from = row(v, plane, y);
              const bool hit = box(v).y0 <= y && y < box(v).y1;
              const int64_t left = hit ? box(v).x0 * step : W * step,
                            right = hit ? box(v).x1 * step : left;
              for (int64_t k = 0; k < left; ++k) sum[k] += static_cast<A>(from[k]);
              for (int64_t k = right; k < W * step; ++k) sum[k] += static_cast<A>(from[k]);
            }
            T* to = out<T>(result) + i * pixels + (plane * H + y) * W * step;
            for (int64_t k = 0; k < W * step; ++k) to[k] = static_cast<T>(sum[k]);
          }
      }
    });
  });
  return result;
}

// dlogits = (softmax·Σt' − t')·grad_loss/B + grad_logits; dz = dlogits·W; dF = dz ⊗ v/Σv;
// dW = dlogitsᵀ·z; dbias = Σ_b dlogits.
// grad_logits (B, K), grad_loss (), features (B, C, h, w), weight (K, C), logits (B, K),
// targets (B, K), pooled (B, C), visible (B, h, w) → gradients of features, weight, bias
std::tuple<Tensor, Tensor, Tensor> classifier_backward(
    OptTensor grad_logits, OptTensor grad_loss, const Tensor& features, const Tensor& weight_,
    const Tensor& logits_, const Tensor& targets_, const Tensor& pooled, const Tensor& visible_) {
  check_classifier_backward(grad_logits, grad_loss, features, weight_, logits_, targets_, pooled,
                            visible_);
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
  m.impl("modulate_backward.cpu", TORCH_BOX(&modulate_backward));
  m.impl("masked_views_backward.cpu", TORCH_BOX(&masked_views_backward));
  m.impl("classifier_backward.cpu", TORCH_BOX(&classifier_backward));
}

}  // namespace sanm
