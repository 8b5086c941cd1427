// What every CPU kernel file needs: the stable-ABI tensors, number conversions, value checks.
//
// Each kernel file is compiled once per instruction set (see setup.py) into a library of its own,
// so nothing compiled for one instruction set can be linked into another. The flags forbid the
// compiler to contract a*b+c: where a fused multiply-add is wanted it is written std::fma.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <tuple>
#include <type_traits>
#include <vector>

namespace sanm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The type sums are taken in: float, or double for double input.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Raises ValueError in Python: validate.public() looks for the mark.
template <typename... Args>
[[noreturn]] inline void value_error(const Args&... args) {
  std::ostringstream message;
  message << "[sanm_kernels:value] ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// Calls body(T{}) with T the C++ type of a floating dtype.
template <typename Body>
inline void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: value_error("dtype: expected float16, bfloat16, float32 or float64");
  }
}

inline Tensor new_tensor(std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::empty({size.begin(), size.size()}, type);
}

inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

template <typename T>
inline const T* in(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <typename T>
inline T* out(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

// Work items per thread below which a loop stays on one thread: about 32k elements each.
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

// Every index lies in [0, size) or equals `ignore`.
inline void check_indices(const int64_t* x, int64_t n, int64_t size, const char* name,
                          std::optional<int64_t> ignore = std::nullopt) {
  for (int64_t i = 0; i < n; ++i)
    if ((x[i] < 0 || x[i] >= size) && !(ignore && x[i] == *ignore))
      value_error(name, ": expected indices in [0, ", size, "), got ", x[i], " at index [", i, "]");
}

}  // namespace sanm
