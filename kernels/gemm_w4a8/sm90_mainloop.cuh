// Products of a warpgroup's 64 rows of w with TOKENS rows of x, where a row of w is one group (sm_90a): between blocks of k there is
// nothing to do but that codes become operands, beside the products before.
#pragma once

#include "gemm_w4a8/sm90_block.cuh"

// Puts into `sums` the products of stages `first`, `first` + `step` and so on of the ring's next `stages`, and where `zeros` says so
// adds the thread's rows of w to `w_sums`. A stage is x, then blocks of w, of which this warpgroup's is number `block`. UNIT: products
// that are started together; those of one unit run while the operands of the next are made.
template <class Codes, typename X, int TOKENS, int UNIT>
__device__ __forceinline__ void multiply_stages(const GemmW4A8Sm90Args& args, BlockRing& ring, const uint8_t* shared, uint32_t block,
                                                uint32_t first, uint32_t step, uint32_t stages, bool zeros,
                                                int32_t (&sums)[TOKENS / 2], int2& w_sums) {
  const uint32_t to_w = TOKENS * 128 + block * args.block_bytes;
  uint32_t a[2][UNIT][4];
  uint32_t previous = 0;
  for (uint32_t i = 0; i < first; ++i) ring.advance();
  for (uint32_t stage = first; stage < stages; stage += step) {
    barrier_wait(ring.full(), ring.parity);
    const typename WeightBlock<Codes>::Words words(WeightBlock<Codes>(shared + ring.offset() + to_w));
    const uint64_t x = matrix_descriptor(ring.base + ring.offset());
#pragma unroll
    for (int from = 0; from < 4; from += UNIT) {
      uint32_t(&now)[UNIT][4] = a[from / UNIT % 2];
#pragma unroll
      for (int i = 0; i < UNIT; ++i) words.unpack(from + i, now[i]);
      if (zeros) add_rows(now, w_sums);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        Wgmma8Bit<int8_t, X, TOKENS>::run(sums, now[i], matrix_at(x, 2 * (from + i)), stage != first || from + i != 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      // Those of the stage before have ended.
      if (from == 0 && stage != first && threadIdx.x % 32 == 0) barrier_arrive(previous);
    }
    previous = ring.empty();
    for (uint32_t i = 0; i < step; ++i) ring.advance();
  }
  wgmma_wait<0>();
  if (first < stages && threadIdx.x % 32 == 0) barrier_arrive(previous);
}
