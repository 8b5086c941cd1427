// Checks of the operators' arguments before they are read, on every device.
//
// The public functions check the same, with better messages. A direct call of
// torch.ops.sanm_kernels does not, and a kernel would read past the end of a tensor that is too
// short, or misread another dtype.
#pragma once

#include <initializer_list>

#include "stable.h"

namespace sanm {

constexpr int64_t kAny = -1;  // any size
constexpr ScalarType kFloating = ScalarType::Undefined;  // any floating dtype
constexpr int64_t kIntEnd = int64_t{1} << 31;  // exclusive bound of what kernels count in int

inline bool is_of(const Tensor& x, ScalarType type) {
  const ScalarType own = x.scalar_type();
  if (type != kFloating) return own == type;
  return own == ScalarType::Float || own == ScalarType::Half || own == ScalarType::BFloat16 ||
         own == ScalarType::Double;
}

// Checks of arguments, all of which are on one device.
class Expect {
 public:
  explicit Expect(const Tensor& on) : index_(on.get_device_index()) {}

  // x has this shape and dtype.
  void operator()(const Tensor& x, const char* name, std::initializer_list<int64_t> shape,
                  ScalarType type) const {
    bool fits = x.dim() == static_cast<int64_t>(shape.size());
    for (int64_t d = 0; fits && d < x.dim(); ++d)
      fits = shape.begin()[d] == kAny || shape.begin()[d] == x.size(d);
    if (!fits)
      value_error(name, ": expected shape ", shape_text(shape.begin(), shape.size()), ", got ",
                  shape_text(x));
    typed(x, name, type);
  }
  void operator()(const OptTensor& x, const char* name, std::initializer_list<int64_t> shape,
                  ScalarType type) const {
    if (x) (*this)(*x, name, shape, type);
  }
  void typed(const Tensor& x, const char* name, ScalarType type) const {
    if (!is_of(x, type)) value_error(name, ": another dtype was expected");
    if (x.get_device_index() != index_) value_error(name, ": another device was expected");
  }
  // x has one dimension and at least n elements of type int64.
  void indices(const Tensor& x, const char* name, int64_t n) const {
    (*this)(x, name, {kAny}, ScalarType::Long);
    if (x.size(0) < n)
      value_error(name, ": expected at least ", n, " entries, got ", x.size(0));
  }

 private:
  int32_t index_;
};

inline void expect(bool holds, const char* what) {
  if (!holds) value_error(what);
}

// Run-time numbers: n contiguous doubles, on the CPU or on the kernel's device.
inline void expect_numbers(const Tensor& x, const char* name, int64_t n) {
  if (x.numel() != n || x.scalar_type() != ScalarType::Double || !x.is_contiguous())
    value_error(name, ": expected ", n, " float64, dense, got shape ", shape_text(x));
}

// Σ sizes, each ≥ 0
inline int64_t total_of(const std::vector<int64_t>& sizes, const char* name) {
  int64_t total = 0;
  for (const int64_t size : sizes)
    if (size < 0 || __builtin_add_overflow(total, size, &total))
      value_error(name, ": expected sizes ≥ 0 whose sum has 64 bits");
  return total;
}

// x (n, K) floats, least ≤ K < 2³¹
inline void expect_logits(const Expect& all, const Tensor& x, int64_t least) {
  all(x, "logits", {kAny, kAny}, kFloating);
  if (x.size(1) < least || x.size(1) >= kIntEnd)
    value_error("logits: expected from ", least, " to 2³¹ − 1 classes, got ", x.size(1));
}

// ---- sample_loss

inline void check_sample_loss(const Tensor& logits, const Tensor& labels) {
  const Expect all(logits);
  expect_logits(all, logits, 1);
  all(labels, "labels", {logits.size(0)}, ScalarType::Long);
}

inline void check_sample_loss_backward(const Tensor& grad, const Tensor& logits,
                                       const Tensor& labels, const Tensor& normalizer) {
  check_sample_loss(logits, labels);
  const Expect all(logits);
  const int64_t n = logits.size(0);
  all(grad, "grad", {n}, acc_type(logits));
  all(normalizer, "normalizer", {n, 2}, acc_type(logits));
}

// ---- masked_loss

inline void check_masked_loss(const Tensor& logits, const Tensor& targets, const OptTensor& ratio,
                              const OptTensor& permutation, const OptTensor& prior,
                              const Tensor& scalars, int64_t num_labeled) {
  const Expect all(logits);
  expect_logits(all, logits, 2);
  const int64_t n = logits.size(0), K = logits.size(1), dims = targets.dim();
  int64_t rows = 1;
  if (targets.scalar_type() == ScalarType::Long) {
    all.indices(targets, "targets", n);
    rows = targets.size(0);
  } else {
    all.typed(targets, "targets", kFloating);
    if (dims < 2 || dims > 4 || targets.size(dims - 1) != K)
      value_error("targets: expected shape (…, ", K, ") with 1 to 3 leading dimensions, got ",
                  shape_text(targets));
    for (int64_t d = 0; d + 1 < dims; ++d) rows *= targets.size(d);
    if (rows < n) value_error("targets: expected at least ", n, " rows, got ", rows);
  }
  all(ratio, "ratio", {rows}, acc_type(logits));
  all(prior, "prior", {K}, acc_type(logits));
  if (permutation) all.indices(*permutation, "mix permutation", n);
  expect_numbers(scalars, "scalars", 4);
  check_count(num_labeled, n, "num_labeled");
}

inline void check_masked_loss_backward(std::initializer_list<const OptTensor*> grads,
                                       const OptTensor& grad_per_sample, const Tensor& logits,
                                       const Tensor& normalizer, const Tensor& p_mean,
                                       const Tensor& counts) {
  const Expect all(logits);
  const ScalarType type = acc_type(logits);
  const int64_t n = logits.size(0);
  for (const OptTensor* grad : grads) all(*grad, "grad", {}, type);
  all(grad_per_sample, "grad_per_sample", {n}, type);
  all(normalizer, "normalizer", {n, 2}, type);
  all(p_mean, "p_mean", {logits.size(1)}, type);
  all(counts, "counts", {2}, ScalarType::Long);
}

// ---- refine_targets

inline void check_refine_targets(const std::vector<Tensor>& logits, const OptTensor& labels,
                                 const OptTensor& clean_prob, const Tensor& exponent) {
  expect(!logits.empty(), "logits: expected at least one tensor, got none");
  const Expect all(logits[0]);
  expect_logits(all, logits[0], 1);
  const int64_t B = logits[0].size(0), K = logits[0].size(1);
  for (const Tensor& z : logits) all(z, "logits", {B, K}, logits[0].scalar_type());
  expect(labels.has_value() == clean_prob.has_value(), "labels: expected with clean_prob");
  if (labels && labels->scalar_type() == ScalarType::Long)
    all(labels, "labels", {B}, ScalarType::Long);
  else
    all(labels, "labels", {B, K}, kFloating);
  all(clean_prob, "clean_prob", {B}, kFloating);
  expect_numbers(exponent, "exponent", 1);
}

// ---- mixup_views; both return the number of rows of all views together

inline int64_t check_mixup_views(const std::vector<Tensor>& views, const Tensor& lam,
                                 const Tensor& permutation, int64_t rows) {
  expect(!views.empty(), "views: expected at least one tensor, got none");
  const Expect all(views[0]);
  std::vector<int64_t> sizes;
  for (const Tensor& view : views) {
    all.typed(view, "views", views[0].scalar_type());
    bool alike = view.dim() == views[0].dim() && view.dim() > 0;
    for (int64_t d = 1; alike && d < view.dim(); ++d) alike = view.size(d) == views[0].size(d);
    if (!alike)
      value_error("views: expected shapes like ", shape_text(views[0]), ", got ", shape_text(view));
    sizes.push_back(view.size(0));
  }
  const int64_t total = total_of(sizes, "views");
  check_count(rows, total, "rows");
  all.indices(permutation, "permutation", rows);
  expect_numbers(lam, "lam", 1);
  return total;
}

inline int64_t check_mixup_views_backward(const Tensor& grad, const Tensor& lam,
                                          const Tensor& permutation,
                                          const std::vector<int64_t>& sizes) {
  const Expect all(grad);
  all.typed(grad, "grad", kFloating);
  const int64_t total = total_of(sizes, "sizes");
  expect(grad.dim() > 0 && grad.size(0) <= total, "grad: expected at most the views' rows");
  all.indices(permutation, "permutation", grad.size(0));
  expect_numbers(lam, "lam", 1);
  return total;
}

// ---- reconstruction_loss

// (N, C, H, W); kernels count channels and sides in int
inline void expect_image(const Expect& all, const Tensor& x, const char* name) {
  all(x, name, {kAny, kAny, kAny, kAny}, kFloating);
  for (int64_t d = 1; d < 4; ++d)
    if (x.size(d) >= kIntEnd)
      value_error(name, ": expected sides and channels below 2³¹, got ", shape_text(x));
}

// Returns the reconstruction, checked
inline const Tensor& checked_reconstruction(const Tensor& reconstruction, const Tensor& images,
                                            const OptTensor& boxes) {
  const Expect all(reconstruction);
  expect_image(all, images, "images");
  all(reconstruction, "reconstruction", {kAny, images.size(1), images.size(2), images.size(3)},
      kFloating);
  const int64_t N = reconstruction.size(0), B = images.size(0);
  expect(B > 0 ? N % B == 0 : N == 0, "reconstruction: expected a multiple of the images");
  all(boxes, "boxes", {kAny, B, 4}, ScalarType::Long);
  expect(!boxes || B == 0 || boxes->size(0) == N / B, "boxes: expected those of every view");
  return reconstruction;
}

inline void check_reconstruction_loss_backward(const Tensor& grad, const Tensor& reconstruction) {
  Expect{reconstruction}(grad, "grad", {}, acc_type(reconstruction));
}

// ---- fit_label_quality

inline void check_fit_label_quality(const Tensor& losses, const OptTensor& history,
                                    const std::vector<double>& uniforms) {
  const Expect all(losses);
  all(losses, "losses", {kAny}, kFloating);
  all(history, "history", {kAny, losses.size(0)}, losses.scalar_type());
  bool drawn = uniforms.size() == 3;
  for (const double u : uniforms) drawn = drawn && u >= 0 && u < 1;
  expect(drawn, "uniforms: expected three numbers in [0, 1)");
}

// ---- masked_forward and its gradients; its other checks are in masked_forward.h

inline void check_features(const Expect& all, const Tensor& features, int64_t H, int64_t W) {
  expect_image(all, features, "features");
  expect(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0,
         "features: expected no empty dimension but the batch");
  expect(H >= 1 && W >= 1 && H < kIntEnd && W < kIntEnd,
         "size: expected two integers ≥ 1 and < 2³¹");
}

inline void check_modulate_backward(const Tensor& grad, const Tensor& targets,
                                    const Tensor& ratio) {
  const Expect all(targets);
  all(targets, "targets", {kAny, kAny}, kFloating);
  const int64_t B = targets.size(0), K = targets.size(1);
  expect(K >= 2 && K < kIntEnd, "targets: expected from 2 to 2³¹ − 1 classes");
  all(grad, "grad", {kAny, B, K}, targets.scalar_type());
  all(ratio, "ratio", {grad.size(0), B}, ScalarType::Float);
}

inline void check_masked_views_backward(const Tensor& grad, const Tensor& boxes) {
  const Expect all(grad);
  expect_image(all, grad, "grad");
  all(boxes, "boxes", {kAny, kAny, 4}, ScalarType::Int);
  const int64_t N = grad.size(0), V = boxes.size(0), B = boxes.size(1);
  expect(V > 0 && (B > 0 ? N % B == 0 && N / B == V : N == 0),
         "grad: expected an image for every box");
}

// ---- masked_classifier

inline void check_masked_classifier(const Tensor& features, const Tensor& box,
                                    const Tensor& targets, const Tensor& weight,
                                    const OptTensor& bias, int64_t H, int64_t W) {
  const Expect all(features);
  check_features(all, features, H, W);
  const int64_t B = features.size(0);
  all(box, "box", {B, 4}, ScalarType::Int);
  all(weight, "weight", {kAny, features.size(1)}, kFloating);
  const int64_t K = weight.size(0);
  all(bias, "bias", {K}, kFloating);
  all(targets, "targets", {B, K}, kFloating);
}

inline void check_masked_classifier_backward(const OptTensor& grad_logits,
                                             const OptTensor& grad_loss, const Tensor& features,
                                             const Tensor& weight, const Tensor& logits,
                                             const Tensor& targets, const Tensor& pooled,
                                             const Tensor& visible) {
  const Expect all(features);
  check_features(all, features, 1, 1);
  const ScalarType type = acc_type(features);
  const int64_t B = features.size(0), C = features.size(1);
  all(logits, "logits", {B, kAny}, type);
  const int64_t K = logits.size(1);
  all(grad_logits, "grad_logits", {B, K}, type);
  all(grad_loss, "grad_loss", {}, type);
  all(weight, "weight", {K, C}, kFloating);
  all(targets, "targets", {B, K}, kFloating);
  all(pooled, "pooled", {B, C}, type);
  all(visible, "visible", {B, features.size(2), features.size(3)}, type);
}

}  // namespace sanm
