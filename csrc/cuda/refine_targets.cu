// Refined targets: p = mean of softmax over the given logits, then q·label + (1 − q)·p where labels
// are given, then p^(1/T) / Σ p^(1/T). Dividing by the maximum before the power keeps the sum from
// underflowing to 0.
//
// One launch for up to kViews views, else one for each group of views, with the partial sum of the
// softmaxes stored in the result. A row stays in registers (K ≤ 1024, or 512 doubles) or in shared
// memory, or is processed in several sweeps, with p stored in the result.
#include "cuda/softmax.h"

namespace sanm {
namespace {

constexpr int kViews = 32;             // per launch
constexpr int kHoldBytes = 47 * 1024;  // most for two rows in shared memory, in all below 48 KiB

template <typename S>
struct Views {
  const S* data[kViews];  // (B, K) each
  ScalarType type;
  int64_t row_stride[kViews], class_stride[kViews];
  bool vectors[kViews];
  int count;
  bool first, last;  // the group of views
};

// (B,) int64 or (B, K) floats of the type, or neither; clean_prob (B,) floats with them.
struct Labels {
  const int64_t* indices = nullptr;
  const void* values = nullptr;
  ScalarType type = ScalarType::Float, prob_type = ScalarType::Float;
  int64_t row_stride = 0, class_stride = 0;
  const void* clean_prob = nullptr;
  int64_t prob_stride = 0;
};

// Calls body(p) with p the address of element `offset` of an array of this dtype.
template <typename Body>
SANM_DEVICE void with_type(ScalarType type, const void* data, int64_t offset, const Body& body) {
  device_dispatch(type, [&](auto zero) {
    body(static_cast<const decltype(zero)*>(data) + offset);
  });
}

// Adds the softmax of one view's row to p: in registers, `mine`, or in memory, `kept`.
template <typename Shape, typename S, typename A>
SANM_DEVICE void add_softmax(
    const S* row,  // (K,) of the type, elements `stride` apart
    ScalarType type, int64_t stride, bool vectors, int K, bool start,
    A* held,  // (K,) for the logits, or null
    A* kept,  // (K,), the sum, of rows that are not whole
    A (&mine)[Shape::C]) {
  constexpr A kLowest = static_cast<A>(-INFINITY);
  A x[Shape::C];
  A top = kLowest;
  const auto load = [&](int first) {
    S stored[Shape::C];
    load_piece<Shape>(row, stride, vectors, first, K, lowest<S>(type), stored);
    decode(type, stored, x);
  };
  for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
    load(first);
    Shape::each_class(first, K, [&](int c, int k) {
      top = Max()(top, x[c]);
      if (!Shape::kWhole && held && k < K) held[k] = x[c];
    });
  }
  top = Shape::max(top);
  const auto again = [&](int first) {
    if (Shape::kWhole) return;
    if (!held) return load(first);
    Shape::each_class(first, K, [&](int c, int k) { x[c] = k < K ? held[k] : kLowest; });
  };
  RowSum<Shape> total;
  for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
    again(first);
    A part = 0;
    Shape::each_class(first, K, [&](int c, int k) {
      const A e = std::exp(x[c] - top);
      part += e;
      if (Shape::kWhole) x[c] = e;
    });
    total.add(part);
  }
  const A scale = 1 / total.row();
  for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
    again(first);
    Shape::each_class(first, K, [&](int c, int k) {
      const A p = (Shape::kWhole ? x[c] : std::exp(x[c] - top)) * scale;
      if (Shape::kWhole)
        mine[c] += k < K ? p : A{0};
      else if (k < K)
        kept[k] = (start ? A{0} : kept[k]) + p;
    });
  }
}

// Grid-stride over rows. Shared memory: scratch; then, if `hold`, p and a view's logits (K,) each.
// A lane reads of p, the logits and the result only what it wrote itself, so no barrier is needed.
template <typename Shape, typename S>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) refine_targets_kernel(
    const Views<S> views, const Labels labels,
    typename Shape::A* result,  // (B, K), written
    int64_t B, int K, int64_t all_views, const Numbers<1> number, bool hold, bool vectors) {
  using A = typename Shape::A;
  A* const shared = shared_memory<A>(kScratch);
  const A exponent = static_cast<A>(number[0]);
  Shape::each_row(B, [&](int64_t i, bool exists) {
    A* const row = result + i * K;
    A* const kept = hold ? shared : row;
    A p[Shape::C];
    if (Shape::kWhole || hold) {
      for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
        Shape::each_class(first, K, [&](int c, int k) {
          const A before = views.first || !exists || k >= K ? A{0} : row[k];
          if (Shape::kWhole) p[c] = before;
          else if (k < K) kept[k] = before;
        });
      }
    }
    for (int v = 0; v < views.count; ++v)
      add_softmax<Shape>(views.data[v] + i * views.row_stride[v], views.type,
                         views.class_stride[v], views.vectors[v], K,
                         !hold && views.first && v == 0, hold ? shared + K : nullptr, kept, p);
    // A sweep over the row: p[c] is class k, loaded from and stored to `kept` unless whole.
    const auto sweep = [&](const auto& body) {
      for (int first = 0; first < Shape::end(K); first += Shape::kPiece) {
        Shape::each_class(first, K, [&](int c, int k) {
          if (k >= K) return;
          if (!Shape::kWhole) p[c] = kept[k];
          body(p[c], k);
          if (!Shape::kWhole) kept[k] = p[c];
        });
      }
    };
    if (views.last) {
      A q = 0, largest = 0;
      int64_t label = -1;
      if (labels.clean_prob)
        with_type(labels.prob_type, labels.clean_prob, i * labels.prob_stride,
                  [&](const auto* at) { q = static_cast<A>(widen(*at)); });
      if (labels.indices) label = labels.indices[i * labels.row_stride];
      // a label outside [0, K) gives NaN: a kernel cannot raise
      const A zero = labels.indices && (label < 0 || label >= K) ? static_cast<A>(NAN) : A{0};
      sweep([&](A& p_k, int) { p_k /= static_cast<A>(all_views); });
      if (labels.indices)
        sweep([&](A& p_k, int k) { p_k = q * (k == label ? A{1} : zero) + (1 - q) * p_k; });
      else if (labels.values)
        with_type(labels.type, labels.values, i * labels.row_stride, [&](const auto* t) {
          sweep([&](A& p_k, int k) {
            const A t_k = static_cast<A>(widen(load_global<1>(t + k * labels.class_stride)[0]));
            p_k = q * t_k + (1 - q) * p_k;
          });
        });
      sweep([&](A& p_k, int) { largest = Max()(largest, p_k); });
      largest = Shape::max(largest);
      RowSum<Shape> powers;
      sweep([&](A& p_k, int) {
        const A share = p_k / largest;
        p_k = exponent == 2 ? share * share : share == 0 ? A{0} : std::pow(share, exponent);
        powers.add(p_k);
      });
      const A total = powers.row();
      sweep([&](A& p_k, int) { p_k /= total; });
    }
    if (Shape::kWhole) {
      if (exists) store_piece<Shape>(row, vectors, 0, K, p);
    } else if (hold) {
      for (int first = 0; first < K; first += Shape::kPiece) {
        Shape::each_class(first, K, [&](int c, int k) { p[c] = k < K ? kept[k] : A{0}; });
        store_piece<Shape>(row, vectors, first, K, p);
      }
    }
  });
}

// logits (B, K) each; labels (B,) int64 or (B, K) floats with clean_prob (B,), or neither;
// 1/T (1,) double → (B, K)
Tensor refine_targets(const std::vector<Tensor>& logits, const std::optional<Tensor>& labels,
                      const std::optional<Tensor>& clean_prob, const Tensor& exponent) {
  check_refine_targets(logits, labels, clean_prob, exponent);
  const Tensor& z = logits[0];
  const int64_t B = z.size(0), K = z.size(1), all_views = static_cast<int64_t>(logits.size());
  const Tensor result = new_tensor(z, {B, K}, acc_type(z));
  Labels label;
  if (labels && clean_prob) {
    label.row_stride = labels->stride(0);
    if (labels->scalar_type() == ScalarType::Long) {
      label.indices = in<int64_t>(*labels);
    } else {
      label.values = labels->const_data_ptr();
      label.type = labels->scalar_type();
      label.class_stride = labels->stride(1);
    }
    label.clean_prob = clean_prob->const_data_ptr();
    label.prob_type = clean_prob->scalar_type();
    label.prob_stride = clean_prob->stride(0);
  }
  dispatch_stored(z.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using A = acc_t<S>;
    bool all_vectors = true;
    for (const Tensor& x : logits) all_vectors = all_vectors && vector_rows(x);
    with_row_shape<S>(K, all_vectors, [&](auto shape) {
      using Shape = decltype(shape);
      const int64_t row = K * static_cast<int64_t>(sizeof(A));
      const bool hold = !Shape::kWhole && 2 * row <= kHoldBytes;
      for (int64_t start = 0; start < all_views; start += kViews) {
        Views<S> views{};
        views.count = static_cast<int>(std::min<int64_t>(kViews, all_views - start));
        views.type = z.scalar_type();
        views.first = start == 0;
        views.last = start + views.count == all_views;
        for (int v = 0; v < views.count; ++v) {
          const Tensor& x = logits[start + v];
          views.data[v] = in<S>(x);
          views.row_stride[v] = x.stride(0), views.class_stride[v] = x.stride(1);
          views.vectors[v] = vector_rows(x);
        }
        launch({"refine_targets", z, {row_blocks<Shape>(z, B)}, Shape::kThreads,
                kScratch + (hold ? 2 * row : 0)},
               refine_targets_kernel<Shape, S>, views, label, out<A>(result), B,
               static_cast<int>(K), all_views, Numbers<1>(exponent), hold,
               vector_rows(result));
      }
    });
  });
  return result;
}

}  // namespace

SANM_CUDA_KERNELS(m) { m.impl("refine_targets.cuda", TORCH_BOX(&refine_targets)); }

}  // namespace sanm
