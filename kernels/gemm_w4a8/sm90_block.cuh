// Blocks of 64 rows x 128 columns of weights of 4 or 2 bits, and their way into the registers of tensor cores (sm_90a).
//
// A block is 1024 bytes of codes a bit in fragment order, then for each of its groups 64 scales, or 64 factors and their
// products with zero points (docs/formats.md).
#pragma once

#include "common/pipeline.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "gemm_w4a8/abi.h"

// Its stages have x, swizzled, and behind it blocks of w.
using BlockRing = Ring<const uint32_t&>;

// `descriptor` so many sixteen bytes further on. Of a sum of 64 bits the compiler makes several instructions for each product.
__device__ __forceinline__ uint64_t matrix_at(uint64_t descriptor, uint32_t sixteens) {
  return descriptor & 0xffffffff00000000ull | static_cast<uint32_t>(descriptor) + sixteens;
}

// Codes of BITS in two's complement. Masked into the highest bits of a byte a code is 16 or 64 times the weight as an int8,
// with no shift for one of two or four; sums are as many times too large, which int32 holds and scales that are as much
// smaller take back exactly.
template <int CODE_BITS, bool IS_ONE_GROUP>
struct Signed {
  static constexpr int BITS = CODE_BITS, SUM_SHIFT = 8 - BITS;
  static constexpr bool HAS_FACTORS = false, ONE_GROUP = IS_ONE_GROUP;
};
using Signed4 = Signed<4, false>;   // in groups, or one
using Signed4Row = Signed<4, true>;  // rows that are one group
using Signed2 = Signed<2, true>;

// Unsigned codes of 4 bits in groups whose scales are whole multiples of one scale a row (progressive group quantization,
// Lin et al. 2024, arXiv 2405.04532): factor * (code - zero) is the weight as an int8, and a row is one group.
struct Factored4 {
  static constexpr int BITS = 4, SUM_SHIFT = 0;
  static constexpr bool HAS_FACTORS = true, ONE_GROUP = true;
};

// What undoes the factor of sums.
template <class Codes>
constexpr float SUM_UNIT = 1.0f / (1 << Codes::SUM_SHIFT);

// Of a thread's rows g and g + 8 in a group: bytes of codes times `factor` plus `offset` are bytes of the weights plus 128.
// No byte carries into the next: what is left in each is 0 to 255.
struct Factors {
  uint32_t factor_g, factor_g8, offset_g, offset_g8;

  // Of four bytes: factor and factor * zero of row g, then of row g + 8.
  __device__ __forceinline__ explicit Factors(uint32_t bytes)
      : factor_g(bytes & 0xff),
        factor_g8(bytes >> 16 & 0xff),
        offset_g(0x80808080u - __byte_perm(bytes, 0, 0x1111)),
        offset_g8(0x80808080u - __byte_perm(bytes, 0, 0x3333)) {}
};

// The register operand of a product of 32 columns, of two words of 4-bit codes,
__device__ __forceinline__ void unpack(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  a[0] = low << 4 & 0xf0f0f0f0u, a[1] = low & 0xf0f0f0f0u;
  a[2] = high << 4 & 0xf0f0f0f0u, a[3] = high & 0xf0f0f0f0u;
}
// the same with factors,
__device__ __forceinline__ void unpack(uint32_t low, uint32_t high, const Factors& factors, uint32_t (&a)[4]) {
  const uint32_t words[2] = {low, high};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[2 * i] = ((words[i] & 0x0f0f0f0fu) * factors.factor_g + factors.offset_g) ^ 0x80808080u;
    a[2 * i + 1] = ((words[i] >> 4 & 0x0f0f0f0fu) * factors.factor_g8 + factors.offset_g8) ^ 0x80808080u;
  }
}
// or of a word of 2-bit codes.
__device__ __forceinline__ void unpack(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = word << (6 - 2 * i) & 0xc0c0c0c0u;
}

// Those of sixteen bytes of codes: of two products of 4 bits, four of 2 bits.
__device__ __forceinline__ void unpack(uint4 codes, uint32_t (&a)[2][4]) {
  unpack(codes.x, codes.y, a[0]), unpack(codes.z, codes.w, a[1]);
}
__device__ __forceinline__ void unpack(uint4 codes, uint32_t (&a)[4][4]) {
  unpack(codes.x, a[0]), unpack(codes.y, a[1]), unpack(codes.z, a[2]), unpack(codes.w, a[3]);
}
__device__ __forceinline__ void unpack(uint4 codes, const Factors& factors, uint32_t (&a)[2][4]) {
  unpack(codes.x, codes.y, factors, a[0]), unpack(codes.z, codes.w, factors, a[1]);
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

template <class Codes>
struct WeightBlock {
  static constexpr int BITS = Codes::BITS;
  static constexpr uint32_t CODE_BYTES = 1024 * BITS;

  const uint8_t* codes;  // at this thread's first sixteen bytes
  const uint8_t* group;  // at what the first group has for this thread's rows

  // Of a thread of a warpgroup.
  __device__ __forceinline__ explicit WeightBlock(const uint8_t* block) {
    const uint32_t thread = threadIdx.x % 128;
    codes = block + thread * 16;
    group = block + CODE_BYTES + (thread / 32 * 8 + thread % 32 / 4) * (Codes::HAS_FACTORS ? 4 : 8);
  }

  // Of 4-bit codes without factors: operands of STEPS products of 32 columns, from 32 `first` on: `first` a multiple of STEPS.
  template <int STEPS>
  __device__ __forceinline__ void load(uint32_t first, uint32_t (&a)[STEPS][4]) const {
    if constexpr (STEPS == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(codes + first / 2 * 2048 + first % 2 * 8);
      unpack(v.x, v.y, a[0]);
    } else {
#pragma unroll
      for (int i = 0; i < STEPS; i += 2) {
        unpack(*reinterpret_cast<const uint4*>(codes + (first + i) * 1024), *reinterpret_cast<uint32_t(*)[2][4]>(&a[i]));
      }
    }
  }

  // All of the thread's, in registers.
  struct Words {
    uint4 codes[BITS / 2];
    Factors factors;

    __device__ __forceinline__ explicit Words(const WeightBlock& block)
        : factors(Codes::HAS_FACTORS ? *reinterpret_cast<const uint32_t*>(block.group) : 0) {
#pragma unroll
      for (int i = 0; i < BITS / 2; ++i) codes[i] = *reinterpret_cast<const uint4*>(block.codes + i * 2048);
    }
    // The operand of product `step` of four.
    __device__ __forceinline__ void unpack(int step, uint32_t (&a)[4]) const {
      const uint4 v = codes[step * BITS / 8];
      if constexpr (BITS == 2) {
        ::unpack(step == 0 ? v.x : step == 1 ? v.y : step == 2 ? v.z : v.w, a);
      } else if constexpr (Codes::HAS_FACTORS) {
        ::unpack(step % 2 == 0 ? v.x : v.z, step % 2 == 0 ? v.y : v.w, factors, a);
      } else {
        ::unpack(step % 2 == 0 ? v.x : v.z, step % 2 == 0 ? v.y : v.w, a);
      }
    }
  };

  // Scales of the thread's rows g and g + 8, of sums as they are.
  __device__ __forceinline__ float2 scale(uint32_t index) const {
    return *reinterpret_cast<const float2*>(group + index * 256);
  }
};
