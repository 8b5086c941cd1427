// Rows of several views mixed: out_i = λ·v_i + (1 − λ)·v_π(i), v their stack, which is never made.
//
// Backward gathers as well: with π⁻¹(i) = j where π(j) = i among the first `rows`,
//   dL/dv_i = λ·g_i [i < rows] + (1 − λ)·g_π⁻¹(i) [π⁻¹(i) exists],
// so each row is written once, by one thread, and nothing is added to memory.
//
// A row is a run of E elements, the same for every view: NCHW or NHWC does not matter. It is worked
// on in pieces that fit the first cache; large results are stored past the caches.
#include "cpu/common.h"
#include "cpu/convert.h"
#include "cpu/stream.h"

namespace sanm {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kPiece = 1024;

struct Share {
  explicit Share(const Tensor& lam) : own(*in<double>(lam)), partner(1 - own) {}
  double own, partner;
};

// own·x + partner·y for n ≤ kPiece elements; a null pointer adds nothing.
template <typename T>
void mix_piece(const T* x, const T* y, int64_t n, const Share& share, T* out) {
  using A = acc_t<T>;
  const A a = static_cast<A>(share.own), b = static_cast<A>(share.partner);
  if constexpr (std::is_same_v<T, A>) {
    if (x && y) {
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) out[k] = a * x[k] + b * y[k];
    } else if (x || y) {
      const T* one = x ? x : y;
      const A scale = x ? a : b;
      for (int64_t k = 0; k < n; ++k) out[k] = scale * one[k];
    } else {
      std::memset(out, 0, n * sizeof(T));
    }
  } else {
    A left[kPiece], right[kPiece];
    std::memset(left, 0, n * sizeof(A));
    std::memset(right, 0, n * sizeof(A));
    if (x) widen(x, 1, n, left);
    if (y) widen(y, 1, n, right);
    for (int64_t k = 0; k < n; ++k) left[k] = a * left[k] + b * right[k];
    narrow(left, n, out);
  }
}

// Mixes `rows` rows of E elements; row(i) gives the two sources and the destination of row i.
template <typename T, typename Sources>
void mix_rows(int64_t rows, int64_t E, const Share& share, const Sources& row) {
  const int64_t pieces = (E + kPiece - 1) / kPiece;
  const bool stream = rows * E * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  torch::stable::parallel_for(0, rows * pieces, grain(std::min(E, kPiece)),
                              [&](int64_t begin, int64_t end) {
    alignas(64) T buffer[kPiece];
    for (int64_t item = begin; item < end; ++item) {
      const auto [x, y, out] = row(item / pieces);
      const int64_t at = item % pieces * kPiece, n = std::min(kPiece, E - at);
      T* target = stream ? buffer : out + at;
      mix_piece(x ? x + at : x, y ? y + at : y, n, share, target);
      if (stream)
        copy_bytes(reinterpret_cast<char*>(out + at), reinterpret_cast<const char*>(buffer),
                   n * sizeof(T), true);
    }
    if (stream) stream_fence();
  });
}

// The first `rows` entries of a permutation of `total`, inverted; −1 where there is none.
std::vector<int64_t> inverse(const Tensor& permutation, int64_t rows, int64_t total) {
  const int64_t* p = in<int64_t>(permutation);
  check_indices(p, rows, total, "permutation");
  std::vector<int64_t> result(total, -1);
  for (int64_t i = 0; i < rows; ++i) {
    if (result[p[i]] >= 0)
      value_error("permutation: expected its first ", rows, " entries to be distinct, got ", p[i],
                  " at indices [", result[p[i]], "] and [", i, "]");
    result[p[i]] = i;
  }
  return result;
}

Tensor empty_like_rows(const Tensor& x, int64_t rows, bool channels_last) {
  std::vector<int64_t> size{rows};
  for (int64_t d = 1; d < x.dim(); ++d) size.push_back(x.size(d));
  return new_image(size, x.scalar_type(), channels_last);
}

// views (b_i, …), M rows together, lam () double, permutation (≥ rows,) → (rows, …)
Tensor mixup_views(const std::vector<Tensor>& views, const Tensor& lam, const Tensor& permutation_,
                   int64_t rows) {
  bool channels_last = false, contiguous = false;
  int64_t total = 0;
  for (const Tensor& view : views) {
    total += view.size(0);
    if (view.numel() > 0) (is_channels_last(view) ? channels_last : contiguous) = true;
  }
  channels_last = channels_last && !contiguous;
  const Tensor permutation = packed(permutation_);
  inverse(permutation, rows, total);
  const Tensor result = empty_like_rows(views[0], rows, channels_last);
  const int64_t E = row_elements(views[0]);
  dispatch(views[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> dense;
    std::vector<const T*> source;
    source.reserve(total);
    for (const Tensor& view : views) {
      dense.push_back(channels_last ? view : packed(view));
      for (int64_t i = 0; i < view.size(0); ++i) source.push_back(in<T>(dense.back()) + i * E);
    }
    const int64_t* p = in<int64_t>(permutation);
    T* out_ = out<T>(result);
    mix_rows<T>(rows, E, Share(lam), [&](int64_t i) {
      return std::tuple<const T*, const T*, T*>(source[i], source[p[i]], out_ + i * E);
    });
  });
  return result;
}

// grad (rows, …), lam () double, permutation (≥ rows,), rows of each view → gradients (b_i, …)
std::vector<Tensor> mixup_views_backward(const Tensor& grad_, const Tensor& lam,
                                         const Tensor& permutation_,
                                         const std::vector<int64_t>& sizes) {
  const bool channels_last = is_channels_last(grad_);
  const Tensor grad = channels_last ? grad_ : packed(grad_), permutation = packed(permutation_);
  const int64_t rows = grad.size(0), E = row_elements(grad);
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  const std::vector<int64_t> source = inverse(permutation, rows, total);
  std::vector<Tensor> results;
  for (const int64_t size : sizes) results.push_back(empty_like_rows(grad, size, channels_last));
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T*> destination;
    destination.reserve(total);
    for (const Tensor& result : results)
      for (int64_t i = 0; i < result.size(0); ++i)
        destination.push_back(out<T>(result) + i * E);
    const T* g = in<T>(grad);
    mix_rows<T>(total, E, Share(lam), [&](int64_t i) {
      return std::tuple<const T*, const T*, T*>(i < rows ? g + i * E : nullptr,
                                                source[i] >= 0 ? g + source[i] * E : nullptr,
                                                destination[i]);
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("mixup_views.cpu", TORCH_BOX(&mixup_views));
  m.impl("mixup_views_backward.cpu", TORCH_BOX(&mixup_views_backward));
}

}  // namespace sanm
