// From f32 values and from exact sums to 8-bit codes: the bits of the CPU's (docs/numerics.md).
#pragma once

#include <stdint.h>

// clamp(rne(x / scale) + zero, lowest, 127). The sum is taken in f32, where it is exact or far out of range.
__device__ __forceinline__ int8_t quantize_code(float x, float scale, float zero, float lowest) {
  const float q = __fadd_rn(rintf(__fdiv_rn(x, scale)), zero);
  return static_cast<int8_t>(fminf(fmaxf(q, lowest), 127.0f));
}

// quantize_code with lowest -128 for one scale of 2^-60 to 2^60, without a division: x is first held to where codes end,
// then x / scale is the correctly rounded quotient, from a correctly rounded reciprocal and two steps that each take the
// exact remainder into account (Markstein 1990). NaN takes the lowest code. Of a dynamic scale, amax / 127, no code is
// below -127 either.
class StaticCoder {
 public:
  __device__ __forceinline__ StaticCoder(float scale, int32_t zero) : scale_(scale), zero_(zero) {
    inverse_ = __frcp_rn(scale);
    whole_ = TO_WHOLE + static_cast<float>(zero);
    limit_ = 0.49995f * scale;
    // A quarter of a step outside the last code: still rounded to it.
    low_ = __fmul_rn(static_cast<float>(-128 - zero) - 0.25f, scale);
    high_ = __fmul_rn(static_cast<float>(127 - zero) + 0.25f, scale);
  }

  static __device__ __forceinline__ bool takes(float scale) { return scale >= 0x1p-60f && scale <= 0x1p60f; }

  // In the low byte; the others hold anything.
  __device__ __forceinline__ uint32_t code(float x) const {
    x = fminf(fmaxf(x, low_), high_);
    float q = __fmul_rn(x, inverse_);
    q = __fmaf_rn(__fmaf_rn(-q, scale_, x), inverse_, q);
    q = __fmaf_rn(__fmaf_rn(-q, scale_, x), inverse_, q);
    return __float_as_uint(__fadd_rn(q, TO_WHOLE)) + static_cast<uint32_t>(zero_);
  }

  // Codes of eight values, HOLD: that may lie outside what codes reach. A value times the reciprocal is nearly the quotient,
  // and rounds as it does unless it is nearly half way between two codes, which the remainder tells: off by at most
  // 3 / 100000 of a step, as 255 roundoffs each of the product and of the quotient are.
  template <bool HOLD>
  __device__ __forceinline__ uint2 codes8(const float (&v)[8]) const {
    uint32_t codes[8];
    float worst = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = HOLD ? fminf(fmaxf(v[i], low_), high_) : v[i];
      const float shifted = __fmaf_rn(x, inverse_, whole_);
      codes[i] = __float_as_uint(shifted);
      worst = fmaxf(worst, fabsf(__fmaf_rn(-__fsub_rn(shifted, whole_), scale_, x)));
    }
    if (worst > limit_) {
#pragma unroll
      for (int i = 0; i < 8; ++i) codes[i] = code(v[i]);
    }
    return make_uint2(low_bytes(codes[0], codes[1], codes[2], codes[3]), low_bytes(codes[4], codes[5], codes[6], codes[7]));
  }

 private:
  static constexpr float TO_WHOLE = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits

  static __device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
  }

  float scale_, inverse_, low_, high_;
  int32_t zero_;
  float whole_, limit_;
};

// floor(a * b / 2^31 + 1/2), saturated: gemmlowp's SaturatingRoundingDoublingHighMul (Jacob et al. 2018, section 2.2).
__device__ __forceinline__ int32_t doubling_high_mul(int32_t a, int32_t b) {
  if (a == INT32_MIN && b == INT32_MIN) return INT32_MAX;
  return static_cast<int32_t>((static_cast<int64_t>(a) * b + (1 << 30)) >> 31);
}

// x / 2^shift for shift up to 31, ties away from zero: gemmlowp's RoundingDivideByPOT.
__device__ __forceinline__ int32_t rounding_shift(int32_t x, uint32_t shift) {
  const uint32_t mask = (1u << shift) - 1, rest = static_cast<uint32_t>(x) & mask;
  return (x >> shift) + (rest > (mask >> 1) + (x < 0 ? 1u : 0u) ? 1 : 0);
}

// clamp(multiplier * sum + zero, lowest, 127), the multiplier mantissa * 2^-31 * 2^-shift.
__device__ __forceinline__ int32_t fixed_code(int32_t sum, int32_t mantissa, int32_t shift, int32_t zero,
                                              int32_t lowest) {
  const int64_t wide = static_cast<int64_t>(sum) << max(-shift, 0);
  const int32_t shifted = static_cast<int32_t>(min(max(wide, static_cast<int64_t>(INT32_MIN)), static_cast<int64_t>(INT32_MAX)));
  const int32_t scaled = rounding_shift(doubling_high_mul(shifted, mantissa), static_cast<uint32_t>(max(shift, 0)));
  // Held to what cannot overflow with the zero point: codes end long before.
  return min(max(min(max(scaled, -1024), 1024) + zero, lowest), 127);
}
