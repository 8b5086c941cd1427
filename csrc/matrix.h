// Matrix products through torch, in the precision of their operands.
#pragma once

#include <array>

#include "stable.h"

namespace sanm {

// out (m, n) = a (m, k) · b (k, n), all of one dtype. The out variant, which autocast leaves alone:
// a product that came back in bfloat16 would be misread.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the returned handle of out
}

}  // namespace sanm
