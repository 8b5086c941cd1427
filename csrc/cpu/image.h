// Results in the memory formats that kernels read in place.
#pragma once

#include "cpu/common.h"

namespace sanm {

inline Tensor new_image(const std::vector<int64_t>& size, ScalarType type, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      size, type, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace sanm
