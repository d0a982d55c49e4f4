// Blocks of 64 rows x 128 columns of w in shared memory, and their way into the registers of a warpgroup (sm_90a).
//
// A block is 1024 BITS bytes of codes in fragment order, then for each group of its columns 128 bytes of scales, 128 of
// their lower parts where there are such, 128 of zero points where they differ (docs/formats.md).
#pragma once

#include "common/dtype.cuh"
#include "common/linear_out.cuh"
#include "common/load.cuh"
#include "common/pipeline.cuh"
#include "common/tma.cuh"
#include "gemm_w4a16/dequant.cuh"

// One half of `pair`, twice.
__device__ __forceinline__ uint32_t twice_low(uint32_t pair) { return __byte_perm(pair, 0, 0x1010); }
__device__ __forceinline__ uint32_t twice_high(uint32_t pair) { return __byte_perm(pair, 0, 0x3232); }

// Of a block's tile of TOKENS rows of x, those that there are.
template <int TOKENS>
__device__ __forceinline__ uint32_t tokens_of(const GemmW4A16Sm90Args& args) {
  return min(static_cast<uint32_t>(TOKENS), args.y.m - blockIdx.y * TOKENS);
}

// Of one group, for the two rows a thread has of its warp's sixteen, g and g + 8 in the low and high half of a word.
struct GroupParameters {
  uint32_t scales, low_scales, zeros;

  template <typename T>
  __device__ __forceinline__ float2 scale(const GemmW4A16Sm90Args& args) const {
    const float2 high = unpack2<T>(scales);
    if (args.low_scales == 0) return high;
    const float2 low = unpack2<T>(low_scales);
    return make_float2(high.x + low.x, high.y + low.y);
  }
};

// Codes to T: fragments of `(code - zero) UNIT`, exactly.
template <typename T, typename Codes>
struct Fragments;

template <typename Codes>
struct Fragments<f16, Codes> {
  static constexpr float UNIT = fragment_unit<f16, Codes>;
  uint32_t zero_g, zero_g8;

  __device__ __forceinline__ explicit Fragments(const GroupParameters& p)
      : zero_g(ZeroPoint<f16, Codes>::low(p.zeros & 0xffff)), zero_g8(ZeroPoint<f16, Codes>::high(p.zeros >> 16)) {}
  template <int HALF>
  __device__ __forceinline__ void make(const CodeTile<f16, Codes>& codes, uint32_t (&a)[4]) const {
    codes.template fragment<HALF>(zero_g, zero_g8, a);
  }
};

// By `code_bits`.
template <typename Codes>
struct Fragments<bf16, Codes> {
  static constexpr int LEAST = Codes::BF16_EXPONENT, HIGH_SHIFT = Codes::HIGH_SHIFT, EXPONENT = Bf16Unit<Codes>::EXPONENT;
  static constexpr float UNIT = Bf16Unit<Codes>::UNIT;
  // With the scale in the factor and a zero point that is a power of two, one rounding is all there is: the offset is
  // exact. Fragments of `(code - zero) scale SCALED_UNIT`, which leaves room for scales up to 2^26.
  static constexpr int SCALED_EXPONENT = -32;
  static constexpr float SCALED_UNIT = 0x1p-32f;
  uint32_t factor_g, factor_g8, offset_g, offset_g8;

  static __device__ __forceinline__ uint32_t offsets(uint32_t zeros, int exponent) {
    return mul_16x2(bf16(), zeros, bf16_powers(exponent - LEAST, exponent - LEAST) ^ 0x80008000);
  }
  __device__ __forceinline__ Fragments(uint32_t factor_g, uint32_t factor_g8, uint32_t offsets)
      : factor_g(factor_g), factor_g8(factor_g8), offset_g(twice_low(offsets)), offset_g8(twice_high(offsets)) {}
  __device__ __forceinline__ explicit Fragments(const GroupParameters& p)
      : Fragments(bf16_powers(EXPONENT - LEAST, EXPONENT - LEAST),
                  bf16_powers(EXPONENT - LEAST - HIGH_SHIFT, EXPONENT - LEAST - HIGH_SHIFT), offsets(p.zeros, EXPONENT)) {}
  static __device__ __forceinline__ Fragments scaled(const GroupParameters& p) {
    constexpr int UP = SCALED_EXPONENT - LEAST;
    const uint32_t factors = mul_16x2(bf16(), p.scales, bf16_powers(UP, UP - HIGH_SHIFT));
    return Fragments(twice_low(factors), twice_high(factors),
                     mul_16x2(bf16(), p.scales, offsets(p.zeros, SCALED_EXPONENT)));
  }

  template <int HALF>
  __device__ __forceinline__ void make(const CodeTile<bf16, Codes>& codes, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = code_bits<Codes, HALF>(codes.words, i), factor = i % 2 == 0 ? factor_g : factor_g8;
      a[i] = Codes::HAS_ZERO_POINT ? fma_bf16x2(bits, factor, i % 2 == 0 ? offset_g : offset_g8) : mul_16x2(bf16(), bits, factor);
    }
  }
};

// What one thread of a warpgroup has of a block at a shared address.
template <typename T, typename Codes>
struct WeightBlock {
  static constexpr uint32_t CODE_BYTES = 1024 * Codes::BITS;
  static constexpr int CHUNKS = Codes::BITS / 2;  // of sixteen bytes of codes

  uint32_t codes;       // its first sixteen bytes
  uint32_t parameters;  // its rows of the first group

  __device__ __forceinline__ explicit WeightBlock(uint32_t block, uint32_t thread = threadIdx.x % 128)
      : codes(block + thread * 16), parameters(block + CODE_BYTES + (thread / 32 * 8 + thread % 32 / 4) * 4) {}

  // Tile j holds columns 32 j to 32 j + 31, two steps of sixteen.
  __device__ __forceinline__ void load(int chunk, CodeTile<T, Codes> (&tiles)[4]) const {
    const uint4 v = load_shared16(codes + chunk * 2048);
    if constexpr (Codes::BITS == 4) {
      tiles[2 * chunk] = {{v.x, v.y}};
      tiles[2 * chunk + 1] = {{v.z, v.w}};
    } else {
      tiles[chunk] = {{v.x, v.y, v.z, v.w}};
    }
  }
  __device__ __forceinline__ void load(CodeTile<T, Codes> (&tiles)[4]) const {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) load(chunk, tiles);
  }

  __device__ __forceinline__ GroupParameters group(const GemmW4A16Sm90Args& args, uint32_t index) const {
    const uint32_t at = parameters + index * (1 + args.low_scales + args.has_zero_points) * 128;
    GroupParameters group;
    group.scales = load_shared4(at);
    group.low_scales = args.low_scales != 0 ? load_shared4(at + 128) : 0;
    group.zeros = args.has_zero_points != 0 ? load_shared4(at + 128 + args.low_scales * 128) : args.w_zero_point * 0x00010001u;
    return group;
  }
  // Of blocks in one group whose scales are one 16-bit float and whose zero points are all the same: instructions count.
  __device__ __forceinline__ GroupParameters only_group(const GemmW4A16Sm90Args& args) const {
    return {load_shared4(parameters), 0, args.w_zero_point * 0x00010001u};
  }
};

// The ring, whose stages have x, 128 columns as two boxes of 64, and a block of w for each of ROW_BLOCKS. It has as many stages as
// there is room for before the last `tail` bytes of dynamic shared memory.
template <int TOKENS, int ROW_BLOCKS>
struct W4A16Ring : Ring<uint32_t> {
  static constexpr uint32_t BOX_BYTES = TOKENS * 128;

  __device__ __forceinline__ W4A16Ring(uint32_t base, uint32_t block_bytes, uint32_t tail)
      : Ring(0, (2 * BOX_BYTES + ROW_BLOCKS * block_bytes + 1023) / 1024 * 1024, base) {
    uint32_t bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    stages = min((bytes - HEAD_BYTES - tail) / stage_bytes, MAX_STAGES);
  }
  __device__ __forceinline__ uint32_t x() const { return base + HEAD_BYTES + slot * stage_bytes; }
  __device__ __forceinline__ uint32_t w() const { return x() + 2 * BOX_BYTES; }
};

// Writes 16 rows of w by 8 tokens of a warp's sums, laid out as products leave them, by way of TRANSPOSE_BYTES of shared
// memory of its own that bring neighbouring outputs together. SwiGLU finds gate and up of an output in one thread.
constexpr uint32_t TRANSPOSE_PITCH = GEMM_W4A16_SM90_TRANSPOSE_PITCH;  // floats between tokens: no bank conflicts
constexpr uint32_t TRANSPOSE_BYTES = GEMM_W4A16_SM90_TRANSPOSE_BYTES;
// GATED where the writer is.
template <bool GATED>
__device__ __forceinline__ void write_16x8(const LinearWriter& writer, float* transpose, uint32_t token, uint32_t row,
                                           const float (&sums)[4]) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
  if constexpr (GATED) {
#pragma unroll
    for (int i = 0; i < 2; ++i) transpose[(2 * t + i) * TRANSPOSE_PITCH + g] = writer.gated(row + g, sums[i], sums[2 + i]);
    __syncwarp();
    const float2 pair = *reinterpret_cast<const float2*>(transpose + g * TRANSPOSE_PITCH + 2 * t);
    writer.store_gated2(token + g, row / 2 + 2 * t, pair.x, pair.y);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) transpose[(2 * t + i % 2) * TRANSPOSE_PITCH + g + i / 2 * 8] = sums[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = i * 4 + lane / 8, column = lane % 8 * 2;
      const float2 pair = *reinterpret_cast<const float2*>(transpose + at * TRANSPOSE_PITCH + column);
      writer.store2(token + at, row + column, pair.x, pair.y);
    }
  }
}
__device__ __forceinline__ void write_16x8(const LinearWriter& writer, float* transpose, uint32_t token, uint32_t row,
                                           const float (&sums)[4]) {
  if (writer.is_gated()) return write_16x8<true>(writer, transpose, token, row, sums);
  write_16x8<false>(writer, transpose, token, row, sums);
}
