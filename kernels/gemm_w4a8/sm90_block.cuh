// Blocks of 64 rows x 128 columns of weights of 4 or 2 bits, and their way into the registers of tensor cores (sm_90a).
//
// A block is 1024 bytes of codes a bit in fragment order, then for each of its groups 64 scales (docs/formats.md). A code is
// two's complement. Masked into the highest bits of a byte it is 16 or 64 times the weight as an int8, with no shift for one
// of two or four; sums are as many times too large, which int32 holds and scales that are as much smaller take back exactly.
#pragma once

#include "abi_w4a8.h"
#include "common/block_ring.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

// `descriptor` so many sixteen bytes further on. Of a sum of 64 bits the compiler makes several instructions for each product.
__device__ __forceinline__ uint64_t matrix_at(uint64_t descriptor, uint32_t sixteens) {
  return descriptor & 0xffffffff00000000ull | static_cast<uint32_t>(descriptor) + sixteens;
}

// How much larger sums are, as a power of two, and what undoes it.
template <int BITS>
constexpr int SUM_SHIFT = 8 - BITS;
template <int BITS>
constexpr float SUM_UNIT = 1.0f / (1 << SUM_SHIFT<BITS>);

// The register operands of products of 32 columns each, of sixteen bytes of codes: of two of 4 bits, four of 2 bits.
__device__ __forceinline__ void unpack(uint4 codes, uint32_t (&a)[2][4]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i / 2][i % 2 * 2] = words[i] << 4 & 0xf0f0f0f0u;
    a[i / 2][i % 2 * 2 + 1] = words[i] & 0xf0f0f0f0u;
  }
}
__device__ __forceinline__ void unpack(uint4 codes, uint32_t (&a)[4][4]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = words[i / 4] << (6 - 2 * (i % 4)) & 0xc0c0c0c0u;
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

template <int BITS>
struct WeightBlock {
  static constexpr uint32_t CODE_BYTES = 1024 * BITS;

  const uint8_t* codes;   // at this thread's first sixteen bytes
  const uint8_t* scales;  // at this thread's rows of the first group

  // Of a thread of a warpgroup.
  __device__ __forceinline__ explicit WeightBlock(const uint8_t* block) {
    const uint32_t thread = threadIdx.x % 128;
    codes = block + thread * 16;
    scales = block + CODE_BYTES + (thread / 32 * 8 + thread % 32 / 4) * 8;
  }

  // Operands of STEPS products of 32 columns, from 32 `first` on: `first` a multiple of STEPS.
  template <int STEPS>
  __device__ __forceinline__ void load(uint32_t first, uint32_t (&a)[STEPS][4]) const {
    if constexpr (BITS == 2) {
      static_assert(STEPS == 4, "all of a block");
      unpack(*reinterpret_cast<const uint4*>(codes), a);
    } else if constexpr (STEPS == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(codes + first / 2 * 2048 + first % 2 * 8);
      uint32_t both[2][4];
      unpack(make_uint4(v.x, v.y, 0, 0), both);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[0][i] = both[0][i];
    } else {
#pragma unroll
      for (int i = 0; i < STEPS; i += 2) {
        const uint4 v = *reinterpret_cast<const uint4*>(codes + (first + i) * 1024);
        unpack(v, *reinterpret_cast<uint32_t(*)[2][4]>(&a[i]));
      }
    }
  }

  // Scales of the thread's rows g and g + 8, of sums as they are.
  __device__ __forceinline__ float2 scale(uint32_t group) const {
    return *reinterpret_cast<const float2*>(scales + group * 256);
  }
};
