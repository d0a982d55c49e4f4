// What lies between the qkv projection and attention: normalization of query and key heads (Qwen3), rotation, and keys and values
// into their slots of the paged cache.
//
// Computes   for query and key heads: where there are weights, x / sqrt(mean(x^2) + eps) * weight; then for pairs (i, i + head_dim / 2)
//            (x, y) <- (x cos - y sin, y cos + x sin), in place; cache[slot_mapping[r]] = keys and values of row r, where slot
//            UINT32_MAX writes nowhere.
// Layout     a fused row is [q heads | k heads | v heads], each head_dim wide, a multiple of 8; cache rows are [num_kv_heads, head_dim],
//            consecutive by slot.
// Grid       a warp a head, LOWBIT_ROPE_WARPS a block; blockIdx.x is the row. A lane owns two neighbouring pairs of 64.
// Numerics   f32 throughout, the norm's sum in a fixed order, one rounding to the activation type.
// Source     Su et al. 2021, arXiv 2104.09864, in the half-split form.

#include "attention/abi.h"
#include "common/dtype.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"

template <typename T>
__device__ void rope_kv_write(const RopeKvWriteArgs& args) {
  const uint32_t lane = threadIdx.x % WARP_SIZE, head = blockIdx.y * LOWBIT_ROPE_WARPS + threadIdx.x / WARP_SIZE, r = blockIdx.x;
  const uint32_t rotated = args.num_heads + args.num_kv_heads, heads = rotated + args.num_kv_heads;
  if (head >= heads) return;
  const uint32_t d = args.head_dim, half = d / 2, slot = args.slot_mapping[r];
  T* x = static_cast<T*>(args.qkv) + (static_cast<size_t>(r) * heads + head) * d;
  const size_t to = (static_cast<size_t>(slot) * args.num_kv_heads + (head - args.num_heads) % args.num_kv_heads) * d;
  if (head >= rotated) {
    if (slot == UINT32_MAX) return;
    for (uint32_t i = 2 * lane; i < d; i += 2 * WARP_SIZE) {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(args.v_cache) + to + i) = *reinterpret_cast<const uint32_t*>(x + i);
    }
    return;
  }
  float inverse = 1.0f;
  const float* weight = head < args.num_heads ? args.q_weight : args.k_weight;
  if (weight != nullptr) {
    float sum = 0.0f;
    for (uint32_t i = 2 * lane; i < d; i += 2 * WARP_SIZE) {
      const float2 v = unpack2<T>(*reinterpret_cast<const uint32_t*>(x + i));
      sum = fmaf(v.x, v.x, fmaf(v.y, v.y, sum));
    }
    sum = warp_reduce(sum, Sum());
    inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(d)), args.eps)));
  }
  const float* table = args.table + static_cast<size_t>(args.positions[r]) * d;
  T* k = head < args.num_heads || slot == UINT32_MAX ? nullptr : static_cast<T*>(args.k_cache) + to;
  for (uint32_t i = 2 * lane; i < half; i += 2 * WARP_SIZE) {
    float2 low = unpack2<T>(*reinterpret_cast<const uint32_t*>(x + i));
    float2 high = unpack2<T>(*reinterpret_cast<const uint32_t*>(x + half + i));
    if (weight != nullptr) {
      low.x = __fmul_rn(__fmul_rn(low.x, inverse), weight[i]), low.y = __fmul_rn(__fmul_rn(low.y, inverse), weight[i + 1]);
      high.x = __fmul_rn(__fmul_rn(high.x, inverse), weight[half + i]);
      high.y = __fmul_rn(__fmul_rn(high.y, inverse), weight[half + i + 1]);
    }
    const float2 c = *reinterpret_cast<const float2*>(table + i), s = *reinterpret_cast<const float2*>(table + half + i);
    const uint32_t first = pack2<T>(__fsub_rn(__fmul_rn(low.x, c.x), __fmul_rn(high.x, s.x)),
                                    __fsub_rn(__fmul_rn(low.y, c.y), __fmul_rn(high.y, s.y)));
    const uint32_t second = pack2<T>(__fadd_rn(__fmul_rn(high.x, c.x), __fmul_rn(low.x, s.x)),
                                     __fadd_rn(__fmul_rn(high.y, c.y), __fmul_rn(low.y, s.y)));
    *reinterpret_cast<uint32_t*>(x + i) = first;
    *reinterpret_cast<uint32_t*>(x + half + i) = second;
    if (k != nullptr) {
      *reinterpret_cast<uint32_t*>(k + i) = first;
      *reinterpret_cast<uint32_t*>(k + half + i) = second;
    }
  }
}

extern "C" __global__ void __launch_bounds__(LOWBIT_ROPE_WARPS* WARP_SIZE)
    rope_kv_write_f16(const __grid_constant__ RopeKvWriteArgs args) {
  overlap();
  rope_kv_write<f16>(args);
}
extern "C" __global__ void __launch_bounds__(LOWBIT_ROPE_WARPS* WARP_SIZE)
    rope_kv_write_bf16(const __grid_constant__ RopeKvWriteArgs args) {
  overlap();
  rope_kv_write<bf16>(args);
}
