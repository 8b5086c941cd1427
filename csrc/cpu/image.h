// 4-D tensors in the two memory formats that kernels read in place.
#pragma once

#include "cpu/common.h"

namespace sanm {

// Dense in NHWC order; a tensor that is dense in both orders counts as contiguous.
inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t expected[4] = {H * W * C, 1, W * C, C};
  for (int k = 0; k < 4; ++k)
    if (x.size(k) != 1 && x.stride(k) != expected[k]) return false;
  return true;
}

// A tensor as the kernels read it; one that is in neither format is copied to contiguous.
struct Image {
  explicit Image(const Tensor& x)
      : channels_last(is_channels_last(x)), tensor(channels_last ? x : packed(x)) {}
  bool channels_last;
  Tensor tensor;
};

inline Tensor new_image(const std::vector<int64_t>& size, ScalarType type, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      size, type, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace sanm
