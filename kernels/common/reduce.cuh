// Reductions over a warp and over a block, always in the same order: results do not vary between runs.
#pragma once

#include "common/abi.h"

struct Sum {
  template <typename V>
  __device__ V operator()(V a, V b) const { return a + b; }
};

struct Max {
  template <typename V>
  __device__ V operator()(V a, V b) const { return a > b ? a : b; }
};

// Every lane gets op over the values of the WIDTH lanes (a power of two) of its group.
template <int WIDTH = WARP_SIZE, typename V, typename Op>
__device__ __forceinline__ V warp_reduce(V value, Op op) {
#pragma unroll
  for (int lane = WIDTH / 2; lane > 0; lane /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Every thread gets op over the values of all threads of the block, whose size is a multiple of the warp's. `neutral`
// leaves op unchanged. Synchronizes the block.
template <typename V, typename Op>
__device__ V block_reduce(V value, V neutral, Op op) {
  __shared__ V of_warp[WARP_SIZE];
  const unsigned warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  value = warp_reduce(value, op);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < blockDim.x / WARP_SIZE ? of_warp[lane] : neutral;
  value = warp_reduce(value, op);
  __syncthreads();  // of_warp may be written again by the next call
  return value;
}
