// W4A16 and W8A16 linear layer for few rows, bound by reading the weights.
//
// Computes: as gemm_w4a16/sm80.cu, for up to 8 TOKENS8 rows.
// Layout:   the same; weights are the 16-row operand of the tensor core and the tokens its 8 columns, so that a word
//           of codes is unpacked once and feeds one instruction.
// Grid:     one block 16 TILES rows of w. Its WARPS warps share out k in contiguous parts and add up in order.
// Shared:   WARPS * 16 TILES * 8 TOKENS8 floats.
// Numerics: deterministic: which warp takes which columns, and the order of the sum, depend on k alone.
// Limits:   as gemm_w4a16/sm80.cu.
#pragma once

#include "common/load.cuh"
#include "common/linear_out.cuh"
#include "common/mma.cuh"
#include "gemm_w4a16/configs.h"
#include "gemm_w4a16/dequant.cuh"

template <typename T, typename Codes, int TOKENS8, int TILES>
struct GemvW4A16 {
  static constexpr int WARPS = GEMM_W4A16_GEMV_WARPS;
  static constexpr int LOADS = Codes::BITS / 4;                   // 16-byte loads of a lane for 16 x 64 codes
  // Slices loaded before the first is used: 4 or 8 loads of weights in flight for each lane.
  static constexpr int AHEAD = TILES * LOADS >= 8 ? 1 : TILES * LOADS >= 4 ? 2 : 4;
  static constexpr int ROWS = 16 * TILES;
  static constexpr float REST = 1.0f / fragment_unit<T, Codes>;

  static __device__ __forceinline__ void run(const GemmW4A16Args& args) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const uint32_t slices = (args.k + 63) / 64;
    const uint32_t share = (slices + WARPS - 1) / WARPS;
    const uint32_t begin = min(warp * share, slices), end = min(begin + share, slices);
    const uint32_t first_tile = blockIdx.x * TILES, tiles = args.n_pad / 16;
    const uint32_t group = min(args.group, args.k), last_group = (args.k + group - 1) / group - 1;
    const bool whole_slices = group % 64 == 0 || group == args.k;
    const T* x = static_cast<const T*>(args.x);
    const Levels<T, Codes> levels(args);

    float acc[TILES][TOKENS8][4] = {};
    for (uint32_t slice0 = begin; slice0 < end; slice0 += AHEAD) {
      uint4 w[AHEAD][TILES][LOADS], b[AHEAD][TOKENS8][2];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          const bool valid = slice0 + a < end && first_tile + i < tiles;
          const uint8_t* p = args.w + (static_cast<size_t>(first_tile + i) * slices + slice0 + a) * (128 * Codes::BITS);
#pragma unroll
          for (int l = 0; l < LOADS; ++l) {
            w[a][i][l] = valid ? load_stream(p + l * 512 + lane * 16) : make_uint4(0, 0, 0, 0);
          }
        }
      }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
#pragma unroll
        for (int j = 0; j < TOKENS8; ++j) {
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const uint32_t row = j * 8 + g, column = (slice0 + a) * 64 + step * 32 + t * 8;
            const bool valid = slice0 + a < end && row < args.y.m && column < args.k;
            b[a][j][step] = valid ? *reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * args.k + column)
                                  : make_uint4(0, 0, 0, 0);
          }
        }
      }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (slice0 + a >= end) break;
        const uint32_t column = (slice0 + a) * 64;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          float sum[TOKENS8][4] = {};
          const uint32_t row = min(first_tile + i, tiles - 1) * 16 + g;
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const size_t at = static_cast<size_t>(min((column + step * 32) / group, last_group)) * args.n_pad + row;
            uint32_t zero_g = args.w_zero_point, zero_g8 = args.w_zero_point;
            if (args.w_zero_points != nullptr) {
              zero_g = args.w_zero_points[at];
              zero_g8 = args.w_zero_points[at + 8];
            }
            zero_g = ZeroPoint<T, Codes>::low(zero_g);
            zero_g8 = ZeroPoint<T, Codes>::high(zero_g8);
            CodeTile<T, Codes> codes;
            const uint4 v = w[a][i][Codes::BITS == 4 ? 0 : step];
            if constexpr (Codes::BITS == 4) {
              codes.words[0] = step == 0 ? v.x : v.z;
              codes.words[1] = step == 0 ? v.y : v.w;
            } else {
              codes.words[0] = v.x, codes.words[1] = v.y, codes.words[2] = v.z, codes.words[3] = v.w;
            }
            uint32_t p[2][4];
            levels.template fragment<0>(codes, zero_g, zero_g8, p[0]);
            levels.template fragment<1>(codes, zero_g, zero_g8, p[1]);
#pragma unroll
            for (int j = 0; j < TOKENS8; ++j) {
              mma_16bit<T>(sum[j], p[0], b[a][j][step].x, b[a][j][step].y);
              mma_16bit<T>(sum[j], p[1], b[a][j][step].z, b[a][j][step].w);
            }
            if (step == 1 || !whole_slices) {
              const float scale = args.w_scales[at] * REST, scale8 = args.w_scales[at + 8] * REST;
#pragma unroll
              for (int j = 0; j < TOKENS8; ++j) {
                acc[i][j][0] = fmaf(sum[j][0], scale, acc[i][j][0]);
                acc[i][j][1] = fmaf(sum[j][1], scale, acc[i][j][1]);
                acc[i][j][2] = fmaf(sum[j][2], scale8, acc[i][j][2]);
                acc[i][j][3] = fmaf(sum[j][3], scale8, acc[i][j][3]);
                sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.0f;
              }
            }
          }
        }
      }
    }

    // acc: rows g and g + 8 of w, tokens 2t and 2t + 1.
    __shared__ float partial[WARPS][8 * TOKENS8][ROWS];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
#pragma unroll
      for (int j = 0; j < TOKENS8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) partial[warp][j * 8 + 2 * t + e % 2][i * 16 + g + e / 2 * 8] = acc[i][j][e];
      }
    }
    __syncthreads();
    const LinearWriter writer(args.y);
    const uint32_t rows = min(args.y.m, 8u * TOKENS8);
    for (uint32_t i = threadIdx.x; i < rows * (ROWS / 2); i += 32 * WARPS) {
      const uint32_t token = i / (ROWS / 2), row = i % (ROWS / 2) * 2;
      float y0 = partial[0][token][row], y1 = partial[0][token][row + 1];
#pragma unroll
      for (int s = 1; s < WARPS; ++s) {
        y0 += partial[s][token][row];
        y1 += partial[s][token][row + 1];
      }
      writer.store2(token, blockIdx.x * ROWS + row, y0, y1);
    }
  }
};

// A kernel of Codes; its lines of configs.h.
#define GEMV_W4A16(NAME, T, CODES, TOKEN_TILES, ROW_TILES)                                             \
  extern "C" __global__ void __launch_bounds__(32 * GEMM_W4A16_GEMV_WARPS, TOKEN_TILES == 1 ? 2 : 1)   \
      gemv_##NAME##a16_##TOKEN_TILES##x##ROW_TILES##_##T(const __grid_constant__ GemmW4A16Args args) { \
    GemvW4A16<T, CODES, TOKEN_TILES, ROW_TILES>::run(args);                                            \
  }
