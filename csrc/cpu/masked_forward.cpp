// masked_forward, sample by sample: energy → statistics → peak and trough → ratio and box →
// modulated targets → masked views, so that a thread's computation overlaps with the stores of its
// last views; and the gradients of the targets and of the images.
#include <functional>
#include <memory>

#include "cpu/activation.h"
#include "cpu/common.h"
#include "cpu/energy.h"
#include "cpu/painter.h"
#include "cpu/softmax.h"
#include "cpu/values.h"
#include "masked_forward.h"
#include "math/modulation.h"

namespace sanm {
namespace {

// The first argmax of K finite values, a pack at a time.
template <typename T>
int64_t top_class(const T* t, int64_t K) {
  if constexpr (std::is_same_v<T, double>) return first_argmax(t, K);
  Pack<float> high = splat(-INFINITY);
  each_pack(K, [&](int64_t k, auto n) {
    const Pack<float> v = load_pack<float>(t + k, n, -INFINITY);
    high = v > high ? v : high;
  });
  const float most = reduce_max<float>(high);
  for (int64_t k = 0; k + kPack <= K; k += kPack)
    if (const unsigned there = lane_bits(load_pack<float>(t + k, Whole{}, 0.0f) == most))
      return k + __builtin_ctz(there);
  for (int64_t k = K / kPack * kPack; k < K; ++k)
    if (static_cast<float>(t[k]) == most) return k;
  return 0;  // only if another thread has changed t
}

// A row of new targets: from soft targets t (K), or, if t is null, from a label's one-hot row.
template <typename T>
void new_targets(const T* t, int64_t label, int64_t K, float ratio, bool clamp, T* result) {
  using A = acc_t<T>;
  if (t) return modulate_row<T, A>(t, K, top_class(t, K), static_cast<A>(ratio), clamp, result);
  const A d = drop<A>(ratio, A{1}, clamp), add = d / static_cast<A>(K - 1);
  std::fill_n(result, K, static_cast<T>(add));
  result[label] = static_cast<T>(A{1} - d);
}

// Energy, statistics, peak and trough of every sample; then body(i, positions). Each thread has its
// own body from make_body(), which processes `work` more elements per sample.
// stats (5, B), positions (2, B, 2).
template <typename F, typename MakeBody>
void analyse(const Image& features, int64_t H, int64_t W, bool quantize, const Tensor& stats,
             const Tensor& positions, int64_t work, const MakeBody& make_body) {
  using A = acc_t<F>;
  const Tensor& x = features.tensor;
  const int64_t B = x.size(0), C = x.size(1), h = x.size(2), w = x.size(3), n = h * w;
  const F* first = in<F>(x);
  A* stat = out<A>(stats);
  int32_t* position = out<int32_t>(positions);
  const auto make_work = [&] {
    return [&, locator = Locator(h, w, H, W, quantize), e = std::vector<A>(n),
            map = std::vector<float>(n), body = make_body()](int64_t i) mutable {
      const F* f = first + i * C * n;
      energy(f, C, n, features.channels_last, e.data());
      statistics(e.data(), n, stat + i, B);
      std::copy(e.begin(), e.end(), map.begin());
      const Positions found = locator.find(map.data());
      std::copy_n(found.peak, 2, position + 2 * i);
      std::copy_n(found.trough, 2, position + 2 * (B + i));
      body(i, found);
    };
  };
  try {
    share_out(B, grain(C * n + work), make_work);
  } catch (const std::runtime_error&) {  // only an allocation can fail in there
    memory_error(Locator::bytes(h, H, W), "a map of " + std::to_string(h) + "×" +
                 std::to_string(w) + " upsampled to " + std::to_string(H) + "×" +
                 std::to_string(W));
  }
}

// The draws of sample i: given, or from Philox.
class DrawSource {
 public:
  explicit DrawSource(const Inputs& in)
      : draws_(packed(in.draws)),
        index_(packed(in.sample_index)),
        given_(in_or_null<double>(draws_)),
        indices_(in_or_null<int64_t>(index_)),
        columns_(draws_ ? draws_->size(1) : 0),
        seed_(in.seed ? *sanm::in<int64_t>(*in.seed) : 0) {
    if (draws_) check_unit_interval(given_, draws_->numel(), "draws", columns_, true);
  }
  Draws operator()(int64_t i) const {
    return {given_ ? given_ + i * columns_ : nullptr, indices_ ? indices_[i] : i, seed_};
  }

 private:
  OptTensor draws_, index_;  // own the memory
  const double* given_;
  const int64_t* indices_;
  int64_t columns_, seed_;
};

// The boxes of a sample, one per view: a copy, which no other thread can change.
struct Boxes {
  int32_t corners[2][4];
};

// Ratios and boxes of sample i → ratio (S, B), boxes (V, B, 4).
Boxes place(const Inputs& in, const Positions& found, const Draws& draw, float clean_prob,
            int64_t i, int64_t B, float* ratio, int32_t* boxes) {
  Boxes placed;
  const Settings& s = in.settings;
  const int H = static_cast<int>(in.H), W = static_cast<int>(in.W);
  for (int v = 0; v < s.view_count(); ++v) {
    const int set = s.shared ? 0 : v;
    const float r = mask_ratio(s, draw(2 * set), clean_prob);
    const Size size = box_size(s, r, draw(2 * set + 1), H, W);
    const bool peak = s.views == 3 ? v == 0 : s.views == 1;
    const int* at = peak ? found.peak : found.trough;
    int32_t* const box = placed.corners[v];
    box[0] = corner(at[0], size.height, H, s.centered);
    box[1] = corner(at[1], size.width, W, s.centered);
    box[2] = box[0] + size.height;
    box[3] = box[1] + size.width;
    std::copy_n(box, 4, boxes + 4 * (v * B + i));
    if (v == set) ratio[v * B + i] = r;
  }
  return placed;
}

// Writes the new targets (S, B, K) of a sample from targets (B, K) or int64 (B,) and ratio (S, B).
using Modulate = std::function<void(int64_t)>;

template <typename Y>
Modulate modulator(const Tensor& targets, const float* ratio, bool clamp, int64_t S, int64_t K,
                   Y* result) {
  const int64_t B = targets.size(0);
  const bool soft = targets.scalar_type() != ScalarType::Long;
  const Y* const rows = soft ? in<Y>(targets) : nullptr;
  const int64_t* const labels = soft ? nullptr : in<int64_t>(targets);
  return [=](int64_t i) {
    for (int64_t k = i; k < S * B; k += B)
      new_targets<Y>(rows ? rows + i * K : nullptr, labels ? index_below(labels + i, K) : 0, K,
                     ratio[k], clamp, result + k * K);
  };
}

// Writes the views (V·B, Cin, H, W) of one sample of the images (B, Cin, H, W).
using PaintSample = std::function<void(int64_t, const Boxes&)>;

template <typename T>
PaintSample painter(const Inputs& in, const Image& images, const DrawSource& draws, T* views) {
  const int64_t B = images.tensor.size(0), V = in.settings.view_count();
  const int64_t channels = images.tensor.size(1), pixels = channels * in.H * in.W;
  const bool stream = V * B * pixels * int64_t{sizeof(T)} >= kStreamBytes;
  const T* x = sanm::in<T>(images.tensor);
  const auto painter = std::make_shared<Painter<T>>(in.settings, in.fill_value, in.H, in.W,
                                                    channels, images.channels_last, stream);
  return [=, &draws](int64_t i, const Boxes& boxes) {
    const int32_t* box[2] = {boxes.corners[0], boxes.corners[V - 1]};
    painter->paint(x + i * pixels, views + i * pixels, B * pixels, box, draws(i));
  };
}

void run(const Inputs& in, const Outputs& out) {
  const Settings& s = in.settings;
  const Image features(in.features);
  const Tensor targets = packed(in.targets), clean_prob = packed(in.clean_prob);
  const int64_t B = in.features.size(0), K = in.K;

  // Values are checked before anything is written.
  const float* q = sanm::in<float>(clean_prob);
  check_unit_interval(q, B, "clean_prob");
  const DrawSource draws(in);
  if (targets.scalar_type() == ScalarType::Long)
    check_indices(sanm::in<int64_t>(targets), B, K, "targets");
  else
    dispatch(targets.scalar_type(), [&](auto zero) {
      check_finite(sanm::in<decltype(zero)>(targets), B * K, "targets", K);
    });

  float* ratio = sanm::out<float>(out.ratio);
  int32_t* boxes = sanm::out<int32_t>(out.boxes);
  const std::optional<Image> images = in.images ? std::optional<Image>(*in.images) : std::nullopt;
  Modulate modulate;
  dispatch(out.targets.scalar_type(), [&](auto zero) {
    modulate = modulator(targets, ratio, s.clamp, s.draw_sets(), K,
                         sanm::out<decltype(zero)>(out.targets));
  });
  const auto make_painter = [&] {
    PaintSample paint = [](int64_t, const Boxes&) {};
    if (images)
      dispatch(images->tensor.scalar_type(), [&](auto zero) {
        paint = painter(in, *images, draws, sanm::out<decltype(zero)>(out.views));
      });
    return paint;
  };
  dispatch(in.features.scalar_type(), [&](auto zero) {
    using F = decltype(zero);
    const int64_t work = K + (images && B ? out.views.numel() / B : 0);
    analyse<F>(features, in.H, in.W, s.quantize, out.stats, out.positions, work, [&] {
      return [&, paint = make_painter()](int64_t i, const Positions& found) {
        const Boxes placed = place(in, found, draws(i), q[i], i, B, ratio, boxes);
        modulate(i);
        paint(i, placed);
      };
    });
  });
}

MaskedForward masked_forward(SANM_PARAMETERS) {
  const Inputs in = SANM_INPUTS;
  check_masked_forward(in);
  const Outputs o = allocate(in, new_image);
  run(in, o);
  return as_tuple(o);
}

void masked_forward_out(SANM_PARAMETERS, SANM_OUT_PARAMETERS) {
  const Inputs in = SANM_INPUTS;
  const Outputs o = SANM_OUTPUTS;
  check_masked_forward(in);
  check_out(in, o, parts);
  run(in, o);
}

// features (B, C, h, w) → statistics (5, B), peak and trough (2, B, 2) int32
std::tuple<Tensor, Tensor> activation_stats(const Tensor& features_, int64_t H, int64_t W,
                                            bool quantize) {
  check_features(Expect(features_), features_, H, W);
  const Image features(features_);
  const int64_t B = features_.size(0);
  const Tensor stats = new_tensor({5, B}, acc_type(features_)),
               positions = new_tensor({2, B, 2}, ScalarType::Int);
  dispatch(features_.scalar_type(), [&](auto zero) {
    analyse<decltype(zero)>(features, H, W, quantize, stats, positions, 0,
                            [] { return [](int64_t, const Positions&) {}; });
  });
  return {stats, positions};
}

// t' = t + constants, except where the whole t[j*] was dropped: there t'[j*] = 0 and every other
// target gains t[j*]/(K − 1), so that dt[j*] = Σ_{k≠j*} dt'[k]/(K − 1).
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

// A pixel outside a view's box gets the view's gradient; with the mean fill every pixel of a
// channel also gets 1/(H·W) of the sum of the gradients inside the box.
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("masked_forward.cpu", TORCH_BOX(&masked_forward));
  m.impl("masked_forward_out.cpu", TORCH_BOX(&masked_forward_out));
  m.impl("activation_stats.cpu", TORCH_BOX(&activation_stats));
  m.impl("modulate_backward.cpu", TORCH_BOX(&modulate_backward));
  m.impl("masked_views_backward.cpu", TORCH_BOX(&masked_views_backward));
}

}  // namespace sanm
