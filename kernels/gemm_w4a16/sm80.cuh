// W4A16 and W8A16 linear layer on 16-bit tensor cores (mma.sync), sm_80 and newer; more than a few rows.
//
// Computes: y[m, n] = sum over groups of w_scale[group, n] * (sum over k of x[m, k] * (code[n, k] - zero[group, n])).
// Layout:   x row-major, rows of exactly k; w in fragment order (docs/formats.md): 16 bytes feed one lane. Weights are
//           the 16-row operand and tokens the 8 columns, so that neither needs its registers moved: a product's operand of w comes out
//           of the conversion as it must be, and eight columns of x, 16 contiguous bytes of a lane, are the operands of two.
// Dtypes:   x f16 or bf16, w 4- or 8-bit codes made exact 16-bit integers, FP8 (e4m3) exactly, or 4-bit codes of a codebook (c4)
//           made its values in the type of x; f32 sums.
// Grid:     blocks that all run at once share out BM x BN tiles of y (sm80_stream_k.cuh); a warp has a (BM / WARPS_M) x
//           (BN / WARPS_N) part.
// Shared:   STAGES * (128 BM + 8 BITS BN) bytes, a ring of 64-column slices, and 12 BN WARPS_M of scales and zero points.
// Numerics: deterministic; how k is split depends on m, n, k and the number of multiprocessors alone. Up to 32 tokens weights
//           are not rounded and scales go on the f32 sum of each group. Above there are no registers for such sums: a
//           weight times its scale is rounded once to the type of x.
// Limits:   k a multiple of 8, group a multiple of 32 or all of k, integral zero points up to 2^BITS
//           (gemm_any takes the rest).
// Source:   fragment-ordered weights and register dequantization as in Frantar et al., "MARLIN", 2024; the column
//           order, the roles of the operands and bf16 from subnormals are ours.
#pragma once

#include "common/linear_out.cuh"
#include "common/mma.cuh"
#include "gemm_w4a16/configs.h"
#include "gemm_w4a16/sm80_weights.cuh"

// Of an 8 x 8 matrix of which lane 4g + t has columns 2t and 2t + 1 of row g: rows 2t and 2t + 1 of column g.
__device__ __forceinline__ float2 transpose_8x8(float2 v) {
  const uint32_t x = __float_as_uint(v.x), y = __float_as_uint(v.y);
  uint32_t low = __byte_perm(x, y, 0x5410), high = __byte_perm(x, y, 0x7632);
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(low));
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(high));
  return make_float2(__uint_as_float(__byte_perm(low, high, 0x5410)), __uint_as_float(__byte_perm(low, high, 0x7632)));
}

template <typename T, typename Codes, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
struct GemmW4A16 {
  using Shape = TileShape<Codes, BM, BN, WARPS_M, WARPS_N>;
  using Work = StreamK<BM, BN>;
  using Loader = SliceLoader<T, Shape>;
  static constexpr int MT = Shape::MT, NT = Shape::NT, STAGE_BYTES = Shape::STAGE_BYTES;
  static constexpr bool ON_SUMS = BM <= GEMM_W4A16_SM80_UNROUNDED_BM;  // else there are no registers for a group's own sums
  static constexpr int TABLE_BYTES = GEMM_W4A16_SM80_TABLE_BYTES * NT;  // of a warp
  static_assert(STAGES >= 2, "ring");

  // Where the block is in the ring.
  struct Ring {
    uint32_t base, stage = 0;
    __device__ __forceinline__ uint32_t at() const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ void advance() { stage = stage + 1 == STAGES ? 0 : stage + 1; }
  };

  // The sums of one part of a tile, f-th fragment: tokens f / NT * 8 .., rows f % NT * 16 .. of w.
  template <Scaling SCALING>
  static __device__ __forceinline__ void accumulate(const GemmW4A16Sm80Args& args, const TilePart& part, Loader& loader,
                                                    Ring& ring, float (&acc)[MT * NT][4]) {
    const GemmW4A16Args& layer = args.layer;
    const uint32_t group = min(layer.group, layer.k), last_group = (layer.k + group - 1) / group - 1;
    const uint32_t group_steps = (group + 31) / 32, warp = threadIdx.x / 32;
    uint32_t this_group = min(part.begin * 64 / group, last_group);
    uint32_t steps_left = (this_group + 1) * group_steps - part.begin * 2;
    GroupTable<T, Codes, NT, SCALING> table(layer, ring.base + STAGES * STAGE_BYTES + warp * TABLE_BYTES,
                                                     part.col + warp / WARPS_M * Shape::WN);
    table.fetch(layer, this_group);
    wait_copies<STAGES - 1>();  // for the first part; others find their slice there
    __syncthreads();
    table.publish();
    table.fetch(layer, min(this_group + 1, last_group));

    float group_sum[ON_SUMS ? MT * NT : 1][4] = {};
    Operands<T, Shape> o;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      o.load_codes(ring.at(), j, 0);
      table.template make<0>(o.codes[j], j, o.w[j]);
    }
#pragma unroll
    for (int i = 0; i < MT; ++i) o.load_x(ring.at(), i, 0);

    uint32_t left = part.end - part.begin;
    while (left != 0) {
      // Until this part ends, or that of the copies, which are ahead.
      const uint32_t end = left - (loader.slices_left == 0 ? left : min(left, loader.slices_left));
      for (; left != end; --left) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          if (step == 1) {  // what is loaded from here on lies in the next slice; all of this one is in registers
            wait_copies<STAGES - 2>();
            __syncthreads();
            loader.next(ring.at(), layer);
            ring.advance();
          }
          const bool group_ends = --steps_left == 0;
          [[maybe_unused]] float2 scale[NT];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (half == 1) {  // what is made from here on belongs to the next 32 columns
              if constexpr (ON_SUMS) {
#pragma unroll
                for (int j = 0; j < NT; ++j) scale[j] = table.sum_scales(j);
              }
              if (__builtin_expect(group_ends, 0)) {
                table.publish();
                this_group = min(this_group + 1, last_group);  // past the end come only columns that pad k to 64
                table.fetch(layer, min(this_group + 1, last_group));
                steps_left = group_steps;
              }
            }
#pragma unroll
            for (int j = 0; j < NT; ++j) {
#pragma unroll
              for (int i = 0; i < MT; ++i) {
                const uint4& x = o.x[i];
                float(&sum)[4] = ON_SUMS ? group_sum[ON_SUMS ? i * NT + j : 0] : acc[i * NT + j];
                mma_16bit<T>(sum, o.w[j], half == 0 ? x.x : x.z, half == 0 ? x.y : x.w);
                if (half == 1 && j + 1 == NT) o.load_x(ring.at(), i, 1 - step);
              }
              if (half == 0) {
                table.template make<1>(o.codes[j], j, o.w[j]);
                o.load_codes(ring.at(), j, 1 - step);
              } else {
                table.template make<0>(o.codes[j], j, o.w[j]);
              }
            }
          }
          if constexpr (ON_SUMS) {
            if (group_ends || (step == 1 && left == 1)) {
#pragma unroll
              for (int f = 0; f < MT * NT; ++f) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  acc[f][e] = fmaf(group_sum[f][e], e / 2 == 0 ? scale[f % NT].x : scale[f % NT].y, acc[f][e]);
                  group_sum[f][e] = 0.0f;
                }
              }
            }
          }
        }
      }
      if (loader.slices_left == 0) loader.seek(args);
    }
    if constexpr (table.UNIT != 1.0f) {
#pragma unroll
      for (int f = 0; f < 4 * MT * NT; ++f) acc[f / 4][f % 4] *= 1.0f / table.UNIT;
    }
  }

  static __device__ __forceinline__ void accumulate(const GemmW4A16Sm80Args& args, const TilePart& part, Loader& loader,
                                                    Ring& ring, float (&acc)[MT * NT][4]) {
    if constexpr (ON_SUMS) {
      accumulate<Scaling::SUMS>(args, part, loader, ring, acc);
    } else {
      constexpr bool CODEBOOK = std::is_same<Codes, Codebook4>::value;
      if (CODEBOOK || args.low_scales != 0) return accumulate<Scaling::TWO_PARTS>(args, part, loader, ring, acc);
      if constexpr (std::is_same<T, bf16>::value && !CODEBOOK) {
        const uint32_t zero_point = args.layer.w_zero_point;
        const bool exact_offset = !Codes::HAS_ZERO_POINT ||
                                  (args.layer.w_zero_points == nullptr && (zero_point & (zero_point - 1)) == 0);
        if (exact_offset) return accumulate<Scaling::FUSED>(args, part, loader, ring, acc);
      }
      if constexpr (!CODEBOOK) accumulate<Scaling::ONE_PART>(args, part, loader, ring, acc);
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A16Sm80Args& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    Ring ring{shared_address(shared)};
    Loader loader;
    loader.seek(args);
#pragma unroll 1
    for (int s = 0; s < STAGES; ++s) {
      loader.next(ring.base + s * STAGE_BYTES, args.layer);
      if (loader.slices_left == 0) loader.seek(args);
    }
    for (uint32_t index = 0;; ++index) {
      const TilePart part = Work::part(args, index);
      if (!part.valid) break;
      float acc[MT * NT][4] = {};
      accumulate(args, part, loader, ring, acc);
      if (!part.whole && !Work::reduce(args, part, acc)) continue;
      const LinearWriter writer(args.layer.y);
      const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      const uint32_t col = part.col + warp / WARPS_M * Shape::WN + lane % 4 * 2;
      uint32_t row = part.row + warp % WARPS_M * Shape::WM + lane / 4;
      // Registers have no index: the rest moves up instead. One copy of this code for each i would be most of the kernel.
#pragma unroll 1
      for (int i = 0; i < MT; ++i, row += 8) {
#pragma unroll
        for (int half = 0; half < 2 * NT; ++half) {
          const float(&sums)[4] = acc[half / 2];
          const float2 y = transpose_8x8(make_float2(sums[half % 2 * 2], sums[half % 2 * 2 + 1]));
          writer.store2(row, col + half * 8, y.x, y.y);
        }
#pragma unroll
        for (int f = NT; f < MT * NT; ++f) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[f - NT][e] = acc[f][e];
        }
      }
    }
    wait_copies<0>();
  }
};

// A kernel of Codes; its lines of configs.h.
#define GEMM_W4A16_OF(NAME, T, CODES, BM, BN, WARPS_M, WARPS_N, STAGES, MIN_BLOCKS)        \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, MIN_BLOCKS)         \
      gemm_##NAME##a16_##BM##x##BN##_##T(const __grid_constant__ GemmW4A16Sm80Args args) { \
    GemmW4A16<T, CODES, BM, BN, WARPS_M, WARPS_N, STAGES>::run(args);                      \
  }
