// Rings of stages in shared memory that copies fill and products empty (sm_90): barriers, then the stages.
#pragma once

#include "common/abi.h"
#include "common/mbarrier.cuh"

// A place in a ring of STAGES slots and the parity of its current round.
template <int STAGES>
struct RingPosition {
  uint32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ void advance(uint32_t slots) {
    const uint32_t to = slot + slots;
    slot = to % STAGES, parity ^= to / STAGES & 1;
  }
};

// A ring of STAGES stages of STAGE_BYTES, at `base`; who goes round it keeps a RingPosition.
template <int STAGES, uint32_t STAGE_BYTES>
struct FixedRing {
  static constexpr uint32_t BYTES = LOWBIT_RING_HEAD_BYTES + STAGES * STAGE_BYTES;
  static_assert(STAGES <= LOWBIT_RING_MAX_STAGES, "barriers");

  static __device__ __forceinline__ uint32_t full(uint32_t base, uint32_t slot) { return base + 8 * slot; }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, uint32_t slot) { return base + 8 * (STAGES + slot); }
  static __device__ __forceinline__ uint32_t stage(uint32_t base, uint32_t slot) {
    return base + LOWBIT_RING_HEAD_BYTES + slot * STAGE_BYTES;
  }
  // By one thread. `producers` and `consumers`: arrivals that fill and empty a slot.
  static __device__ __forceinline__ void init(uint32_t base, uint32_t producers, uint32_t consumers) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(full(base, slot), producers);
      barrier_init(empty(base, slot), consumers);
    }
    barrier_init_fence();
  }
};

// A ring of as many stages as `stages` says, and the place in it. Count: uint32_t; or const uint32_t&, of numbers that stay where
// kernel arguments are, so that they take no registers.
template <typename Count>
struct Ring {
  static constexpr uint32_t HEAD_BYTES = LOWBIT_RING_HEAD_BYTES, MAX_STAGES = LOWBIT_RING_MAX_STAGES;

  Count stages;
  Count stage_bytes;
  uint32_t base;
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ Ring(Count stages, Count stage_bytes, uint32_t base)
      : stages(stages), stage_bytes(stage_bytes), base(base) {}

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
