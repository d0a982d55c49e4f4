// The outliers of LLM.int8() in the epilogue of gemm_w8a8: each row's own, in 16 bit, times dequantized weights.
//
// A block takes the union of its rows' outliers, gathers those columns of w once for all its rows, and each thread adds
// its outputs' products. A row skips columns that are outliers of other rows alone, so no result depends on the batch.
// Numerics: y = fma(x[c], float(w[n, c]) * w_scale[n], y) for c ascending, after the scaled int8 part; the CPU's bits.
#pragma once

#include "gemm_w8a8/abi.h"
#include "common/epilogue.cuh"

template <typename T>
constexpr bool IS_VOID = false;
template <>
constexpr bool IS_VOID<void> = true;

// Of a BM x BN tile whose warps hold MT x 2 NT fragments of 16 x 8.
template <typename T, int BM, int BN, int MT, int NT, int THREADS>
struct OutlierTile {
  static constexpr int COLUMNS = 16;    // gathered at once
  static constexpr int STRIDE = COLUMNS + 1;  // so that rows begin in different banks
  static constexpr int SEGMENT = 1024;  // columns whose union is listed at once

  struct Shared {
    uint32_t any[SEGMENT / 32];  // the union
    uint32_t list[SEGMENT];      // its columns, ascending
    uint32_t count;
    float x[BM][STRIDE];
    float w[BN][STRIDE];
  };

  // Lists the outliers of columns [32 first_word, 32 first_word + SEGMENT) over the block's rows.
  static __device__ __forceinline__ void find(const GemmW8A8Args& args, Shared& s, uint32_t first_row,
                                              uint32_t first_word) {
    const uint32_t lane = threadIdx.x % 32, words = (args.k + 31) / 32, word = first_word + lane;
    if (threadIdx.x < 32) s.any[lane] = 0;
    __syncthreads();
    uint32_t any = 0;
    for (uint32_t row = first_row + threadIdx.x / 32; row < min(first_row + BM, args.y.m); row += THREADS / 32) {
      if (word < words) any |= args.outliers[static_cast<size_t>(row) * words + word];
    }
    if (any != 0) atomicOr(&s.any[lane], any);
    __syncthreads();
    if (threadIdx.x < 32) {
      any = s.any[lane];
      uint32_t end = __popc(any);
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffff, end, distance);
        if (lane >= distance) end += before;
      }
      if (lane == 31) s.count = end;
      for (uint32_t at = end - __popc(any); any != 0; any &= any - 1) s.list[at++] = 32 * word + __ffs(any) - 1;
    }
    __syncthreads();
  }

  // Values of columns list[base ..] and their weights; 0 where a row has no outlier and behind the end of the list.
  static __device__ __forceinline__ void gather(const GemmW8A8Args& args, Shared& s, uint2 tile, uint32_t base) {
    const uint32_t words = (args.k + 31) / 32;
    const T* floats = static_cast<const T*>(args.x_floats);
    for (uint32_t i = threadIdx.x; i < BM * COLUMNS; i += THREADS) {
      const uint32_t r = i / COLUMNS, u = i % COLUMNS, row = tile.x + r;
      float value = 0.0f;
      if (base + u < s.count && row < args.y.m) {
        const uint32_t c = s.list[base + u];
        const bool own = args.outliers[static_cast<size_t>(row) * words + c / 32] >> (c % 32) & 1;
        if (own) value = to_float(floats[static_cast<size_t>(row) * args.k + c]);
      }
      s.x[r][u] = value;
    }
    for (uint32_t i = threadIdx.x; i < BN * COLUMNS; i += THREADS) {
      const uint32_t r = i / COLUMNS, u = i % COLUMNS, n = tile.y + r;
      float weight = 0.0f;
      if (base + u < s.count && n < args.y.n) {
        weight = __fmul_rn(static_cast<float>(args.w[static_cast<size_t>(n) * args.k + s.list[base + u]]),
                           args.w_scales[n]);
      }
      s.w[r][u] = weight;
    }
  }

  // `tile` is the block's first row and column, `warp` the warp's.
  static __device__ __forceinline__ void store(const GemmW8A8Args& args, const int32_t (&acc)[MT][2 * NT][4], Shared& s,
                                               uint2 tile, uint2 warp) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float y[MT][2 * NT][4];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t row = min(warp.x + i * 16 + e / 2 * 8 + g, args.y.m - 1);
          const uint32_t col = min(warp.y + j * 8 + 2 * t + e % 2, args.y.n - 1);
          y[i][j][e] = dequantize_w8a8(acc[i][j][e], 0, args.x_scales[row], args.w_scales[col]);
        }
      }
    }
    const uint32_t words = (args.k + 31) / 32;
    for (uint32_t word = 0; word < words; word += SEGMENT / 32) {
      find(args, s, tile.x, word);
      const uint32_t count = s.count;
      for (uint32_t base = 0; base < count; base += COLUMNS) {
        gather(args, s, tile, base);
        __syncthreads();
#pragma unroll 1
        for (uint32_t u = 0; u < min(count - base, static_cast<uint32_t>(COLUMNS)); ++u) {
#pragma unroll
          for (int i = 0; i < 2 * MT; ++i) {
            const float x = s.x[warp.x - tile.x + i * 8 + g][u];
#pragma unroll
            for (int j = 0; j < 2 * NT; ++j) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& to = y[i / 2][j][i % 2 * 2 + e];
                if (x != 0.0f) to = __fmaf_rn(x, s.w[warp.y - tile.y + j * 8 + 2 * t + e][u], to);
              }
            }
          }
        }
        __syncthreads();
      }
    }
    const LinearWriter writer(args.y);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j) {
        writer.store2(warp.x + i * 8 + g, warp.y + j * 8 + 2 * t, y[i / 2][j][i % 2 * 2], y[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }
};
