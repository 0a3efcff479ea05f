// The activations that are fused, and their derivatives, for vectors of float.
#pragma once

#include <cmath>

#include "call.h"
#include "vectors.h"

namespace {

using normwise::kGelu;
using normwise::kNone;
using normwise::kRelu;
using normwise::kSilu;

// e^x to two units in the last place, within the range of normal floats; 0 and infinity beyond. Not of nan.
inline F exponential(F given) {
  const F lowest = F{} - 87.33654f, highest = F{} + 88.37626f;
  F x = given < lowest ? lowest : given;
  x = x > highest ? highest : x;
  const F magic = F{} + 0x1.8p23f;  // adding it rounds to a whole number, which is then in the last bits
  const F shifted = fma(x, F{} + 1.44269504f, magic);
  const F n = shifted - magic;
  const F r = fma(n, F{} - -2.12194440e-4f, fma(n, F{} - 0.693359375f, x));  // x - n ln 2, in two parts
  F p = F{} + 1.9875691500e-4f;
  p = fma(p, r, F{} + 1.3981999507e-3f);
  p = fma(p, r, F{} + 8.3334519073e-3f);
  p = fma(p, r, F{} + 4.1665795894e-2f);
  p = fma(p, r, F{} + 1.6666665459e-1f);
  p = fma(p, r, F{} + 5.0000001201e-1f);
  p = fma(p, r * r, r) + 1.0f;
  const F power = (F)((I)p + ((I)shifted << 23));
  return given < lowest ? F{} : given > highest ? F{} + __builtin_inff() : power;
}

// The normal distribution's Phi(x), with a small fractional error in its lower tail as well: 2e-7 of the formula, and
// 1e-6 in float down to -3. Source: Press et al., Numerical Recipes, "erfcc".
inline F normal_cdf(F x) {
  const F a = (x < 0 ? -x : x) * 0.70710678f;
  const F t = 1.0f / fma(a, F{} + 0.5f, F{} + 1.0f);
  F p = F{} + 0.17087277f;
  p = fma(p, t, F{} - 0.82215223f);
  p = fma(p, t, F{} + 1.48851587f);
  p = fma(p, t, F{} - 1.13520398f);
  p = fma(p, t, F{} + 0.27886807f);
  p = fma(p, t, F{} - 0.18628806f);
  p = fma(p, t, F{} + 0.09678418f);
  p = fma(p, t, F{} + 0.37409196f);
  p = fma(p, t, F{} + 1.00002368f);
  p = fma(p, t, F{} - 1.26551223f);
  const F tail = 0.5f * t * exponential(fma(-a, a, p));
  return x < 0 ? tail : 1.0f - tail;
}

// The loops are compiled for no activation, for ReLU, and for any: the others cost more than a call.
enum Act { kActNone, kActRelu, kActAny };

__attribute__((noinline)) F activate_any(F z, int activation) {
  if (activation == kNone) return z;
  if (activation == kRelu) return z < 0 ? F{} : z;
  if (activation == kSilu) return z / (1.0f + exponential(-z));
  return z * normal_cdf(z);
}

template <int kAct>
inline F activate(F z, int activation) {
  if constexpr (kAct == kActNone) return z;
  if constexpr (kAct == kActRelu) return z < 0 ? F{} : z;  // nan stays nan
  return activate_any(z, activation);
}

// The derivative at z.
__attribute__((noinline)) F any_slope(F z, int activation) {
  if (activation == kNone) return F{} + 1.0f;
  if (activation == kRelu) return z > 0 ? F{} + 1.0f : F{};
  if (activation == kSilu) {
    const F s = 1.0f / (1.0f + exponential(-z));
    return z < -88 ? F{} : s * fma(z, 1.0f - s, F{} + 1.0f);
  }
  const F size = z < 0 ? -z : z, density = exponential(z * z * -0.5f);
  return size > 14 ? (z > 0 ? F{} + 1.0f : F{}) : fma(z * 0.39894228f, density, normal_cdf(z));
}

template <int kAct>
inline F activation_slope(F z, int activation) {
  if constexpr (kAct == kActNone) return F{} + 1.0f;
  if constexpr (kAct == kActRelu) return z > 0 ? F{} + 1.0f : F{};
  return any_slope(z, activation);
}

// The same for one double: for columns that float cannot hold.
inline double activated(double z, int activation) {
  if (activation == kRelu) return z < 0 ? 0 : z;
  if (activation == kSilu) return z / (1 + std::exp(-z));
  if (activation == kGelu) return z * 0.5 * std::erfc(-z * 0.7071067811865476);
  return z;
}
inline double activated_slope(double z, int activation) {
  if (activation == kRelu) return z > 0 ? 1 : 0;
  if (activation == kSilu) {
    const double s = 1 / (1 + std::exp(-z));
    return s * (1 + z * (1 - s));
  }
  if (activation == kGelu)
    return 0.5 * std::erfc(-z * 0.7071067811865476) + z * 0.3989422804014327 * std::exp(-0.5 * z * z);
  return 1;
}

}  // namespace
