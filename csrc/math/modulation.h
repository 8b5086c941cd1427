// Label modulation (section 4 of the method): a part d of row t's largest target is moved to the
// others in equal shares. Every backend computes exactly these rounded steps, without FMA:
//   j* = first argmax t,  d = ratio or min(ratio, t[j*]),  add = d / (K − 1),
//   t'[k] = t[k] + add,  t'[j*] = t[j*] − d.
#pragma once

#include "math/hd.h"

namespace sanm {

// The first index of the largest of K values.
template <typename T>
SANM_HD int64_t first_argmax(const T* t, int64_t K) {
  int64_t top = 0;
  for (int64_t k = 1; k < K; ++k)
    if (t[k] > t[top]) top = k;
  return top;
}

// d, which the largest target loses.
template <typename A>
SANM_HD A drop(A ratio, A top, bool clamp) {
  return clamp && top < ratio ? top : ratio;
}

// For a row whose largest target is `best`: its new value, and what each of the others gains.
template <typename A>
struct Modulation {
  A top, add;
};

template <typename A>
SANM_HD Modulation<A> modulation(A best, int64_t K, A ratio, bool clamp) {
  const A d = drop(ratio, best, clamp);
  return {best - d, d / static_cast<A>(K - 1)};
}

// t (K), whose first argmax is `top` → out (K), computed in A: float, or double for double targets.
// K ≥ 2.
template <typename T, typename A>
SANM_HD void modulate_row(const T* t, int64_t K, int64_t top, A ratio, bool clamp, T* out) {
  const Modulation<A> m = modulation(static_cast<A>(t[top]), K, ratio, clamp);
  for (int64_t k = 0; k < K; ++k) out[k] = static_cast<T>(static_cast<A>(t[k]) + m.add);
  out[top] = static_cast<T>(m.top);
}

}  // namespace sanm
