// What greedy decoding and scoring need of a row of logits, so that the logits themselves stay on the device.

#include <math_constants.h>

#include "common/reduce.cuh"

// The largest logit and its lowest id.
struct Best {
  float logit;
  uint32_t id;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id) ? a : b;
}

// Computes   ids[r] = lowest id of the largest logit (0 where none is above -inf); stats[r] = that logit, the natural
//            log of the sum of exponentials, the target's logit (NaN where the target is not below vocab).
// Shapes     logits [m, vocab] f32, targets [m], ids [m], stats [m, 3].
// Grid       one block a row, which reads the row twice (the second time mostly from cache).
// Numerics   exponentials relative to the largest logit, summed in f32 in a fixed order. A NaN among the logits makes
//            the log of the sum NaN.
extern "C" __global__ void logits_stats(const __grid_constant__ LogitsStatsArgs args) {
  __shared__ Best best_of_warp[WARP_SIZE];
  const uint32_t vocab = args.vocab, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const float* logits = args.logits + static_cast<size_t>(blockIdx.x) * vocab;

  Best best = {-CUDART_INF_F, 0};
  for (uint32_t id = threadIdx.x; id < vocab; id += blockDim.x) {
    const float logit = logits[id];
    if (logit > best.logit) best = {logit, id};
  }
#pragma unroll
  for (int other = WARP_SIZE / 2; other > 0; other /= 2) {
    best = better(best, {__shfl_xor_sync(0xffffffffu, best.logit, other), __shfl_xor_sync(0xffffffffu, best.id, other)});
  }
  if (lane == 0) best_of_warp[warp] = best;
  __syncthreads();
  for (uint32_t i = 0; i < blockDim.x / WARP_SIZE; ++i) best = better(best, best_of_warp[i]);

  float sum = 0.0f;
  uint32_t nans = 0;
  for (uint32_t id = threadIdx.x; id < vocab; id += blockDim.x) {
    const float logit = logits[id];
    nans |= isnan(logit);
    sum += expf(logit - best.logit);
  }
  sum = block_reduce(sum, 0.0f, Sum());
  nans = block_reduce(nans, 0u, Max());

  if (threadIdx.x == 0) {
    float log_sum_exp = isinf(best.logit) ? best.logit : best.logit + logf(sum);
    if (nans) log_sum_exp = CUDART_NAN_F;
    const uint32_t target = args.targets[blockIdx.x];
    args.ids[blockIdx.x] = best.id;
    args.stats[3 * blockIdx.x] = best.logit;
    args.stats[3 * blockIdx.x + 1] = log_sum_exp;
    args.stats[3 * blockIdx.x + 2] = target < vocab ? logits[target] : CUDART_NAN_F;
  }
}
