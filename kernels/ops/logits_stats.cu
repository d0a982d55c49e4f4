// What greedy decoding and scoring need of a row of logits, so that the logits themselves stay on the device.

#include <math_constants.h>

#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "ops/abi.h"

// The largest logit and its lowest id.
struct Best {
  float logit;
  uint32_t id;
};

struct Better {
  __device__ Best operator()(Best a, Best b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id) ? a : b;
  }
};

// Every thread gets the best of all threads of the block.
__device__ Best block_best(Best best) {
  __shared__ Best of_warp[WARP_SIZE];
#pragma unroll
  for (int lane = WARP_SIZE / 2; lane > 0; lane /= 2) {
    const Best other = {__shfl_xor_sync(0xffffffffu, best.logit, lane), __shfl_xor_sync(0xffffffffu, best.id, lane)};
    best = Better()(best, other);
  }
  if (threadIdx.x % WARP_SIZE == 0) of_warp[threadIdx.x / WARP_SIZE] = best;
  __syncthreads();
  for (uint32_t warp = 0; warp < blockDim.x / WARP_SIZE; ++warp) best = Better()(best, of_warp[warp]);
  return best;
}

// exp(logit - base), where the base may be infinite: 0 below it, 1 at it, NaN for NaN.
__device__ __forceinline__ float exp_relative(float logit, float base) {
  return logit == base ? 1.0f : expf(logit - base);
}

// Computes   for LOWBIT_LOGITS_PART logits of a row: the best, and the sum of exponentials relative to it. NaN logits are
//            never the best and make the sum NaN.
// Shapes     logits [m, vocab] f32, parts [m, ceil(vocab / LOWBIT_LOGITS_PART)].
// Grid       (parts, m), eight logits a thread, read once.
// Numerics   sums in f32 in an order that depends on vocab alone.
extern "C" __global__ void logits_stats_part(const __grid_constant__ LogitsStatsArgs args) {
  overlap();
  constexpr int PER_THREAD = 8;
  const uint32_t begin = blockIdx.x * LOWBIT_LOGITS_PART;
  const float* logits = args.logits + static_cast<size_t>(blockIdx.y) * args.vocab;
  float logit[PER_THREAD];
  Best best = {-CUDART_INF_F, UINT32_MAX};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const uint32_t id = begin + i * blockDim.x + threadIdx.x;
    logit[i] = id < args.vocab ? logits[id] : -CUDART_INF_F;
    if (logit[i] > best.logit) best = {logit[i], id};
  }
  best = block_best(best);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    if (logit[i] != -CUDART_INF_F) sum += exp_relative(logit[i], best.logit);
  }
  sum = block_reduce(sum, 0.0f, Sum());
  if (threadIdx.x == 0) {
    args.parts[static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x] = {best.logit, best.id, sum};
  }
}

// Computes   from the parts of each row: ids[r] = lowest id of the largest logit (0 where none is above -inf); stats[r] =
//            that logit, the natural log of the sum of exponentials, the target's logit (NaN where the target is not
//            below vocab). A NaN among the logits makes the log of the sum NaN.
// Grid       one block a row.
extern "C" __global__ void logits_stats(const __grid_constant__ LogitsStatsArgs args) {
  overlap();
  const uint32_t count = (args.vocab + LOWBIT_LOGITS_PART - 1) / LOWBIT_LOGITS_PART;
  const LogitsPart* parts = args.parts + static_cast<size_t>(blockIdx.x) * count;
  Best best = {-CUDART_INF_F, UINT32_MAX};
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) best = Better()(best, {parts[i].max, parts[i].id});
  best = block_best(best);
  float sum = 0.0f;
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    if (parts[i].sum != 0.0f) sum += parts[i].sum * exp_relative(parts[i].max, best.logit);
  }
  sum = block_reduce(sum, 0.0f, Sum());

  if (threadIdx.x == 0) {
    // An infinite best is its own log of the sum, unless there is a NaN.
    const float log_sum_exp = isinf(best.logit) && !isnan(sum) ? best.logit : best.logit + logf(sum);
    const uint32_t target = args.targets[blockIdx.x];
    args.ids[blockIdx.x] = best.id == UINT32_MAX ? 0 : best.id;
    args.stats[3 * blockIdx.x] = best.logit;
    args.stats[3 * blockIdx.x + 1] = isnan(sum) ? sum : log_sum_exp;
    args.stats[3 * blockIdx.x + 2] =
        target < args.vocab ? args.logits[static_cast<size_t>(blockIdx.x) * args.vocab + target] : CUDART_NAN_F;
  }
}
