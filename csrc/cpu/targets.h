// Final targets of the loss, row by row: t_i = λ·t'_i + (1 − λ)·t'_π(i), where t' is the target
// row, or the one-hot row of a label, after the label modulation. No tensor of them is made.
#pragma once

#include "cpu/common.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/values.h"
#include "math/modulation.h"

namespace sanm {

// A target row after the label modulation: its values (K,), null if they must be converted first,
// the index `at` of its maximum, the new value of that one, and what is added to the others.
template <typename A>
struct Modulated {
  const A* values;
  int64_t at;
  A top, add;

  template <typename Count>
  Pack<A> pack(int64_t k, Count n) const {
    const Pack<A> changed = load_pack<A>(values + k, n, A(0)) + add;
    return is_lane<A>(at, k) ? splat(top) : changed;
  }
};

// The final target of a row, computed pack by pack; 0 from K on.
template <typename A>
struct FinalTarget {
  Modulated<A> own, other;
  bool mixed;
  A lam, rest;

  template <typename Count>
  Pack<A> pack(int64_t k, Count n) const {
    Pack<A> t = own.pack(k, n);
    if (mixed) t = lam * t + rest * other.pack(k, n);
    if constexpr (std::is_same_v<Count, Whole>) {
      return t;
    } else {
      return lanes<A>() < static_cast<Integer<A>>(n) ? t : Pack<A>{};
    }
  }
};

template <typename A>
class Targets {
 public:
  // targets (…, K) floats of any strides, or (M,) int64; ratio (M,) in A; permutation (≥ n,) int64
  Targets(const Tensor& targets, const OptTensor& ratio, const OptTensor& permutation, int64_t n,
          int64_t K, double lam, bool clamp, int64_t ignore_index)
      : targets_(targets), type_(targets.scalar_type()), ratio_(packed(ratio)),
        permutation_(packed(permutation)), K_(K), lam_(static_cast<A>(lam)),
        rest_(static_cast<A>(1 - lam)), clamp_(clamp), ignore_index_(ignore_index),
        r_(in_or_null<A>(ratio_)), partner_(in_or_null<int64_t>(permutation_)) {
    if (type_ == ScalarType::Long) {
      labels_ = in<int64_t>(targets_ = packed(targets_));
      rows_ = targets_.size(0);
      zeros_.resize(K_);
      check_indices(labels_, rows_, K_, "targets", ignore_index_);
    } else {
      index_rows();
    }
    if (partner_) check_indices(partner_, n, rows_, "mix permutation");
    if (r_) check_unit_interval(r_, rows_, "ratio");
    if (r_ && !labels_) find_largest();
    modulate();
  }

  // Whether row i counts: neither its label nor its partner's is ignore_index.
  bool counts(int64_t i) const {
    return !labels_ || (labels_[i] != ignore_index_ &&
                        (!partner_ || labels_[partner(i)] != ignore_index_));
  }

  int64_t counting(int64_t begin, int64_t end) const {
    if (!labels_) return end - begin;
    int64_t number = 0;
    for (int64_t i = begin; i < end; ++i) number += counts(i);
    return number;
  }

  // The target of row i; unspecified for a row that does not count. Rows that need a conversion are
  // converted into `buffer`, `spare` (K). Inlined: a call would return its result through memory.
  __attribute__((always_inline)) FinalTarget<A> row(int64_t i, A* buffer, A* spare) const {
    const bool mixed = partner_;
    const Modulated<A> own = fetch(i, buffer);
    return {own, mixed ? fetch(partner(i), spare) : own, mixed, lam_, rest_};
  }

 private:
  int64_t partner(int64_t i) const { return index_below(partner_ + i, rows_); }

  __attribute__((always_inline)) Modulated<A> fetch(int64_t m, A* buffer) const {
    const Modulated<A>& row = modulated_[m];
    return {row.values ? row.values : values(m, buffer), row.at, row.top, row.add};
  }

  __attribute__((noinline)) const A* values(int64_t m, A* buffer) const {
    if (direct_) return direct_ + offset_[m];
    widen(values_, type_, offset_[m], stride_, K_, buffer);
    return buffer;
  }

  // Modulates every target row once; with mixing, each is used twice.
  void modulate() {
    modulated_.resize(rows_);
    const auto all = [&](const auto& top, const auto& start) {
      for (int64_t m = 0; m < rows_; ++m) {
        const int64_t at = labels_ ? labels_[m] : r_ ? largest_[m] : 0;
        modulated_[m] = {start(m), at, top(m, at), A(0)};
        if (!r_) continue;
        const Modulation<A> change = modulation(modulated_[m].top, K_, r_[m], clamp_);
        modulated_[m].top = change.top, modulated_[m].add = change.add;
      }
    };
    if (type_ == ScalarType::Long)
      all([](int64_t, int64_t) { return A(1); }, [&](int64_t) { return zeros_.data(); });
    else if (direct_)
      all([&](int64_t m, int64_t at) { return direct_[offset_[m] + at]; },
          [&](int64_t m) { return direct_ + offset_[m]; });
    else
      dispatch(type_, [&](auto zero) {
        const auto* const x = static_cast<const decltype(zero)*>(values_);
        all([&](int64_t m, int64_t at) { return static_cast<A>(x[offset_[m] + at * stride_]); },
            [](int64_t) -> const A* { return nullptr; });
      });
  }

  // The offset of each row, and the first row with the same memory: broadcast dimensions (stride 0)
  // are not materialised.
  void index_rows() {
    const int64_t lead = targets_.dim() - 1;
    int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
    for (int64_t d = 0; d < lead; ++d) {
      size[3 - lead + d] = targets_.size(d);
      stride[3 - lead + d] = targets_.stride(d);
    }
    values_ = targets_.const_data_ptr();
    rows_ = size[0] * size[1] * size[2];
    stride_ = targets_.stride(lead);
    if (type_ == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float) &&
        (stride_ == 1 || K_ == 1))
      direct_ = static_cast<const A*>(values_);
    offset_.resize(rows_);
    first_.resize(rows_);
    int64_t *offset = offset_.data(), *first = first_.data();
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b, offset += size[2], first += size[2]) {
        const int64_t start = ((stride[0] ? a : 0) * size[1] + (stride[1] ? b : 0)) * size[2];
        for (int64_t c = 0; c < size[2]; ++c) {
          offset[c] = a * stride[0] + b * stride[1] + c * stride[2];
          first[c] = start + (stride[2] ? c : 0);
        }
      }
  }

  // The first argmax of each row, computed once for rows that share memory.
  void find_largest() {
    std::vector<int64_t> different;
    for (int64_t m = 0; m < rows_; ++m)
      if (first_[m] == m) different.push_back(m);
    largest_.resize(rows_);
    const int64_t count = static_cast<int64_t>(different.size());
    torch::stable::parallel_for(0, count, 4 * row_grain(K_), [&](int64_t begin, int64_t end) {
      const Rows<A> buffer(1, direct_ ? 0 : K_);
      for (int64_t d = begin; d < end; ++d)
        largest_[different[d]] = row_argmax(values(different[d], buffer[0]), K_);
    });
    for (int64_t m = 0; m < rows_; ++m) largest_[m] = largest_[first_[m]];
  }

  Tensor targets_;
  const ScalarType type_;
  const OptTensor ratio_, permutation_;
  const int64_t K_;
  const A lam_, rest_;
  const bool clamp_;
  const int64_t ignore_index_;
  const A* const r_;
  const int64_t* const partner_;
  const int64_t* labels_ = nullptr;
  std::vector<A> zeros_;  // (K,) the values of every row, if targets are labels
  const void* values_ = nullptr;
  const A* direct_ = nullptr;  // the values, if rows can be read without conversion
  int64_t stride_ = 1, rows_ = 0;
  std::vector<int64_t> offset_, first_, largest_;  // (M,)
  std::vector<Modulated<A>> modulated_;            // (M,)
};

}  // namespace sanm
