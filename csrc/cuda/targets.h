// Final targets of the loss, row by row: t_i = λ·t'_i + (1 − λ)·t'_π(i), where t' is the target row
// or a label's one-hot row after the label modulation. No tensor of them is made.
#pragma once

#include "cuda/softmax.h"
#include "math/modulation.h"

namespace sanm {

template <typename A>
struct Targets {
  // targets (…, K) floats of any strides or (M,) int64, ratio (M,) in A, permutation (≥ n,) int64
  Targets(const Tensor& targets, const OptTensor& ratio_,
          const OptTensor& permutation_, int64_t K_, const Share<A>& share_, bool clamp_,
          int64_t ignore_index_)
      : K(static_cast<int>(K_)), ignore_index(ignore_index_), share(share_),
        clamp(clamp_) {
    if (ratio_) ratio = in<A>(*ratio_), ratio_stride = ratio_->stride(0);
    if (permutation_)
      permutation = in<int64_t>(*permutation_), permutation_stride = permutation_->stride(0);
    if (targets.scalar_type() == ScalarType::Long) {
      labels = in<int64_t>(targets);
      M = targets.size(0), stride[2] = targets.stride(0);
      return;
    }
    values = targets.const_data_ptr();
    type = targets.scalar_type();
    vectors = vector_rows(targets);
    const int64_t lead = targets.dim() - 1;
    for (int64_t d = 0; d < lead; ++d) {
      size[3 - lead + d] = targets.size(d);
      stride[3 - lead + d] = targets.stride(d);
    }
    M = size[0] * size[1] * size[2];
    middle = Divisor<int64_t>(std::max<int64_t>(1, size[1]));
    inner = Divisor<int64_t>(std::max<int64_t>(1, size[2]));
    class_stride = targets.stride(lead);
  }

  const void* values = nullptr;     // floats of dtype `type`, or
  const int64_t* labels = nullptr;  // (M,)
  ScalarType type = ScalarType::Float;
  bool vectors = false;
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0}, class_stride = 1;
  Divisor<int64_t> middle, inner;  // by size[1], size[2]
  int64_t M = 0;
  int K;
  const A* ratio = nullptr;  // (M,) or null
  int64_t ratio_stride = 0;
  const int64_t* permutation = nullptr;  // (≥ n,) or null
  int64_t permutation_stride = 0;
  int64_t ignore_index;
  Share<A> share;
  bool clamp;

  // Offset of target row m.
  SANM_DEVICE int64_t start(int64_t m) const {
    if (size[0] == 1 && size[1] == 1) return m * stride[2];
    int64_t second = inner.split(m);
    const int64_t first = middle.split(second);
    return first * stride[0] + second * stride[1] + m * stride[2];
  }
  SANM_DEVICE int64_t label(int64_t m) const { return labels[m * stride[2]]; }

  // The row that row i is mixed with; −1 where π is out of range.
  SANM_DEVICE int64_t partner(int64_t i) const {
    if (!permutation) return i;
    const int64_t m = permutation[i * permutation_stride];
    return m >= 0 && m < M ? m : -1;
  }
  // Whether row i counts: neither its label nor its partner's is ignore_index.
  SANM_DEVICE bool counts(int64_t i) const {
    if (!labels) return true;
    if (label(i) == ignore_index) return false;
    const int64_t other = partner(i);
    return other < 0 || label(other) != ignore_index;
  }
  // NaN where row i's label or partner is out of range, which a kernel cannot report; else 0.
  SANM_DEVICE A poison(int64_t i) const {
    const int64_t other = partner(i);
    const uint64_t classes = static_cast<uint64_t>(K);
    const bool sound = other >= 0 &&
                       (!labels ||
                        (static_cast<uint64_t>(label(i)) < classes &&
                         static_cast<uint64_t>(label(other)) < classes));
    return sound ? A{0} : static_cast<A>(NAN);
  }
};

// One of the two rows that a target is mixed from.
template <typename Shape>
struct TargetRow {
  using A = typename Shape::A;
  A t[Shape::C];  // the current piece
  int64_t start;  // offset of a row of floats
  A ratio;
  int at;      // the class that modulation reduces
  A top, add;  // its new value; what the others gain

  // Loads a piece, unmodulated; nothing for labels.
  SANM_DEVICE void read(const Targets<A>& from, int first) {
    if (from.labels) return;
    load_numbers<Shape>(from.type, from.values, start, from.class_stride, from.vectors, first,
                        from.K, t);
  }

  // Loads row m's label or first piece, and its ratio.
  SANM_DEVICE void load(const Targets<A>& from, int64_t m) {
    if (from.labels) {
      const int64_t label = from.label(m);
      at = label >= 0 && label < from.K ? static_cast<int>(label) : -1;
    } else {
      start = from.start(m);
      if (Shape::kWhole) read(from, 0);
    }
    if (from.ratio) ratio = from.ratio[m * from.ratio_stride];
  }

  // Computes the row's modulation.
  SANM_DEVICE void modulate(const Targets<A>& from) {
    Peak<A> peak{A{1}, at};
    if (!from.labels && from.ratio) {
      peak = {static_cast<A>(-INFINITY), INT32_MAX};
      for (int first = 0; first < Shape::end(from.K); first += Shape::kPiece) {
        if (!Shape::kWhole) read(from, first);
        Shape::each_class(first, from.K, [&](int c, int k) {
          if (k < from.K && t[c] > peak.value) peak = {t[c], k};
        });
      }
      peak = Shape::reduce(peak, Max(), Peak<A>{static_cast<A>(-INFINITY), INT32_MAX});
    }
    at = peak.index;
    top = peak.value, add = 0;
    if (!from.ratio) return;
    const Modulation<A> change = modulation(peak.value, from.K, ratio, from.clamp);
    top = change.top, add = change.add;
  }

  // Class k of the current piece, modulated.
  SANM_DEVICE A value(const Targets<A>& from, int c, int k) const {
    if (from.labels) return k == at ? top : add;
    if (!from.ratio) return t[c];
    return k == at ? top : t[c] + add;
  }
};

// The target of a row, piece by piece.
template <typename Shape>
struct Target {
  using A = typename Shape::A;
  TargetRow<Shape> own, other;

  SANM_DEVICE void open(const Targets<A>& from, int64_t i) {
    const auto partner = [&] {
      const int64_t m = from.partner(i);
      return m < 0 ? 0 : m;
    };
    if constexpr (Shape::kWhole) {  // the loads of both are issued before either is used
      own.load(from, i);
      if (from.permutation) other.load(from, partner());
      own.modulate(from);
      if (from.permutation) other.modulate(from);
    } else {  // in a loop, so that the code for both is instantiated once
#pragma unroll 1
      for (int k = from.permutation ? 1 : 0; k >= 0; --k) {
        own.load(from, k > 0 ? partner() : i);
        own.modulate(from);
        if (k > 0) other = own;
      }
    }
  }

  // Replaces own.t by the target of the piece, 0 from K on. To be called once for a whole row.
  SANM_DEVICE const A (&piece(const Targets<A>& from, int first))[Shape::C] {
    if (!Shape::kWhole) own.read(from, first);
    if (!from.permutation) {
      Shape::each_class(first, from.K, [&](int c, int k) {
        own.t[c] = k < from.K ? own.value(from, c, k) : A{0};
      });
      return own.t;
    }
    if (!Shape::kWhole) other.read(from, first);
    const Share<A> share = from.share.read();
    Shape::each_class(first, from.K, [&](int c, int k) {
      const A mixed = share.own * own.value(from, c, k) + share.partner * other.value(from, c, k);
      own.t[c] = k < from.K ? mixed : A{0};
    });
    return own.t;
  }
};

}  // namespace sanm
