// Rows of several views mixed: out_i = λ·v_i + (1 − λ)·v_π(i), v their concatenation, which is
// never materialised.
//
// Backward is a gather too: with π⁻¹(i) = j where π(j) = i among the first `rows`,
//   dL/dv_i = λ·g_i [i < rows] + (1 − λ)·g_π⁻¹(i) [π⁻¹(i) exists],
// so each element is written once, and nothing is accumulated in memory.
//
// A row is E contiguous elements, in the same order in every view, NCHW or NHWC. It is processed in
// pieces that fit the L1 cache; large results are written by non-temporal stores. Every row is read
// twice, as itself and as a partner: each row is followed by its partner, which is still cached.
#include "cpu/common.h"
#include "cpu/pack.h"
#include "cpu/stream.h"

namespace sanm {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kPiece = 1024;

struct Share {
  explicit Share(const Tensor& lam) : own(*in<double>(lam)), partner(1 - own) {}
  double own, partner;
};

// own·x + partner·y for n ≤ kPiece elements; a null pointer stands for zeros. `buffer` (kPiece).
template <typename T>
void mix_piece(const T* x, const T* y, int64_t n, const Share& share, bool stream, T* buffer,
               T* out) {
  using A = acc_t<T>;
  const A a = static_cast<A>(share.own), b = static_cast<A>(share.partner);
  const bool direct = stream && std::is_same_v<T, A> && aligned(out);
  T* const target = stream && !direct ? buffer : out;
  const auto run = [&](const auto& value) {
    each_pack(n, [&](int64_t k, auto count) {
      store_pack<A>(value(k, count), count, target + k, direct);
    });
  };
  if (x && y)
    run([&](int64_t k, auto count) {
      prefetch(x + k), prefetch(y + k);
      return a * load_pack<A>(x + k, count, A(0)) + b * load_pack<A>(y + k, count, A(0));
    });
  else if (x || y)
    run([&](int64_t k, auto count) {
      return (x ? a : b) * load_pack<A>((x ? x : y) + k, count, A(0));
    });
  else
    run([](int64_t, auto) { return Pack<A>{}; });
  if (stream && !direct)
    copy_bytes(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(buffer), n * sizeof(T),
               true);
}

// The order in which rows 0 … rows − 1 are processed: i is followed by next[i], unless that is out
// of range or already seen. Chains begin where `before`, the inverse of `next`, is −1.
std::vector<int64_t> in_chains(const int64_t* next, const int64_t* before, int64_t rows) {
  std::vector<int64_t> order;
  std::vector<bool> seen(rows);
  order.reserve(rows);
  for (const bool begins : {true, false})  // first chains, then the cycles that are left
    for (int64_t first = 0; first < rows; ++first)
      if (!begins || before[first] < 0)
        for (int64_t i = first; 0 <= i && i < rows && !seen[i]; i = next[i]) {
          seen[i] = true;
          order.push_back(i);
        }
  return order;
}

// Mixes rows of E elements in this order; row(i) returns the two sources and the destination.
template <typename T, typename Sources>
void mix_rows(const std::vector<int64_t>& order, int64_t E, const Share& share,
              const Sources& row) {
  const int64_t rows = static_cast<int64_t>(order.size());
  const int64_t pieces = (E + kPiece - 1) / kPiece;
  const bool stream = rows * E * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  torch::stable::parallel_for(0, rows * pieces, grain(std::min(E, kPiece)),
                              [&](int64_t begin, int64_t end) {
    alignas(64) T buffer[kPiece];
    for (int64_t item = begin; item < end; ++item) {
      const auto [x, y, out] = row(order[item / pieces]);
      const int64_t at = item % pieces * kPiece;
      mix_piece(x ? x + at : x, y ? y + at : y, std::min(kPiece, E - at), share, stream, buffer,
                out + at);
    }
    if (stream) stream_fence();
  });
}

// The first `rows` entries of a permutation: a copy, which no other thread can change.
std::vector<int64_t> entries(const Tensor& permutation_, int64_t rows) {
  const Tensor permutation = packed(permutation_);
  const int64_t* const first = in<int64_t>(permutation);
  return {first, first + rows};
}

// The inverse (total,) of entries of a permutation; −1 where there is none.
std::vector<int64_t> inverse(const std::vector<int64_t>& p, int64_t total) {
  const int64_t rows = static_cast<int64_t>(p.size());
  check_indices(p.data(), rows, total, "permutation");
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

// views (b_i, …), `total` rows together, lam (1,) double, permutation (≥ rows,) → (rows, …)
Tensor mixup_views(const std::vector<Tensor>& views, const Tensor& lam, const Tensor& permutation,
                   int64_t rows) {
  const int64_t total = check_mixup_views(views, lam, permutation, rows);
  bool channels_last = false, contiguous = false;
  for (const Tensor& view : views)
    if (view.numel() > 0) (is_channels_last(view) ? channels_last : contiguous) = true;
  channels_last = channels_last && !contiguous;
  const std::vector<int64_t> p = entries(permutation, rows), before = inverse(p, total);
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
    T* out_ = out<T>(result);
    mix_rows<T>(in_chains(p.data(), before.data(), rows), E, Share(lam), [&](int64_t i) {
      return std::tuple<const T*, const T*, T*>(source[i], source[p[i]], out_ + i * E);
    });
  });
  return result;
}

// grad (rows, …), lam (1,) double, permutation (≥ rows,), rows of each view → gradients (b_i, …)
std::vector<Tensor> mixup_views_backward(const Tensor& grad_, const Tensor& lam,
                                         const Tensor& permutation,
                                         const std::vector<int64_t>& sizes) {
  const int64_t total = check_mixup_views_backward(grad_, lam, permutation, sizes);
  const bool channels_last = is_channels_last(grad_);
  const Tensor grad = channels_last ? grad_ : packed(grad_);
  const int64_t rows = grad.size(0), E = row_elements(grad);
  std::vector<Tensor> results;  // first: if memory is short, this allocation fails and says so
  for (const int64_t size : sizes) results.push_back(empty_like_rows(grad, size, channels_last));
  std::vector<int64_t> partner = entries(permutation, rows);
  const std::vector<int64_t> source = inverse(partner, total);
  partner.resize(total, -1);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T*> destination;
    destination.reserve(total);
    for (const Tensor& result : results)
      for (int64_t i = 0; i < result.size(0); ++i)
        destination.push_back(out<T>(result) + i * E);
    const T* g = in<T>(grad);
    mix_rows<T>(in_chains(source.data(), partner.data(), total), E, Share(lam), [&](int64_t i) {
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
