// What happens to query and key heads between projection and cache: normalization (Qwen3) and rotation, in place.
//
// A fused row is [q heads | k heads | v heads], each head_dim wide.

#include "common/dtype.cuh"
#include "common/reduce.cuh"

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

extern "C" __global__ void qk_norm_f16(const __grid_constant__ QkNormArgs args) { qk_norm<f16>(args); }
extern "C" __global__ void qk_norm_bf16(const __grid_constant__ QkNormArgs args) { qk_norm<bf16>(args); }

// Computes   (x, y) <- (x cos - y sin, y cos + x sin) for the pairs (i, i + head_dim / 2) of query and key heads.
// Grid       one block a row, a thread a pair.
// Numerics   every operation rounded to f32, then one rounding to the activation dtype: the CPU's bits.
// Source     Su et al. 2021, arXiv 2104.09864, in the half-split form.
template <typename T>
__device__ void rope(const RopeArgs& args) {
  const uint32_t d = args.head_dim, half = d / 2;
  const uint32_t heads = args.num_heads + args.num_kv_heads;
  T* row = static_cast<T*>(args.qkv) + static_cast<size_t>(blockIdx.x) * (heads + args.num_kv_heads) * d;
  const float* table = args.table + static_cast<size_t>(args.positions[blockIdx.x]) * d;
  for (uint32_t pair = threadIdx.x; pair < heads * half; pair += blockDim.x) {
    const uint32_t i = pair % half;
    T* low = row + pair / half * d + i;
    T* high = low + half;
    const float x = to_float(*low), y = to_float(*high), c = table[i], s = table[half + i];
    *low = from_float<T>(__fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s)));
    *high = from_float<T>(__fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s)));
  }
}

extern "C" __global__ void rope_f16(const __grid_constant__ RopeArgs args) { rope<f16>(args); }
extern "C" __global__ void rope_bf16(const __grid_constant__ RopeArgs args) { rope<bf16>(args); }
