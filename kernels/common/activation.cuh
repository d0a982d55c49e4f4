// Activation functions as fixed sequences of f32 operations, each rounded once: the bits of the CPU's
// `reference::activate` (src/device/cpu/reference/epilogue.rs, which has the sources), whatever the compiler.
#pragma once

#include "common/abi.h"

// e^x with x held to -87..87, so that nothing is subnormal; NaN counts as -87.
__device__ __forceinline__ float exp_exact(float x) {
  constexpr float TO_WHOLE = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = fminf(fmaxf(x, -87.0f), 87.0f);
  const float shifted = __fmaf_rn(x, 1.44269504f, TO_WHOLE);
  const float n = __fsub_rn(shifted, TO_WHOLE);
  const float r = __fmaf_rn(n, 2.1219444e-4f, __fmaf_rn(n, -355.0f / 512.0f, x));
  float p = __fmaf_rn(0.001394864f, r, 0.00837517f);
  p = __fmaf_rn(p, r, 0.041666217f);
  p = __fmaf_rn(p, r, 0.16666415f);
  p = __fmaf_rn(p, r, 0.5f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));  // times 2^n; the shift drops TO_WHOLE
}

// 1 / x rounded once, x from 1 to 2^126: __frcp_rn without its check for other x, which would keep the compiler from
// working on several at a time. Compared on a GPU for every such x.
__device__ __forceinline__ float reciprocal_from_1(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
}

// y / (1 + exp(-t)), as y times a rounded reciprocal.
__device__ __forceinline__ float sigmoid_times(float y, float t) {
  return __fmul_rn(y, reciprocal_from_1(__fadd_rn(1.0f, exp_exact(-t))));
}

__device__ __forceinline__ float relu(float y) { return 0.0f > y ? 0.0f : y; }

__device__ __forceinline__ float gelu_tanh(float y) {
  return sigmoid_times(y, __fmul_rn(__fmaf_rn(__fmul_rn(y, y), 0.071354814f, 1.5957692f), y));
}

__device__ __forceinline__ float gelu_erf(float y) {
  constexpr float ERFC[10] = {0.17087277f, -0.8221522f,  1.4885159f,  -1.135204f, 0.27886807f,
                              -0.18628806f, 0.09678418f, 0.37409196f, 1.0000237f, -1.2655122f};
  const float size = fabsf(y), z = __fmul_rn(size, 0.70710678f);
  const float t = __frcp_rn(__fmaf_rn(z, 0.5f, 1.0f));
  float p = ERFC[0];
#pragma unroll
  for (int i = 1; i < 10; ++i) p = __fmaf_rn(p, t, ERFC[i]);
  const float half = __fmul_rn(__fmul_rn(0.5f, t), exp_exact(__fmaf_rn(-z, z, p)));
  return __fmaf_rn(-size, half, relu(y));
}

// Any but SWIGLU, which pairs outputs.
__device__ __forceinline__ float activate(float y, uint32_t activation) {
  switch (activation) {
    case LOWBIT_ACTIVATION_RELU: return relu(y);
    case LOWBIT_ACTIVATION_GELU_TANH: return gelu_tanh(y);
    case LOWBIT_ACTIVATION_GELU_ERF: return gelu_erf(y);
    case LOWBIT_ACTIVATION_SILU: return sigmoid_times(y, y);
    default: return y;
  }
}

__device__ __forceinline__ float swiglu(float gate, float up) { return __fmul_rn(sigmoid_times(gate, gate), up); }
