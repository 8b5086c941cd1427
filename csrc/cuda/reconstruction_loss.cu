// Reconstruction loss Σ_v (1/count_v) Σ (r − x)² over V views, of the whole image or the elements
// inside each sample's box, and its gradient (2/count_v)(r − x), zero outside.
//
// A sample consists of lines of contiguous elements, W per line in NCHW, W·C in NHWC; a box is a
// range of lines of each plane and of elements of a line; without boxes the whole sample is one
// line. Lines are processed in cells of 16 bytes if all of them are aligned, else of one element.
// Only the cells that a box intersects are read. Forward is two launches, the blocks' sums and then
// the views' means, added in order; backward is one.
#include "cuda/common.h"

namespace sanm {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int kThreads = 256, kFinishThreads = 512;
constexpr int kResident = 2;   // blocks per multiprocessor: few enough that no register is spilled
constexpr int kUnroll = 4;     // cells of each tensor in flight per thread
constexpr int kScratch = 256;  // bytes of shared memory: a double for each of up to 32 warps

// The memory layout of samples, the same for r and x; boxes (V·B, 4): y0, x0, y1, x1.
struct Geometry {
  int64_t B, sample;     // images per view; elements per sample
  int64_t counted;       // elements per view, without boxes
  int planes, lines;     // planes per sample; lines per plane
  int64_t length;        // elements per line
  int width, pixel;      // pixels per line; elements per pixel of a line
  const int64_t* boxes;  // or null
  Divisor<int64_t> by_B, by_parts;  // parts: blocks per sample
};

// The elements of a sample that count: lines [top, bottom) of each plane, elements [low, high) of a
// line. A box that exceeds the image, which a kernel cannot report, is empty and not sound.
struct Box {
  int64_t top, bottom, low, high;
  bool sound;
};

SANM_DEVICE Box box_of(const Geometry& g, int64_t sample) {
  if (!g.boxes) return {0, g.lines, 0, g.length, true};
  const int64_t* b = g.boxes + sample * 4;
  const int64_t y0 = b[0], x0 = b[1], y1 = b[2], x1 = b[3];
  if (y0 < 0 || y0 > y1 || y1 > g.lines || x0 < 0 || x0 > x1 || x1 > g.width)
    return {0, 0, 0, 0, false};
  return {y0, y1, x0 * g.pixel, x1 * g.pixel, true};
}

// Elements of view v that count, at least 1: all, or the boxes' areas times the channels.
SANM_DEVICE double count_of(const Geometry& g, int64_t v) {
  double count = static_cast<double>(g.counted);
  if (g.boxes) {
    count = 0;
    for (int64_t i = threadIdx.x; i < g.B; i += blockDim.x) {
      const Box b = box_of(g, v * g.B + i);
      count += static_cast<double>((b.bottom - b.top) * (b.high - b.low));
    }
    count = block_sum(count, shared_memory<double>()) * g.planes;
  }
  return count > 1 ? count : 1;
}

// N elements, converted to A.
template <typename A, int N>
struct Cell {
  A v[N];
};

template <typename A, int N, typename S>
SANM_DEVICE Cell<A, N> load_cell(const S* p) {
  constexpr int kWide = kVector<S>, M = N < kWide ? N : kWide;
  Cell<A, N> cell;
#pragma unroll
  for (int j = 0; j < N; j += M) {
    const Vector<S, M> some = load_global<M, kStream>(p + j);
#pragma unroll
    for (int i = 0; i < M; ++i) cell.v[j + i] = static_cast<A>(widen(some[i]));
  }
  return cell;
}

// The block's share, one of gridDim.y, of the cells that elements [low, high) of lines [top,
// bottom) of each plane intersect; and a position in it, at first the thread's first cell.
template <int N>
struct Share {
  int64_t left;                // cells of the share from this position on
  int64_t cell = 0, line = 0;  // cell within the line; line within the sample
  int row = 0;                 // row of the box in this plane, of `tall`
  int tall, lines;
  int64_t first, wide;  // first cell of a line; cells per line
  // a step of kThreads cells: in lines (with those of whole planes), rows of a plane, cells
  int64_t step_lines = 0;
  int step_rows = 0, step_cells = 0;

  SANM_DEVICE Share(const Geometry& g, int64_t top, int64_t bottom, int64_t low, int64_t high)
      : tall(static_cast<int>(bottom - top)), lines(g.lines), first(low / N),
        wide((high + N - 1) / N - first) {
    if (high <= low || tall <= 0) wide = 0;
    const int64_t all = static_cast<int64_t>(g.planes) * tall * wide;
    int64_t each = all + gridDim.y - 1;
    each = g.by_parts.split(each);
    const int64_t begin = each * blockIdx.y + threadIdx.x;
    left = (all - each * blockIdx.y < each ? all - each * blockIdx.y : each) - threadIdx.x;
    if (wide == 0) return;
    const int64_t before = begin / wide, plane = before / tall;
    row = static_cast<int>(before - plane * tall);
    cell = begin - before * wide, line = plane * lines + top + row;
    const int width = static_cast<int>(min(wide, int64_t{kThreads + 1})), down = kThreads / width;
    const int planes = down / tall;
    step_cells = kThreads - down * width, step_rows = down - planes * tall;
    step_lines = static_cast<int64_t>(planes) * lines + step_rows;
  }
  SANM_DEVICE int64_t at() const { return (first + cell) * N; }  // element of the line
  SANM_DEVICE void next() {
    left -= kThreads, cell += step_cells, row += step_rows, line += step_lines;
    if (cell >= wide) cell -= wide, ++row, ++line;
    if (row >= tall) row -= tall, line += lines - tall;
  }
};

// Block (v·B + b, part): Σ (r − x)² over its share of the counted elements; NaN for an unsound box.
template <typename T, typename S, int N>
__global__ void __launch_bounds__(kThreads, kResident) squares_kernel(
    const T* reconstruction,  // (V·B, sample)
    const S* images,          // (B, sample)
    acc_t<T>* partial,        // (V·B, parts), written
    const Geometry g) {
  using A = acc_t<T>;
  const int64_t sample = blockIdx.x;
  int64_t image = sample;
  g.by_B.split(image);
  const T* r = reconstruction + sample * g.sample;
  const S* x = images + image * g.sample;
  const Box box = box_of(g, sample);
  Share<N> share(g, box.top, box.bottom, box.low, box.high);
  A total[kUnroll] = {};
  while (share.left > 0) {
    Cell<A, N> left[kUnroll] = {}, right[kUnroll] = {};
    int64_t at[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, share.next()) {
      at[u] = box.high;
      if (share.left <= 0) continue;
      at[u] = share.at();
      const int64_t offset = share.line * g.length + at[u];
      left[u] = load_cell<A, N>(r + offset);
      right[u] = load_cell<A, N>(x + offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A d = left[u].v[j] - right[u].v[j];
        if (at[u] + j >= box.low && at[u] + j < box.high) total[u] += d * d;
      }
  }
  const A sum = block_sum((total[0] + total[1]) + (total[2] + total[3]), shared_memory<A>());
  if (threadIdx.x == 0)
    partial[sample * gridDim.y + blockIdx.y] = box.sound ? sum : static_cast<A>(NAN);
}

// One block: Σ_v Σ partial_v / count_v.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(
    const A* partial,  // (V, each)
    A* loss,           // (), written
    int64_t views, int64_t each, const Geometry g) {
  double total = 0;
  for (int64_t v = 0; v < views; ++v) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < each; i += blockDim.x) sum += partial[v * each + i];
    sum = block_sum(sum, shared_memory<double>());
    total += sum / count_of(g, v);
  }
  if (threadIdx.x == 0) *loss = static_cast<A>(total);
}

// Block (v·B + b, part): its share of the sample's gradient. NaN for an unsound box.
template <typename T, typename S, int N>
__global__ void __launch_bounds__(kThreads, kResident) reconstruction_backward_kernel(
    const acc_t<T>* grad,     // ()
    const T* reconstruction,  // (V·B, sample)
    const S* images,          // (B, sample)
    T* result,                // (V·B, sample), written
    const Geometry g) {
  using A = acc_t<T>;
  const int64_t sample = blockIdx.x;
  int64_t image = sample;
  const int64_t view = g.by_B.split(image);
  const T* r = reconstruction + sample * g.sample;
  const S* x = images + image * g.sample;
  T* out = result + sample * g.sample;
  const Box box = box_of(g, sample);
  Share<N> share(g, 0, g.lines, 0, g.length);
  const A outside = box.sound ? A{0} : static_cast<A>(NAN);
  const A scale = 2 * *grad / static_cast<A>(count_of(g, view));
  while (share.left > 0) {
    Cell<A, N> left[kUnroll] = {}, right[kUnroll] = {};
    int64_t at[kUnroll], offset[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, share.next()) {
      offset[u] = -1, at[u] = 0;
      if (share.left <= 0) continue;
      at[u] = share.at();
      offset[u] = share.line * g.length + at[u];
      if (share.row < box.top || share.row >= box.bottom) at[u] = box.high;
      if (at[u] >= box.high || at[u] + N <= box.low) continue;
      left[u] = load_cell<A, N>(r + offset[u]);
      right[u] = load_cell<A, N>(x + offset[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (offset[u] < 0) continue;
      Vector<T, N> d;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool inside = at[u] + j >= box.low && at[u] + j < box.high;
        d[j] = narrow<T>(inside ? scale * (left[u].v[j] - right[u].v[j]) : outside);
      }
      store_global<kStream>(out + offset[u], d);
    }
  }
}

// Both tensors in the reconstruction's memory format, and their geometry.
struct Arguments {
  Arguments(const Tensor& reconstruction_, const Tensor& images_,
            const std::optional<Tensor>& boxes_)
      : reconstruction(checked_reconstruction(reconstruction_, images_, boxes_)), N(reconstruction_.size(0)), C(images_.size(1)),
        H(images_.size(2)), W(images_.size(3)),
        images(torch::stable::contiguous(images_, reconstruction.channels_last
                                                      ? MemoryFormat::ChannelsLast
                                                      : MemoryFormat::Contiguous)),
        boxes(boxes_) {
    // The kernels read images in the reconstruction's dtype or in its accumulation type.
    const ScalarType type = acc_type(reconstruction.tensor);
    if (images.scalar_type() != reconstruction.tensor.scalar_type() && images.scalar_type() != type)
      images = torch::stable::to(images, type);
    if (boxes) boxes = packed(*boxes);
    const bool last = reconstruction.channels_last;
    g.B = images_.size(0), g.sample = C * H * W, g.counted = g.B * g.sample;
    g.by_B = Divisor<int64_t>(std::max<int64_t>(1, g.B));
    g.planes = g.lines = 1, g.length = g.sample, g.width = g.pixel = 1;
    g.boxes = boxes ? in<int64_t>(*boxes) : nullptr;
    if (!boxes) return;
    g.planes = static_cast<int>(last ? 1 : C), g.lines = static_cast<int>(H);
    g.width = static_cast<int>(W), g.pixel = static_cast<int>(last ? C : 1);
    g.length = W * g.pixel;
  }

  // Blocks (sample, part): enough to occupy all multiprocessors.
  Grid grid(int64_t access) {
    const int64_t most = ceil_div(g.sample, kThreads * kUnroll * access);
    const int64_t wanted = ceil_div(8 * multiprocessors(images), std::max<int64_t>(1, N));
    const int64_t parts = std::max<int64_t>(1, std::min({most, wanted, int64_t{65535}}));
    g.by_parts = Divisor<int64_t>(parts);
    return {N, parts};
  }

  // Calls body(T(), S(), N) with the dtypes of both tensors and the elements per cell.
  template <typename Body>
  void dispatched(const Tensor* written, const Body& body) const {
    dispatch(reconstruction.tensor.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto with_images = [&](auto image) {
        using S = decltype(image);
        constexpr int kCell = kVector<T>;
        const auto aligned = [&](const Tensor& x) {
          return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
        };
        if (g.length % kCell == 0 && aligned(reconstruction.tensor) && aligned(images) &&
            (!written || aligned(*written)))
          body(zero, S(), std::integral_constant<int, kCell>());
        else
          body(zero, S(), std::integral_constant<int, 1>());
      };
      if constexpr (std::is_same_v<T, acc_t<T>>)
        with_images(T());
      else if (images.scalar_type() == reconstruction.tensor.scalar_type())
        with_images(T());
      else
        with_images(acc_t<T>());
    });
  }

  Image reconstruction;
  int64_t N, C, H, W;
  Tensor images;
  std::optional<Tensor> boxes;
  Geometry g;
};

// reconstruction (V·B, C, H, W), images (B, C, H, W), boxes (V, B, 4) int64 or none → ()
Tensor reconstruction_loss(const Tensor& reconstruction, const Tensor& images,
                           const std::optional<Tensor>& boxes) {
  Arguments a(reconstruction, images, boxes);
  const Tensor& r = a.reconstruction.tensor;
  const Tensor loss = new_tensor(r, {}, acc_type(r));
  const int64_t views = r.numel() > 0 ? a.N / a.g.B : 0;
  a.dispatched(nullptr, [&](auto zero, auto image, auto cell) {
    using T = decltype(zero);
    using S = decltype(image);
    using A = acc_t<T>;
    constexpr int N = decltype(cell)::value;
    const Grid grid = a.grid(N);
    const Tensor partial = new_tensor(r, {a.N, grid.y}, acc_type(r));
    if (views > 0)
      launch({"reconstruction_loss", r, grid, kThreads, kScratch}, squares_kernel<T, S, N>,
             in<T>(r), in<S>(a.images), out<A>(partial), a.g);
    launch({"reconstruction_loss", r, {1}, kFinishThreads, kScratch}, finish_kernel<A>,
           in<A>(partial), out<A>(loss), views, a.g.B * grid.y, a.g);
  });
  return loss;
}

// grad () and forward's arguments → gradient (V·B, C, H, W), dtype and format of the reconstruction
Tensor reconstruction_loss_backward(const Tensor& grad, const Tensor& reconstruction,
                                    const Tensor& images, const std::optional<Tensor>& boxes) {
  check_reconstruction_loss_backward(grad, reconstruction);
  Arguments a(reconstruction, images, boxes);
  const Tensor& r = a.reconstruction.tensor;
  const Tensor result = new_tensor(r, {a.N, a.C, a.H, a.W}, r.scalar_type(),
                                   a.reconstruction.channels_last);
  if (result.numel() == 0) return result;
  a.dispatched(&result, [&](auto zero, auto image, auto cell) {
    using T = decltype(zero);
    using S = decltype(image);
    constexpr int N = decltype(cell)::value;
    launch({"reconstruction_loss_backward", r, a.grid(N), kThreads, kScratch},
           reconstruction_backward_kernel<T, S, N>, in<acc_t<T>>(grad), in<T>(r),
           in<S>(a.images), out<T>(result), a.g);
  });
  return result;
}

}  // namespace

SANM_CUDA_KERNELS(m) {
  m.impl("reconstruction_loss.cuda", TORCH_BOX(&reconstruction_loss));
  m.impl("reconstruction_loss_backward.cuda", TORCH_BOX(&reconstruction_loss_backward));
}

}  // namespace sanm
