// What masked_forward takes and gives, for every device; shapes: sanm_kernels/ops/masked_forward.py.
#pragma once

#include "math/box.h"
#include "stable.h"

namespace sanm {

// B samples, features (B, C, h, w), images (B, Cin, H, W), V views, S draw sets.
struct Inputs {
  Tensor features, targets, clean_prob;
  OptTensor draws, seed, sample_index, images, weight, bias;
  int64_t H, W, K;
  Settings settings;
  std::vector<double> fill_value;
};

struct Outputs {
  Tensor stats, positions, ratio, boxes, targets, views, logits, loss, pooled, visible;
};

// make(sizes, dtype, channels_last) gives an empty tensor.
template <typename Make>
Outputs allocate(const Inputs& in, const Make& make) {
  using Sizes = std::vector<int64_t>;
  const int64_t B = in.features.size(0), V = in.settings.view_count(), S = in.settings.draw_sets();
  const ScalarType acc = acc_type(in.features);
  const bool soft = in.targets.scalar_type() != ScalarType::Long, one_pass = in.weight.has_value();
  const Sizes none{0};
  return {make(Sizes{5, B}, acc, false),
          make(Sizes{2, B, 2}, ScalarType::Int, false),
          make(Sizes{S, B}, ScalarType::Float, false),
          make(Sizes{V, B, 4}, ScalarType::Int, false),
          make(Sizes{S, B, in.K}, soft ? in.targets.scalar_type() : ScalarType::Float, false),
          in.images ? make(Sizes{V * B, in.images->size(1), in.H, in.W}, in.images->scalar_type(),
                           is_channels_last(*in.images))
                    : make(none, in.features.scalar_type(), false),
          make(one_pass ? Sizes{B, in.K} : none, acc, false),
          make(one_pass ? Sizes{} : none, acc, false),
          make(one_pass ? Sizes{B, in.features.size(1)} : none, acc, false),
          make(one_pass ? Sizes{B, in.features.size(2), in.features.size(3)} : none, acc, false)};
}

// The operators' arguments, in the schema's order.
#define SANM_PARAMETERS                                                                           \
  Tensor features, Tensor targets, Tensor clean_prob, OptTensor draws, OptTensor seed,            \
      OptTensor sample_index, OptTensor images, OptTensor weight, OptTensor bias, int64_t H,      \
      int64_t W, int64_t K, int64_t views, bool shared, bool centered, bool quantize, bool clamp, \
      int64_t fill, std::vector<double> fill_value, double area_scale, double ratio_low,          \
      double ratio_high, double ratio_gamma, double aspect_low, double aspect_high
#define SANM_INPUTS                                                                              \
  Inputs {                                                                                       \
    features, targets, clean_prob, draws, seed, sample_index, images, weight, bias, H, W, K,     \
        Settings{views,      shared,    centered,   quantize,    clamp,      fill,               \
                 area_scale, ratio_low, ratio_high, ratio_gamma, aspect_low, aspect_high},       \
        fill_value                                                                               \
  }

using MaskedForward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline MaskedForward as_tuple(const Outputs& o) {
  return {o.stats, o.positions, o.ratio, o.boxes,  o.targets,
          o.views, o.logits,    o.loss,  o.pooled, o.visible};
}

}  // namespace sanm
