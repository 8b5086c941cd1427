// Final targets of the loss, row by row: t_i = λ·t'_i + (1 − λ)·t'_π(i), where t' is the target row, or
// the one-hot row of a label, after the label modulation. None of them is ever a whole tensor.
#pragma once

#include "cpu/common.h"
#include "cpu/convert.h"
#include "cpu/softmax.h"
#include "cpu/values.h"
#include "math/modulation.h"

namespace sanm {

template <typename A>
class Targets {
 public:
  // targets (…, K) floats of any strides, or (M,) int64; ratio (M,) in A; permutation (≥ n,) int64
  Targets(const Tensor& targets, const std::optional<Tensor>& ratio,
          const std::optional<Tensor>& permutation, int64_t K, double lam, bool clamp,
          int64_t ignore_index)
      : targets_(targets), type_(targets.scalar_type()), ratio_(ratio), permutation_(permutation), K_(K),
        lam_(static_cast<A>(lam)), other_(static_cast<A>(1 - lam)), clamp_(clamp),
        ignore_index_(ignore_index) {
    if (ratio_) r_ = in<A>(*(ratio_ = packed(*ratio_)));
    if (permutation_) partner_ = in<int64_t>(*(permutation_ = packed(*permutation_)));
    if (type_ == ScalarType::Long) {
      labels_ = in<int64_t>(targets_ = packed(targets_));
      rows_ = targets_.size(0);
    } else {
      index_rows();
    }
  }

  void check(int64_t n) const {
    if (labels_) check_indices(labels_, rows_, K_, "targets", ignore_index_);
    if (partner_) check_indices(partner_, n, rows_, "mix permutation");
    if (r_) check_unit_interval(r_, rows_, "ratio");
  }

  // Whether row i counts: neither it nor its partner is to be ignored.
  bool counts(int64_t i) const {
    return !labels_ || (labels_[i] != ignore_index_ &&
                        (!partner_ || labels_[partner_[i]] != ignore_index_));
  }

  int64_t counting(int64_t begin, int64_t end) const {
    if (!labels_) return end - begin;
    int64_t number = 0;
    for (int64_t i = begin; i < end; ++i) number += counts(i);
    return number;
  }

  // The target of row i, which counts → t (width), zero from K on; `spare` (width) is overwritten.
  template <typename Size>
  __attribute__((always_inline)) inline void row(int64_t i, Size width, A* __restrict t, A* __restrict spare) const {
    const int32_t K = static_cast<int32_t>(K_);
    const Change own = load(i, width, t);
    if (!partner_) {
      if (!r_) return;
#pragma omp simd
      for (int32_t k = 0; k < width; ++k) t[k] = k < K ? t[k] + own.add : A(0);
      t[own.at] = own.top;
      return;
    }
    const Change other = load(partner_[i], width, spare);
    const bool same = own.at == other.at;
    const A own_there = same ? own.top : t[other.at] + own.add,
            other_here = same ? other.top : spare[own.at] + other.add;
    const A lam = lam_, rest = other_, add = own.add, other_add = other.add;
    const A own_new = lam * own.top + rest * other_here,
            other_new = lam * own_there + rest * other.top;
    if constexpr (std::is_same_v<Size, ShortWidth>) {  // short: stored once, in one vector
      const int32_t at = static_cast<int32_t>(own.at), other_at = static_cast<int32_t>(other.at);
#pragma omp simd
      for (int32_t k = 0; k < width; ++k) {
        const A mixed = lam * (t[k] + add) + rest * (spare[k] + other_add);
        const A inside = k < K ? mixed : A(0);
        const A here = k == at ? own_new : inside;
        t[k] = k == other_at ? other_new : here;
      }
      return;
    }
#pragma omp simd
    for (int32_t k = 0; k < width; ++k) {
      const A mixed = lam * (t[k] + add) + rest * (spare[k] + other_add);
      t[k] = k < K ? mixed : A(0);
    }
    t[own.at] = own_new;
    t[other.at] = other_new;
  }

 private:
  // How the modulation changes a row: at its largest element, and elsewhere.
  struct Change {
    int64_t at;
    A top, add;
  };

  // Target row m as it is → t (width), and its change
  template <typename Size>
  __attribute__((always_inline)) inline Change load(int64_t m, Size width, A* __restrict t) const {
    int64_t top = 0;
    if (labels_) {
      std::fill(t, t + width, A(0));
      t[top = labels_[m]] = 1;
    } else {
      const A pad = r_ ? kLowest<A> : A(0);
      if (direct_) widen_padded(direct_ + offset_[m], stride_, K_, pad, width, t);
      else convert(m, pad, width, t);
      if (r_ && !unchanged(m, t)) top = row_argmax(t, width);
    }
    if (!r_ || unchanged(m, t)) return {top, t[top], A(0)};
    const Modulation<A> change = modulation(t[top], K_, r_[m], clamp_);
    return {top, change.top, change.add};
  }

  // Nothing is dropped from row m, as from most of a step, whichever its largest target is.
  bool unchanged(int64_t m, const A* t) const { return r_[m] == 0 && (!clamp_ || t[0] >= 0); }

  // Out of the way of the usual case, a row that needs no conversion.
  template <typename Size>
  __attribute__((noinline)) void convert(int64_t m, A pad, Size width, A* t) const {
    widen_padded(values_, type_, offset_[m], stride_, K_, pad, width, t);
  }

  // Where each row starts: expanded dimensions stay unfolded.
  void index_rows() {
    const int64_t lead = targets_.dim() - 1;
    int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
    for (int64_t d = 0; d < lead; ++d) {
      size[3 - lead + d] = targets_.size(d);
      stride[3 - lead + d] = targets_.stride(d);
    }
    values_ = targets_.const_data_ptr();
    if (type_ == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float))
      direct_ = static_cast<const A*>(values_);
    rows_ = size[0] * size[1] * size[2];
    stride_ = targets_.stride(lead);
    offset_.reserve(rows_);
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c)
          offset_.push_back(a * stride[0] + b * stride[1] + c * stride[2]);
  }

  Tensor targets_;
  const ScalarType type_;
  std::optional<Tensor> ratio_, permutation_;
  const int64_t K_;
  const A lam_, other_;
  const bool clamp_;
  const int64_t ignore_index_;
  const A* r_ = nullptr;
  const int64_t* partner_ = nullptr;
  const int64_t* labels_ = nullptr;
  const void* values_ = nullptr;
  const A* direct_ = nullptr;  // the values, if they are of type A
  int64_t stride_ = 1, rows_ = 0;
  std::vector<int64_t> offset_;
};

}  // namespace sanm
