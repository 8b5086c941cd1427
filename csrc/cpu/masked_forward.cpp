// masked_forward, sample by sample: energy → statistics → peak and trough → ratio and box → (one-pass
// mode) pooling of what the box leaves visible → modulated targets → masked views, so that a thread
// computes while its last views are still being written. Then, in the one-pass mode, logits and loss.
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
#include "matrix.h"

namespace sanm {
namespace {

// v / Σv (h, w): v is the share of a cell that the box leaves visible; zeros where none is.
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

// The first index of the largest of K finite values, a pack at a time.
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
  return 0;  // where another thread has changed them
}

// Row of new targets: from soft targets t (K), or from the label of a one-hot row.
template <typename T>
void new_targets(const T* t, int64_t label, int64_t K, float ratio, bool clamp, T* result) {
  using A = acc_t<T>;
  if (t) return modulate_row<T, A>(t, K, top_class(t, K), static_cast<A>(ratio), clamp, result);
  const A d = drop<A>(ratio, A{1}, clamp), add = d / static_cast<A>(K - 1);
  std::fill_n(result, K, static_cast<T>(add));
  result[label] = static_cast<T>(A{1} - d);
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

// Energy, statistics, peak and trough of every sample; then body(i, its features, positions) while
// they are in the cache. Each thread takes a body of its own from make_body(), which is to work on
// `work` more elements a sample. stats (5, B), positions (2, B, 2).
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
      body(i, f, found);
    };
  };
  try {
    share_out(B, grain(C * n + work), make_work);
  } catch (const std::runtime_error&) {  // all that can fail in there
    memory_error(Locator::bytes(h, H, W), "a map of " + std::to_string(h) + "×" +
                 std::to_string(w) + " upsampled to " + std::to_string(H) + "×" +
                 std::to_string(W));
  }
}

// Where the draws of sample i come from.
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
  OptTensor draws_, index_;  // which keep the memory
  const double* given_;
  const int64_t* indices_;
  int64_t columns_, seed_;
};

// The boxes of a sample, one per view, which no other thread changes.
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

// What makes the new targets (S, B, K) of one sample from targets (B, K) or int64 (B,) and ratio (S, B).
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

// What paints the views (V·B, Cin, H, W) of one sample of the images (B, Cin, H, W).
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

void run(const Inputs& in, const Outputs& out) {
  const Settings& s = in.settings;
  const Image features(in.features);
  const Tensor targets = packed(in.targets), clean_prob = packed(in.clean_prob);
  const int64_t B = in.features.size(0), C = in.features.size(1), h = in.features.size(2),
                w = in.features.size(3), K = in.K;
  const bool one_pass = in.weight.has_value();

  // Values first: nothing is written before they are known to be right.
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
    using A = acc_t<F>;
    A* visible = sanm::out<A>(out.visible);
    A* pooled = sanm::out<A>(out.pooled);
    const int64_t work = K + (images && B ? out.views.numel() / B : 0);
    analyse<F>(features, in.H, in.W, s.quantize, out.stats, out.positions, work, [&] {
      return [&, paint = make_painter()](int64_t i, const F* f, const Positions& found) {
        const Boxes placed = place(in, found, draws(i), q[i], i, B, ratio, boxes);
        if (one_pass) {
          visibility(placed.corners[0], h, w, in.H, in.W, visible + i * h * w);
          pool(f, C, h * w, features.channels_last, visible + i * h * w, pooled + i * C);
        }
        modulate(i);
        paint(i, placed);
      };
    });
  });
  if (!one_pass) return;
  dispatch(acc_type(in.features), [&](auto acc_zero) {
    using A = acc_t<decltype(acc_zero)>;
    classify<A>(out.pooled, *in.weight, in.bias, out.logits);
    dispatch(out.targets.scalar_type(), [&](auto zero) {
      using Y = decltype(zero);
      cross_entropy(sanm::in<A>(out.logits), sanm::in<Y>(out.targets), B, K, sanm::out<A>(out.loss));
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
                            [] { return [](int64_t, const auto*, const Positions&) {}; });
  });
  return {stats, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("masked_forward.cpu", TORCH_BOX(&masked_forward));
  m.impl("masked_forward_out.cpu", TORCH_BOX(&masked_forward_out));
  m.impl("activation_stats.cpu", TORCH_BOX(&activation_stats));
}

}  // namespace sanm
