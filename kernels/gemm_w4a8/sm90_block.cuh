// Blocks of 64 rows x 128 columns of 4-bit weights in shared memory, and their way into the registers of a warpgroup
// (sm_90a).
//
// A block is 4096 bytes of codes in fragment order, then for each of its groups 64 scales (docs/formats.md). A code is four
// bits of two's complement. Masked into the high half of a byte it is 16 times the weight as an int8, with no shift for
// every other one; sums are 16 times too large, which int32 holds and the scales, stored as sixteenths, take back exactly.
#pragma once

#include "abi_w4a8.h"
#include "common/block_ring.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

// `descriptor` so many sixteen bytes further on. Of a sum of 64 bits the compiler makes several instructions for each product.
__device__ __forceinline__ uint64_t matrix_at(uint64_t descriptor, uint32_t sixteens) {
  return descriptor & 0xffffffff00000000ull | static_cast<uint32_t>(descriptor) + sixteens;
}

// The register operand of a product of 32 columns, 16 times the weights, of its two words of codes.
__device__ __forceinline__ void unpack(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  a[0] = low << 4 & 0xf0f0f0f0u;
  a[1] = low & 0xf0f0f0f0u;
  a[2] = high << 4 & 0xf0f0f0f0u;
  a[3] = high & 0xf0f0f0f0u;
}

// Adds the operands' rows g and g + 8, which four lanes share, to `sums`.
template <int STEPS>
__device__ __forceinline__ void add_rows(const uint32_t (&a)[STEPS][4], int2& sums) {
  int32_t rows[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 4 * STEPS; ++i) rows[i % 2] = __dp4a(static_cast<int32_t>(a[i / 4][i % 4]), 0x01010101, rows[i % 2]);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    rows[0] += __shfl_xor_sync(0xffffffff, rows[0], lanes);
    rows[1] += __shfl_xor_sync(0xffffffff, rows[1], lanes);
  }
  sums.x += rows[0], sums.y += rows[1];
}

struct WeightBlock4 {
  static constexpr uint32_t CODE_BYTES = 64 * 128 / 2;

  const uint8_t* codes;   // at this thread's first sixteen bytes
  const uint8_t* scales;  // at this thread's rows of the first group

  // Of a thread of a warpgroup.
  __device__ __forceinline__ explicit WeightBlock4(const uint8_t* block) {
    const uint32_t thread = threadIdx.x % 128;
    codes = block + thread * 16;
    scales = block + CODE_BYTES + (thread / 32 * 8 + thread % 32 / 4) * 8;
  }

  // Operands of STEPS products of 32 columns, from 32 `first` on: `first` a multiple of STEPS.
  template <int STEPS>
  __device__ __forceinline__ void load(uint32_t first, uint32_t (&a)[STEPS][4]) const {
    const uint8_t* p = codes + first / 2 * 2048 + first % 2 * 8;
    if constexpr (STEPS == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      unpack(v.x, v.y, a[0]);
    } else {
#pragma unroll
      for (int i = 0; i < STEPS; i += 2) {
        const uint4 v = *reinterpret_cast<const uint4*>(p + i * 1024);
        unpack(v.x, v.y, a[i]);
        unpack(v.z, v.w, a[i + 1]);
      }
    }
  }

  // Sixteenths of the scales of the thread's rows g and g + 8.
  __device__ __forceinline__ float2 scale(uint32_t group) const {
    return *reinterpret_cast<const float2*>(scales + group * 256);
  }
};
