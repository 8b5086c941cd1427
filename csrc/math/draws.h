// Counter-based random numbers: Philox 4×32-10 (Salmon et al., SC 2011).
//
// Counter (number, stream, index low, index high), key (seed low, seed high). Stream 0 holds a
// sample's uniforms, streams 1 and 2 the pixel noise of its max and min view. The same formulas in
// plain torch: sanm_kernels/reference/draws.py.
#pragma once

#include "math/hd.h"

namespace sanm {

struct Words {
  uint32_t w[4];
};

SANM_HD Words philox(uint32_t number, uint32_t stream, int64_t index, int64_t seed) {
  uint32_t c0 = number, c1 = stream, c2 = static_cast<uint32_t>(index),
           c3 = static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed),
           k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The sample's `number`-th uniform in [0, 1), a multiple of 2⁻³².
SANM_HD double uniform(int64_t number, int64_t index, int64_t seed) {
  const Words words = philox(static_cast<uint32_t>(number / 4), 0, index, seed);
  // Neither indexing nor comparing by a variable: a GPU would put the words in local memory.
  const bool odd = number & 1, upper = number & 2;
  return (upper ? odd ? words.w[3] : words.w[2] : odd ? words.w[1] : words.w[0]) * 0x1p-32;
}

// ln x for positive normal x: x = m·2ᵉ with m in [√½, √2), ln m = 2·artanh(s), s = (m − 1)/(m + 1).
SANM_HD double log_series(double x) {
  int e;
  double m = frexp(x, &e);
  if (m < 0.70710678118654757) {
    m *= 2;
    e -= 1;
  }
  const double s = (m - 1) / (m + 1), s2 = s * s;
  double p = 1.0 / 17;
  for (int n = 15; n >= 1; n -= 2) p = p * s2 + 1.0 / n;
  return e * 0.69314718055994530942 + p * (s * 2);
}

// cos(2π·w/2³²): the two high bits give the quadrant, the Taylor series the rest of it.
SANM_HD double cos_turn(uint32_t w) {
  const uint32_t quadrant = w >> 30;
  const double x = (w & 0x3FFFFFFFu) * 0x1p-30 * 1.57079632679489661923, x2 = x * x;
  double c = 1, s = 1;
  for (int n = 18; n >= 2; n -= 2) {
    c = 1 - c * x2 / (n * (n - 1));
    s = 1 - s * x2 / (n * (n + 1));
  }
  const double value = quadrant % 2 == 1 ? s * x : c;
  return quadrant == 1 || quadrant == 2 ? -value : value;
}

// N(0, 1) by the Box–Muller transform, one Philox block per number.
SANM_HD double normal(uint32_t number, uint32_t stream, int64_t index, int64_t seed) {
  const Words words = philox(number, stream, index, seed);
  return sqrt(log_series((words.w[0] + 0.5) * 0x1p-32) * -2.0) * cos_turn(words.w[1]);
}

}  // namespace sanm
