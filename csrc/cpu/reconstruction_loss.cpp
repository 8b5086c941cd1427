// Reconstruction loss Σ_v (1/count_v) Σ (r − x)² over V views, of the whole image or the elements
// inside each sample's box, and its gradient (2/count_v)(r − x), zero outside.
//
// A sample is processed run by run: a box is a set of runs of contiguous elements in NCHW as in
// NHWC, the whole image a single one. Each sample is summed by one thread, in pieces accumulated in
// double; the samples' sums are added in order, so that the number of threads does not matter.
#include "cpu/common.h"
#include "cpu/pack.h"
#include "cpu/values.h"

namespace sanm {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kPiece = 1024;

// Both tensors in the reconstruction's memory format, and the boxes.
struct Arguments {
  Arguments(const Tensor& reconstruction_, const Tensor& images_,
            const std::optional<Tensor>& boxes_)
      : reconstruction(checked_reconstruction(reconstruction_, images_, boxes_)), C(images_.size(1)), H(images_.size(2)),
        W(images_.size(3)), B(images_.size(0)), N(reconstruction_.size(0)),
        images(torch::stable::contiguous(images_, reconstruction.channels_last
                                                      ? MemoryFormat::ChannelsLast
                                                      : MemoryFormat::Contiguous)) {
    if (!boxes_) return;
    const Tensor packed_boxes = packed(*boxes_);
    boxes = checked_boxes(in<int64_t>(packed_boxes), N, B, H, W);
  }

  int64_t sample_size() const { return C * H * W; }
  int64_t views() const { return B > 0 ? N / B : 0; }

  // The n-th sample to process: all views of an image, then those of the next one, so that each
  // image is read from memory once.
  int64_t sample(int64_t n) const { return n % views() * B + n / views(); }

  // How many elements of view v count.
  int64_t count(int64_t v) const {
    if (boxes.empty()) return B * sample_size();
    int64_t area = 0;
    for (int64_t i = v * B; i < (v + 1) * B; ++i)
      area += (boxes[i].y1 - boxes[i].y0) * (boxes[i].x1 - boxes[i].x0);
    return area * C;
  }

  // Calls body(first, length) for each run of contiguous elements of sample i that count.
  template <typename Body>
  void runs(int64_t i, const Body& body) const {
    if (boxes.empty()) return body(0, sample_size());
    const Box& b = boxes[i];
    const int64_t planes = reconstruction.channels_last ? 1 : C;
    const int64_t per_pixel = reconstruction.channels_last ? C : 1;
    for (int64_t c = 0; c < planes; ++c)
      for (int64_t y = b.y0; y < b.y1; ++y)
        body((c * H * W + y * W + b.x0) * per_pixel, (b.x1 - b.x0) * per_pixel);
  }

  Image reconstruction;
  int64_t C, H, W, B, N;
  Tensor images;
  std::vector<Box> boxes;  // (V·B,); empty: the whole image
};

// Calls body(r, x, length, at) for n elements of both tensors, converted to A, piece by piece.
template <typename A, typename T, typename Body>
void pieces(const T* r, const Tensor& images, int64_t x_offset, int64_t n, A* left, A* right,
            const Body& body) {
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t length = std::min(kPiece, n - at);
    const A *rp, *xp;
    if constexpr (std::is_same_v<T, A>) {
      rp = r + at;
    } else {
      widen(r + at, 1, length, left);
      rp = left;
    }
    if ((images.scalar_type() == ScalarType::Double) == std::is_same_v<A, double> &&
        images.element_size() == sizeof(A)) {
      xp = in<A>(images) + x_offset + at;
    } else {
      dispatch(images.scalar_type(), [&](auto zero) {
        widen(in<decltype(zero)>(images) + x_offset + at, 1, length, right);
      });
      xp = right;
    }
    body(rp, xp, length, at);
  }
}

// reconstruction (V·B, C, H, W), images (B, C, H, W), boxes (V, B, 4) int64 or none → ()
Tensor reconstruction_loss(const Tensor& reconstruction, const Tensor& images,
                           const std::optional<Tensor>& boxes) {
  const Arguments a(reconstruction, images, boxes);
  const Tensor loss = new_tensor({}, acc_type(reconstruction));
  dispatch(reconstruction.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* r = in<T>(a.reconstruction.tensor);
    const int64_t E = a.sample_size();
    std::vector<double> sums(a.N);
    torch::stable::parallel_for(0, a.N, grain(E), [&](int64_t begin, int64_t end) {
      A left[kPiece], right[kPiece];
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = a.sample(n);
        double total = 0;
        a.runs(i, [&](int64_t first, int64_t length) {
          pieces(r + i * E + first, a.images, i % a.B * E + first, length, left, right,
                 [&](const A* rp, const A* xp, int64_t n, int64_t) {
                   Pack<A> sum{};
                   each_pack(n, [&](int64_t k, auto count) {
                     const Pack<A> error =
                         load_pack<A>(rp + k, count, A(0)) - load_pack<A>(xp + k, count, A(0));
                     sum += error * error;
                   });
                   total += reduce_add<A>(sum);
                 });
        });
        sums[i] = total;
      }
    });
    double result = 0;
    for (int64_t v = 0; v < a.views(); ++v) {
      double total = 0;
      for (int64_t i = v * a.B; i < (v + 1) * a.B; ++i) total += sums[i];
      result += total / std::max<int64_t>(1, a.count(v));
    }
    *out<A>(loss) = static_cast<A>(result);
  });
  return loss;
}

// grad () and forward's arguments → gradient (V·B, C, H, W), dtype and format of the reconstruction
Tensor reconstruction_loss_backward(const Tensor& grad, const Tensor& reconstruction,
                                    const Tensor& images, const std::optional<Tensor>& boxes) {
  check_reconstruction_loss_backward(grad, reconstruction);
  const Arguments a(reconstruction, images, boxes);
  const Tensor result = new_image({a.N, a.C, a.H, a.W}, reconstruction.scalar_type(),
                                  a.reconstruction.channels_last);
  dispatch(reconstruction.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* r = in<T>(a.reconstruction.tensor);
    T* d = out<T>(result);
    const int64_t E = a.sample_size();
    std::vector<A> scale;
    for (int64_t v = 0; v < a.views(); ++v)
      scale.push_back(2 * *in<A>(grad) / std::max<int64_t>(1, a.count(v)));
    const bool stream = a.N * E * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    torch::stable::parallel_for(0, a.N, grain(E), [&](int64_t begin, int64_t end) {
      A left[kPiece], right[kPiece];
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = a.sample(n);
        const A s = scale[i / a.B];
        if (!a.boxes.empty()) std::memset(d + i * E, 0, E * sizeof(T));
        a.runs(i, [&](int64_t first, int64_t length) {
          T* run = d + i * E + first;
          pieces(r + i * E + first, a.images, i % a.B * E + first, length, left, right,
                 [&](const A* rp, const A* xp, int64_t n, int64_t at) {
                   T* const out = run + at;
                   const bool direct = stream && aligned(out);
                   each_pack(n, [&](int64_t k, auto count) {
                     const Pack<A> slope = s * (load_pack<A>(rp + k, count, A(0)) -
                                                load_pack<A>(xp + k, count, A(0)));
                     store_pack<A>(slope, count, out + k, direct);
                   });
                 });
        });
      }
      if (stream) stream_fence();
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m) {
  m.impl("reconstruction_loss.cpu", TORCH_BOX(&reconstruction_loss));
  m.impl("reconstruction_loss_backward.cpu", TORCH_BOX(&reconstruction_loss_backward));
}

}  // namespace sanm
