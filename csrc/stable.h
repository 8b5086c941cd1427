// Device-neutral parts of a kernel file: the stable-ABI tensors, their dtypes and memory formats.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace sanm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The accumulation type: float, or double for double input.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Raised as ValueError in Python (pybind11 translates this exception), in compiled graphs too.
template <typename... Args>
[[noreturn]] inline void value_error(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::invalid_argument(message.str());
}

// 0 ≤ x ≤ most. Public functions check it too, except where x is symbolic while tracing.
inline void check_count(int64_t x, int64_t most, const char* name) {
  if (x < 0 || x > most)
    value_error(name, ": expected a number in [0, ", most, "], got ", x);
}

inline std::string shape_text(const int64_t* size, int64_t dim) {
  std::string text = "[";
  for (int64_t d = 0; d < dim; ++d)
    text += (d ? ", " : "") + (size[d] < 0 ? std::string("…") : std::to_string(size[d]));
  return text + "]";
}
inline std::string shape_text(const Tensor& x) {
  std::vector<int64_t> size;
  for (int64_t d = 0; d < x.dim(); ++d) size.push_back(x.size(d));
  return shape_text(size.data(), x.dim());
}

inline int64_t element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double: case ScalarType::Long: return 8;
    case ScalarType::Float: case ScalarType::Int: return 4;
    case ScalarType::Half: case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

// Bytes of a dense tensor; nullopt if the number overflows 64 bits.
inline std::optional<int64_t> dense_bytes(const int64_t* size, int64_t dim, ScalarType type) {
  int64_t bytes = element_bytes(type);
  bool fits = true;
  for (int64_t d = 0; d < dim; ++d)
    fits = !__builtin_mul_overflow(bytes, std::max<int64_t>(size[d], 1), &bytes) && fits;
  if (std::find(size, size + dim, 0) != size + dim) bytes = 0;
  return fits ? std::optional(bytes) : std::nullopt;
}

// Raised as OutOfMemoryError in Python, which recognises the prefix of the message.
[[noreturn]] inline void memory_error(std::optional<int64_t> bytes, const std::string& what) {
  throw std::runtime_error("[sanm_kernels:memory] no memory for " + what + ": " +
                           (bytes ? std::to_string(*bytes) : "2⁶³ or more") + " bytes");
}

// make(), which allocates a dense tensor of this shape. If that fails, the error names the shape
// and the bytes: torch's own message is lost on the way.
template <typename Make>
inline Tensor with_memory(const int64_t* size, int64_t dim, ScalarType type, const Make& make) {
  const std::optional<int64_t> bytes = dense_bytes(size, dim, type);
  if (bytes) try {
      return make();
    } catch (const std::runtime_error&) {
    }
  memory_error(bytes, "a tensor of shape " + shape_text(size, dim));
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

inline Tensor packed(const Tensor& x) {
  if (x.is_contiguous()) return x;
  std::vector<int64_t> size;
  for (int64_t d = 0; d < x.dim(); ++d) size.push_back(x.size(d));
  return with_memory(size.data(), x.dim(), x.scalar_type(),
                     [&] { return torch::stable::contiguous(x); });
}
inline OptTensor packed(const OptTensor& x) {
  return x ? OptTensor(packed(*x)) : std::nullopt;
}

template <typename T>
inline const T* in(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <typename T>
inline T* out(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }
// null for nullopt
template <typename T>
inline const T* in_or_null(const OptTensor& x) { return x ? in<T>(*x) : nullptr; }

// Elements of one row: the product of all sizes except the first.
inline int64_t row_elements(const Tensor& x) {
  int64_t E = 1;
  for (int64_t d = 1; d < x.dim(); ++d) E *= x.size(d);
  return E;
}

// 4-D and dense in NHWC order; a tensor that is dense in both orders counts as contiguous.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t expected[4] = {H * W * C, 1, W * C, C};
  for (int k = 0; k < 4; ++k)
    if (x.size(k) != 1 && x.stride(k) != expected[k]) return false;
  return true;
}

// A tensor in a memory format that kernels read; one in neither format is copied to contiguous.
struct Image {
  explicit Image(const Tensor& x)
      : channels_last(is_channels_last(x)), tensor(channels_last ? x : packed(x)) {}
  bool channels_last;
  Tensor tensor;
};

}  // namespace sanm
