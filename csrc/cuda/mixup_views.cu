// Rows of several views mixed: out_i = λ·v_i + (1 − λ)·v_π(i), v their concatenation, which is
// never materialised.
//
// Backward is a gather too: with π⁻¹(i) = j where π(j) = i among the first `rows`,
//   dL/dv_i = λ·g_i [i < rows] + (1 − λ)·g_π⁻¹(i) [π⁻¹(i) exists],
// so each element is written once, and nothing is accumulated in memory.
//
// A row is E contiguous elements, in the same order in every view, NCHW or NHWC. A block mixes one
// tile of one row, with kUnroll 16-byte loads per source in flight in each thread; rows that are
// not aligned to 16 bytes are read element by element. Two rounded products and one rounded sum:
// bitwise equal to the reference.
#include "cuda/common.h"

namespace sanm {
namespace {

constexpr int kViews = 64;  // pointers per launch
constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// Consecutive views, none empty; view k holds rows first[k] … first[k + 1] − 1 of all views' rows.
template <typename T>
struct Views {
  T* data[kViews];  // (b_k, E) dense each
  int64_t first[kViews + 1];
  int count;

  SANM_DEVICE bool holds(int64_t row) const { return row >= first[0] && row < first[count]; }
  SANM_DEVICE T* row(int64_t row, int64_t E) const {
    int k = 0;
    while (k + 1 < count && row >= first[k + 1]) ++k;
    return data[k] + (row - first[k]) * E;
  }
};

// One tile of a row: own·x + partner·y; a null source stands for zeros.
template <typename T, int N>
SANM_DEVICE void mix_tile(
    const T* x,  // (E,) or null
    const T* y,  // (E,) or null
    T* out,      // (E,), written from element tile·kThreads·kUnroll·N on
    int64_t E, int64_t tile, const Share<acc_t<T>>& share) {
  const int64_t start = tile * (kThreads * kUnroll * N) + threadIdx.x * N;
  Vector<T, N> left[kUnroll], right[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = start + u * (kThreads * N);
    const Vector<T, N> zero{};
    left[u] = x && at < E ? load_global<N>(x + at) : zero;
    right[u] = y && at < E ? load_global<N>(y + at) : zero;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = start + u * (kThreads * N);
    if (at >= E) break;
    Vector<T, N> mixed;
#pragma unroll
    for (int k = 0; k < N; ++k)
      mixed[k] = narrow<T>(share.own * widen(left[u][k]) + share.partner * widen(right[u][k]));
    store_global<kStream>(out + at, mixed);
  }
}

// Block (row, tile), grid-stride over rows and tiles. Writes the rows that are in `own` and whose
// partner is in `others`; a partner out of range gives NaN, in the launch with the first `others`.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) mixup_views_kernel(
    const Views<const T> own, const Views<const T> others,
    const int64_t* permutation,  // (≥ rows,), elements `stride` apart
    int64_t stride,
    T* out,  // (rows, E)
    int64_t rows, int64_t tiles, int64_t E, int64_t total, Share<acc_t<T>> share) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t partner = permutation[row * stride];
    const bool known = partner >= 0 && partner < total;
    if (!own.holds(row) || !(known ? others.holds(partner) : others.first[0] == 0)) continue;
    Share<acc_t<T>> mine = share.read();
    if (!known) mine.partner = static_cast<acc_t<T>>(NAN);
    const T *const x = own.row(row, E), *const y = known ? others.row(partner, E) : nullptr;
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y)
      mix_tile<T, N>(x, y, out + row * E, E, tile, mine);
  }
}

// source[π(j)] = j for j < rows, −1 where there is none. One block: its barrier orders the two
// loops, and a permutation is small compared to the rows.
__global__ void invert_kernel(
    const int64_t* permutation,  // (≥ rows,), elements `stride` apart
    int64_t stride, int64_t rows,
    int64_t* source,  // (total,)
    int64_t total) {
  for (int64_t i = threadIdx.x; i < total; i += blockDim.x) source[i] = -1;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < rows; j += blockDim.x) {
    const int64_t i = permutation[j * stride];
    if (i >= 0 && i < total) source[i] = j;
  }
}

// Block (row of these views, tile), as above.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) mixup_views_backward_kernel(
    const T* grad,          // (rows, E)
    const int64_t* source,  // (total,): the output that a row is partner of, or −1
    const Views<T> grads,   // (b_k, E) each, written
    int64_t tiles, int64_t E, int64_t rows, Share<acc_t<T>> share) {
  share = share.read();
  const int64_t end = grads.first[grads.count];
  for (int64_t row = grads.first[0] + blockIdx.x; row < end; row += gridDim.x) {
    const int64_t partner = source[row];
    const T *const x = row < rows ? grad + row * E : nullptr,
            *const y = partner >= 0 ? grad + partner * E : nullptr;
    T* const out = grads.row(row, E);
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y)
      mix_tile<T, N>(x, y, out, E, tile, share);
  }
}

// A block per row and tile, up to the largest grid.
Grid grid_of(int64_t rows, int64_t tiles) {
  return {blocks_for(rows, 1), std::min<int64_t>(tiles, 65535)};
}

// All views that hold rows, in groups of up to kViews.
template <typename T>
std::vector<Views<T>> grouped(const std::vector<T*>& data, const std::vector<int64_t>& sizes) {
  std::vector<Views<T>> groups;
  int64_t first = 0;
  for (size_t k = 0; k < data.size(); ++k) {
    if (sizes[k] == 0) continue;
    if (groups.empty() || groups.back().count == kViews) groups.emplace_back();
    Views<T>& group = groups.back();
    group.data[group.count] = data[k];
    group.first[group.count++] = first;
    group.first[group.count] = first += sizes[k];
  }
  return groups;
}

Tensor new_rows(const Tensor& x, int64_t rows, bool channels_last) {
  std::vector<int64_t> size{rows};
  for (int64_t d = 1; d < x.dim(); ++d) size.push_back(x.size(d));
  return new_tensor(x, size, x.scalar_type(), channels_last);
}

// views (b_i, …), total rows together, lam (1,) double, permutation (≥ rows,) → (rows, …)
Tensor mixup_views(const std::vector<Tensor>& views, const Tensor& lam, const Tensor& permutation,
                   int64_t rows) {
  const int64_t total = check_mixup_views(views, lam, permutation, rows);
  bool channels_last = false, contiguous = false;
  std::vector<int64_t> sizes;
  for (const Tensor& view : views) {
    sizes.push_back(view.size(0));
    if (view.numel() > 0) (is_channels_last(view) ? channels_last : contiguous) = true;
  }
  channels_last = channels_last && !contiguous;
  const Tensor result = new_rows(views[0], rows, channels_last);
  const int64_t E = row_elements(views[0]);
  if (rows == 0 || E == 0) return result;
  const Numbers<1> number(lam);
  dispatch(result.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> dense;
    std::vector<const T*> data;
    bool vectors = aligned16(result.const_data_ptr(), E * sizeof(T));
    for (const Tensor& view : views) {
      dense.push_back(channels_last ? view : packed(view));
      data.push_back(in<T>(dense.back()));
      vectors = vectors && aligned16(data.back(), E * sizeof(T));
    }
    with_access<T>(vectors, [&](auto access) {
      constexpr int N = decltype(access)::value;
      const int64_t tiles = ceil_div(E, kThreads * kUnroll * N);
      const std::vector<Views<const T>> groups = grouped(data, sizes);
      for (const Views<const T>& own : groups)
        for (const Views<const T>& others : groups)
          launch({"mixup_views", result, grid_of(rows, tiles), kThreads},
                 mixup_views_kernel<T, N>, own, others, in<int64_t>(permutation),
                 permutation.stride(0), out<T>(result), rows, tiles, E, total, Share<acc_t<T>>(number));
    });
  });
  return result;
}

// grad (rows, …), lam (1,) double, permutation (≥ rows,), rows of each view
//   → gradients (b_i, …)
std::vector<Tensor> mixup_views_backward(const Tensor& grad_, const Tensor& lam,
                                         const Tensor& permutation,
                                         const std::vector<int64_t>& sizes) {
  const int64_t total = check_mixup_views_backward(grad_, lam, permutation, sizes);
  const Image image(grad_);
  const Tensor& grad = image.tensor;
  const int64_t rows = grad.size(0), E = row_elements(grad);
  std::vector<Tensor> results;
  for (const int64_t size : sizes) results.push_back(new_rows(grad, size, image.channels_last));
  if (total == 0 || E == 0) return results;
  const Numbers<1> number(lam);
  const Tensor source = new_tensor(grad, {total}, ScalarType::Long);
  launch({"mixup_views_backward", grad, {1}, 1024}, invert_kernel, in<int64_t>(permutation),
         permutation.stride(0), rows, out<int64_t>(source), total);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T*> data;
    bool vectors = aligned16(grad.const_data_ptr(), E * sizeof(T));
    for (const Tensor& result : results) {
      data.push_back(out<T>(result));
      vectors = vectors && aligned16(data.back(), E * sizeof(T));
    }
    with_access<T>(vectors, [&](auto access) {
      constexpr int N = decltype(access)::value;
      const int64_t tiles = ceil_div(E, kThreads * kUnroll * N);
      for (const Views<T>& group : grouped(data, sizes)) {
        const Grid grid = grid_of(group.first[group.count] - group.first[0], tiles);
        launch({"mixup_views_backward", grad, grid, kThreads}, mixup_views_backward_kernel<T, N>,
               in<T>(grad), in<int64_t>(source), group, tiles, E, rows, Share<acc_t<T>>(number));
      }
    });
  });
  return results;
}

}  // namespace

SANM_CUDA_KERNELS(m) {
  m.impl("mixup_views.cuda", TORCH_BOX(&mixup_views));
  m.impl("mixup_views_backward.cuda", TORCH_BOX(&mixup_views_backward));
}

}  // namespace sanm
