// Inputs and outputs of masked_forward on every device; shapes: sanm_kernels/ops/masked_forward.py.
#pragma once

#include "arguments.h"
#include "math/box.h"

namespace sanm {

// B samples, features (B, C, h, w), images (B, Cin, H, W), V views, S draw sets.
struct Inputs {
  Tensor features, targets, clean_prob;
  OptTensor draws, seed, sample_index, images;
  int64_t H, W, K;
  Settings settings;
  std::vector<double> fill_value;
};

struct Outputs {
  Tensor stats, positions, ratio, boxes, targets, views;
};

// make(sizes, dtype, channels_last) returns an uninitialised tensor.
template <typename Make>
Outputs allocate(const Inputs& in, const Make& make) {
  using Sizes = std::vector<int64_t>;
  const int64_t B = in.features.size(0), V = in.settings.view_count(), S = in.settings.draw_sets();
  const ScalarType acc = acc_type(in.features);
  const bool soft = in.targets.scalar_type() != ScalarType::Long;
  return {make(Sizes{5, B}, acc, false),
          make(Sizes{2, B, 2}, ScalarType::Int, false),
          make(Sizes{S, B}, ScalarType::Float, false),
          make(Sizes{V, B, 4}, ScalarType::Int, false),
          make(Sizes{S, B, in.K}, soft ? in.targets.scalar_type() : ScalarType::Float, false),
          in.images ? make(Sizes{V * B, in.images->size(1), in.H, in.W}, in.images->scalar_type(),
                           is_channels_last(*in.images))
                    : make(Sizes{0}, in.features.scalar_type(), false)};
}

// The fields of Settings (sanm_kernels/reference/masked_forward.py) as numbers; the last is one
// fill value, or one per channel.
constexpr int64_t kFixedSettings = 12;

inline Settings as_settings(const std::vector<double>& x) {
  expect(x.size() > kFixedSettings, "settings: expected 13 numbers or more");
  const auto code = [](double number) {
    return number >= 0 && number <= 3 ? static_cast<int64_t>(number) : -1;
  };
  return {code(x[0]), x[1] != 0, x[2] != 0, x[3] != 0, x[4] != 0, code(x[5]),
          x[6],       x[7],      x[8],      x[9],      x[10],     x[11]};
}

inline std::vector<double> fill_values(const std::vector<double>& x) {
  return {x.begin() + kFixedSettings, x.end()};
}

// See arguments.h.
inline void check_masked_forward(const Inputs& in) {
  const Expect all(in.features);
  check_features(all, in.features, in.H, in.W);
  const Settings& s = in.settings;
  const int64_t B = in.features.size(0), K = in.K,
                channels = in.images ? in.images->size(1) : 0;
  expect(s.views >= 1 && s.views <= 3 && s.fill >= kConstant && s.fill <= kPixel,
         "config: expected views from 1 to 3 and a fill from 0 to 3");
  expect(K >= 2 && K < kIntEnd, "num_classes: expected from 2 to 2³¹ − 1");
  if (in.targets.scalar_type() == ScalarType::Long)
    all(in.targets, "targets", {B}, ScalarType::Long);
  else
    all(in.targets, "targets", {B, K}, kFloating);
  all(in.clean_prob, "clean_prob", {B}, ScalarType::Float);
  if (in.images) {
    expect_image(all, *in.images, "images");
    all(in.images, "images", {B, channels, in.H, in.W}, kFloating);
    expect(channels > 0, "images: expected at least one channel");
    const int64_t values = static_cast<int64_t>(in.fill_value.size());
    expect(s.fill != kConstant || values == 1 || values == channels,
           "fill_value: expected one number, or one per channel");
  }
  all(in.draws, "draws", {B, kAny}, ScalarType::Double);
  if (in.draws) {
    const int64_t fills = in.images && s.fill == kUniform ? s.view_count() * channels : 0;
    expect(in.draws->size(1) >= 2 * s.draw_sets() + fills, "draws: expected more columns");
  }
  expect(in.seed || (in.draws && !(in.images && s.fill == kPixel)),
         "seed: expected where draws are missing, and for the pixel fill");
  all(in.seed, "seed", {}, ScalarType::Long);
  all(in.sample_index, "sample_index", {B}, ScalarType::Long);
}

// The output tensors have the shapes, dtypes and memory formats that allocate() gives them.
inline void check_dense(const Inputs& in, const Outputs& o) {
  const Expect all(in.features);
  const Tensor* const given[] = {&o.stats, &o.positions, &o.ratio,
                                 &o.boxes, &o.targets,   &o.views};
  const Tensor* const* next = given;
  allocate(in, [&](const std::vector<int64_t>& size, ScalarType type, bool channels_last) {
    const Tensor& x = **next++;
    bool fits = x.dim() == static_cast<int64_t>(size.size());
    for (int64_t d = 0; fits && d < x.dim(); ++d) fits = x.size(d) == size[d];
    fits = fits && (channels_last ? is_channels_last(x) || x.numel() <= 1 : x.is_contiguous());
    if (!fits)
      value_error("out: expected a dense tensor of shape ", shape_text(size.data(), size.size()),
                  channels_last ? " in channels_last" : "", ", got ", shape_text(x));
    all.typed(x, "out", type);
    return x;
  });
}

// The memory layout of a tensor, queried once: each query is a call into torch.
struct Layout {
  explicit Layout(const Tensor& x)
      : dim(x.dim()), size(x.sizes().data()), stride(x.strides().data()), type(x.scalar_type()),
        begin(static_cast<const char*>(x.const_data_ptr())), end(begin) {
    int64_t last = 0;
    bool empty = false;
    for (int64_t d = 0; d < dim; ++d)
      empty = empty || size[d] == 0, last += (size[d] - 1) * stride[d];
    if (!empty) end += (last + 1) * element_bytes(type);
  }
  bool meets(const Layout& other) const { return begin < other.end && other.begin < end; }

  // Whether this is x[first], or x[first : first + length].
  bool is_slice(const Layout& x, int64_t first, std::optional<int64_t> length) const {
    const int64_t dropped = length ? 0 : 1;
    if (dim != x.dim - dropped || type != x.type) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (size[d] != (d == 0 && length ? *length : x.size[d + dropped])) return false;
      if (size[d] > 1 && stride[d] != x.stride[d + dropped]) return false;
    }
    const int64_t offset = first > 0 ? first * x.stride[0] * element_bytes(type) : 0;
    return begin == end || begin == x.begin + offset;
  }

  int64_t dim;
  const int64_t *size, *stride;
  ScalarType type;
  const char *begin, *end;  // addresses of the elements
};

// The outputs overlap neither each other nor an argument, and a result's tensors, where they are
// given (PARTS of sanm_kernels/results.py), are slices of the outputs.
inline void check_memory(const Inputs& in, const Outputs& o,
                         const std::optional<std::vector<Tensor>>& parts) {
  const Layout stats(o.stats), positions(o.positions), ratio(o.ratio), boxes(o.boxes),
      targets(o.targets), views(o.views);
  const Layout* const outputs[] = {&stats, &positions, &ratio, &boxes, &targets, &views};
  const auto apart = [&](const Layout& x) {
    for (const Layout* y : outputs) expect(&x == y || !x.meets(*y), "out: shares memory");
  };
  for (const Layout* x : outputs) apart(*x);
  for (const Tensor* x : {&in.features, &in.targets, &in.clean_prob}) apart(Layout(*x));
  for (const OptTensor* x : {&in.draws, &in.seed, &in.sample_index, &in.images})
    if (*x) apart(Layout(**x));

  if (!parts) return;
  size_t next = 0;
  const auto slice = [&](const Layout& x, int64_t first, std::optional<int64_t> length = {}) {
    expect(next < parts->size() && Layout((*parts)[next]).is_slice(x, first, length),
           "out: expected the slices of its buffers");
    ++next;
  };
  const Settings& s = in.settings;
  const int64_t B = in.features.size(0), V = s.view_count();
  for (int64_t k = 0; k < 5; ++k) slice(stats, k);
  for (int64_t k = 0; k < 2; ++k) slice(positions, k);
  for (int64_t v = 0; v < V; ++v) slice(ratio, s.shared ? 0 : v);
  for (int64_t v = 0; v < V; ++v) slice(boxes, v);
  for (int64_t v = 0; v < V; ++v) slice(targets, s.shared ? 0 : v);
  for (int64_t v = 0; in.images && v < V; ++v) slice(views, v * B, B);
  if (in.images) slice(views, 0, V * B);
  expect(next == parts->size(), "out: expected no more slices");
}

// Checks of masked_forward_out's output tensors, before anything is written.
inline void check_out(const Inputs& in, const Outputs& o,
                      const std::optional<std::vector<Tensor>>& parts) {
  check_dense(in, o);
  check_memory(in, o, parts);
}

// The operators' arguments, in the schema's order.
#define SANM_PARAMETERS                                                                          \
  Tensor features, Tensor targets, Tensor clean_prob, OptTensor draws, OptTensor seed,           \
      OptTensor sample_index, OptTensor images, int64_t H, int64_t W, int64_t K,                 \
      std::vector<double> settings
#define SANM_INPUTS                                                                            \
  Inputs {                                                                                     \
    features, targets, clean_prob, draws, seed, sample_index, images, H, W, K,                 \
        as_settings(settings), fill_values(settings)                                           \
  }

// The output tensors of masked_forward_out, likewise.
#define SANM_OUT_PARAMETERS                                                         \
  Tensor stats, Tensor positions, Tensor ratio, Tensor boxes, Tensor targets_out,   \
      Tensor views_out, std::optional<std::vector<Tensor>> parts
#define SANM_OUTPUTS \
  Outputs { stats, positions, ratio, boxes, targets_out, views_out }

using MaskedForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline MaskedForward as_tuple(const Outputs& o) {
  return {o.stats, o.positions, o.ratio, o.boxes, o.targets, o.views};
}

}  // namespace sanm
