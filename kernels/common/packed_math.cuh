// Two 16-bit floats of a word at a time, and the bits and bytes of words.
#pragma once

#include "common/dtype.cuh"

// (a & mask) | bits
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ uint32_t mul_16x2(f16, uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t mul_16x2(bf16, uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  return fma_bf16x2(a, b, 0x80008000);  // a * b - 0: sm_80 has no packed product of bf16
#endif
}
__device__ __forceinline__ uint32_t fma_16x2(f16, uint32_t a, uint32_t b, uint32_t c) { return fma_f16x2(a, b, c); }
__device__ __forceinline__ uint32_t fma_16x2(bf16, uint32_t a, uint32_t b, uint32_t c) { return fma_bf16x2(a, b, c); }

template <typename T>
__device__ __forceinline__ uint32_t both(float v) {
  return pack2<T>(v, v);
}
__device__ constexpr float power_of_two(int exponent) {
  float power = 1.0f;
  for (; exponent > 0; --exponent) power *= 2.0f;
  for (; exponent < 0; ++exponent) power *= 0.5f;
  return power;
}
// A word of two bf16 numbers: 2^low and 2^high.
__device__ constexpr uint32_t bf16_powers(int low, int high) {
  return static_cast<uint32_t>(high + 127) << 23 | static_cast<uint32_t>(low + 127) << 7;
}

// The bytes of a and b that four nibbles of `selector` number.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
