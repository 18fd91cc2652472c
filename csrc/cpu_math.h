// Functions of one float for loops that the compiler turns into vectors: no branch, no call, no table.
//
// The coefficients are fits (least squares, reweighted towards the smallest maximum) made for these intervals.
#pragma once

#include <cmath>

#include "cpu_common.h"

namespace skd {

// 2^t of t <= 0 (a rounding above is allowed), within 2e-9 and float32's rounding; 2^-126 below that. NaN stays NaN.
SKD_INLINE float exp2_of_negative(float t) {
  t = t < -126.0f ? -126.0f : t;
  const int32_t whole = int32_t(t - 0.5f);  // towards zero: the nearest
  const float f = t - float(whole);
  float power = 1.5337558e-4f;
  power = power * f + 1.33998657e-3f;
  power = power * f + 9.61851981e-3f;
  power = power * f + 5.55032901e-2f;
  power = power * f + 2.40226462e-1f;
  power = power * f + 6.93147182e-1f;
  power = power * f + 1.0f;
  return power * from_bits(uint32_t(whole + 127) << 23);
}

// The normal distribution at z: its density, and how much of it is below z (off by 2e-7 at most).
struct Normal {
  float density, below;
};
SKD_INLINE Normal normal(float z) {
  const float distance = std::abs(z);
  const float bell = exp2_of_negative(-0.72134752f * z * z);  // e^(-z^2 / 2)
  // erfc(a) = e^(-a^2) t P(t) with t = 1 / (1 + 0.4 a), a = |z| / sqrt(2).
  const float t = 1.0f / (1.0f + 0.28284271f * distance);
  float ratio = -0.20025682f;
  ratio = ratio * t + 0.70913792f;
  ratio = ratio * t - 0.37089339f;
  ratio = ratio * t + 0.46826303f;
  ratio = ratio * t + 0.16182778f;
  ratio = ratio * t + 0.23192146f;
  const float beyond = 0.5f * bell * t * ratio;
  return {0.39894228f * bell, z < 0 ? beyond : 1.0f - beyond};
}

}  // namespace skd
