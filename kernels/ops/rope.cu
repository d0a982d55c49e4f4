// What happens to query and key heads between projection and cache: normalization (Qwen3) and rotation, in place.
//
// A fused row is [q heads | k heads | v heads], each head_dim wide.

#include "common/dtype.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "ops/abi.h"

// Computes   x / sqrt(mean(x^2) + eps) * weight for every query and key head.
// Grid       one warp a head, LOWBIT_QK_NORM_WARPS a block.
// Numerics   f32, the sum in a fixed order, one rounding to the activation dtype.
template <typename T>
__device__ void qk_norm(const QkNormArgs& args) {
  const uint32_t heads = args.num_heads + args.num_kv_heads;
  const uint32_t index = blockIdx.x * LOWBIT_QK_NORM_WARPS + threadIdx.x / WARP_SIZE;
  const uint32_t row = index / heads, head = index % heads, lane = threadIdx.x % WARP_SIZE;
  if (row >= args.m) return;
  const uint32_t d = args.head_dim;
  const size_t width = static_cast<size_t>(heads + args.num_kv_heads) * d;
  T* x = static_cast<T*>(args.qkv) + row * width + head * d;
  const float* weight = head < args.num_heads ? args.q_weight : args.k_weight;

  float sum = 0.0f;
  for (uint32_t c = lane; c < d; c += WARP_SIZE) {
    const float v = to_float(x[c]);
    sum = fmaf(v, v, sum);
  }
  sum = warp_reduce(sum, Sum());
  const float inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(d)), args.eps)));
  for (uint32_t c = lane; c < d; c += WARP_SIZE) {
    x[c] = from_float<T>(__fmul_rn(__fmul_rn(to_float(x[c]), inverse), weight[c]));
  }
}

extern "C" __global__ void qk_norm_f16(const __grid_constant__ QkNormArgs args) {
  overlap();
  qk_norm<f16>(args);
}
extern "C" __global__ void qk_norm_bf16(const __grid_constant__ QkNormArgs args) {
  overlap();
  qk_norm<bf16>(args);
}

// Computes   (x, y) <- (x cos - y sin, y cos + x sin) for the pairs (i, i + head_dim / 2) of query and key heads.
// Grid       one block a row; a thread owns eight pairs where head_dim is a multiple of 16, else one.
// Numerics   every operation rounded to f32, then one rounding to the activation dtype: the CPU's bits.
// Source     Su et al. 2021, arXiv 2104.09864, in the half-split form.
template <typename T>
__device__ void rope(const RopeArgs& args) {
  const uint32_t d = args.head_dim, half = d / 2;
  const uint32_t heads = args.num_heads + args.num_kv_heads, pairs = heads * half;
  T* row = static_cast<T*>(args.qkv) + static_cast<size_t>(blockIdx.x) * (heads + args.num_kv_heads) * d;
  const float* table = args.table + static_cast<size_t>(args.positions[blockIdx.x]) * d;
  auto rotate = [](float& x, float& y, float c, float s) {
    const float low = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
    y = __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
    x = low;
  };
  if (half % 8 == 0) {
    for (uint32_t pair = 8 * threadIdx.x; pair < pairs; pair += 8 * blockDim.x) {
      const uint32_t i = pair % half;
      T* low = row + pair / half * d + i;
      float x[8], y[8], c[8], s[8];
      load8(low, x);
      load8(low + half, y);
      load8(table + i, c);
      load8(table + half + i, s);
#pragma unroll
      for (int j = 0; j < 8; ++j) rotate(x[j], y[j], c[j], s[j]);
      store8(low, x);
      store8(low + half, y);
    }
  } else {
    for (uint32_t pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
      const uint32_t i = pair % half;
      T* low = row + pair / half * d + i;
      float x = to_float(low[0]), y = to_float(low[half]);
      rotate(x, y, table[i], table[half + i]);
      low[0] = from_float<T>(x);
      low[half] = from_float<T>(y);
    }
  }
}

extern "C" __global__ void rope_f16(const __grid_constant__ RopeArgs args) {
  overlap();
  rope<f16>(args);
}
extern "C" __global__ void rope_bf16(const __grid_constant__ RopeArgs args) {
  overlap();
  rope<bf16>(args);
}
