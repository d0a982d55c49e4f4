// The ring of stages of kernels whose weights lie in blocks of 64 rows x 128 columns (sm_90a), and the order of their tiles.
#pragma once

#include "common/mbarrier.cuh"

// In dynamic shared memory: barriers, then `stages` times `stage_bytes`: x, swizzled, and behind it blocks of w. The two
// numbers stay where kernel arguments are, so that they take no registers.
struct BlockRing {
  static constexpr uint32_t HEAD_BYTES = 1024, MAX_STAGES = HEAD_BYTES / 16;

  const uint32_t& stages;
  const uint32_t& stage_bytes;
  uint32_t base;
  uint32_t slot = 0, parity = 0;

  template <typename Args>
  __device__ __forceinline__ BlockRing(const Args& args, uint32_t base)
      : stages(args.stages), stage_bytes(args.stage_bytes), base(base) {}

  // By one thread. `producers` and `consumers`: arrivals that fill and empty a slot.
  __device__ __forceinline__ void init(uint32_t producers, uint32_t consumers) const {
    for (uint32_t i = 0; i < stages; ++i) {
      barrier_init(base + 8 * i, producers);
      barrier_init(base + 8 * (MAX_STAGES + i), consumers);
    }
    barrier_init_fence();
  }
  __device__ __forceinline__ uint32_t full() const { return base + 8 * slot; }
  __device__ __forceinline__ uint32_t empty() const { return base + 8 * (MAX_STAGES + slot); }
  __device__ __forceinline__ uint32_t offset() const { return HEAD_BYTES + slot * stage_bytes; }
  // Where the ring ends.
  __device__ __forceinline__ uint32_t end() const { return HEAD_BYTES + stages * stage_bytes; }
  __device__ __forceinline__ void advance() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// Tiles of ROWS rows of w by TOKENS rows of x, numbered so that those that run together share what they read: down a band
// of BAND tiles of tokens, then on to the next rows of w.
template <uint32_t ROWS, uint32_t TOKENS, uint32_t BAND>
struct BandedTiles {
  uint32_t down, across;

  __device__ __forceinline__ BandedTiles(uint32_t m, uint32_t n)
      : down((m + TOKENS - 1) / TOKENS), across((n + ROWS - 1) / ROWS) {}
  __device__ __forceinline__ uint32_t count() const { return down * across; }
  // Number of the tile of tokens, and of that of rows.
  __device__ __forceinline__ uint2 at(uint32_t index) const {
    const uint32_t band = index / (BAND * across), height = min(BAND, down - band * BAND);
    const uint32_t inside = index - band * BAND * across;
    return make_uint2(band * BAND + inside % height, inside / height);
  }
};
