// W8A8 linear layer on int8 tensor cores (mma.sync), sm_80 and newer.
//
// Computes: y[m, n] = epilogue(sum_k (x[m, k] - x_zero_point[m]) * w[n, k]), s8 or u8 x s8 -> s32, then epilogue.cuh, then
//           bias and what common/linear_fused.cuh does.
// Layout:   x and w row-major with rows of exactly k bytes, k a multiple of 16 so that every row starts on 16 bytes.
// Grid:     one block a BM x BN tile of y, WARPS_M x WARPS_N warps, each a (BM / WARPS_M) x (BN / WARPS_N) part.
// Shared:   STAGES * (BM + BN) * BK bytes: a ring of k-slices filled by cp.async, each row's 16-byte chunks permuted
//           so that ldmatrix meets no bank conflict.
// Numerics: exact in int32 whatever the tile; the epilogue fixes every float operation. Same bits as the CPU.
// Limits:   k a multiple of 16 (gemm_any takes the rest), |x - x_zero_point| * |w| * k under 2^31.

#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/tile_order.cuh"
#include "gemm_w8a8/abi.h"
#include "common/epilogue.cuh"
#include "gemm_w8a8/sm80_outliers.cuh"

// U8: x is uint8. Its zero point counts as read, so that nothing but the instruction differs.
template <int BM, int BN, int BK, int WARPS_M, int WARPS_N, int STAGES, bool U8, typename Outlier = void>
struct GemmW8A8 {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M;
  static constexpr int WN = BN / WARPS_N;
  static constexpr int MT = WM / 16;  // m16 fragments of a warp
  static constexpr int NT = WN / 16;  // pairs of n8 fragments of a warp
  static constexpr int KS = BK / 32;  // mma steps of a slice
  static constexpr int CHUNKS = BK / 16;
  static constexpr int ROWS_A_PASS = THREADS / CHUNKS;
  static constexpr int STAGE_BYTES = (BM + BN) * BK;
  static_assert(BM % ROWS_A_PASS == 0 && BN % ROWS_A_PASS == 0 && WM % 16 == 0 && WN % 16 == 0 && KS >= 2, "tile");

  struct Fragments {
    uint32_t x[MT][4];
    uint32_t w[NT][4];  // of n8 fragments 2i and 2i + 1: k halves 0 and 1 each
  };

  // Byte offset of a 16-byte chunk of a row. Eight rows of one logical chunk must fall on eight different groups of
  // four banks: rows of 64 bytes already alternate between two halves, so only every other row moves on.
  static __device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    const uint32_t turn = BK == 64 ? (row >> 1) & 3 : row & 7;
    return row * BK + ((chunk ^ turn) << 4);
  }

  static __device__ __forceinline__ void load_slice(uint32_t stage, const GemmW8A8Args& args, uint32_t row_x,
                                                    uint32_t row_w, uint32_t slice) {
    const uint32_t row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const uint32_t column = slice * BK + chunk * 16;
    const bool inside = column < args.k;
    const size_t k = args.k;
#pragma unroll
    for (int i = 0; i < BM / ROWS_A_PASS; ++i) {
      const uint32_t r = row + i * ROWS_A_PASS;
      const bool valid = inside && row_x + r < args.y.m;
      copy_async16(stage + chunk_offset(r, chunk), args.x + (valid ? (row_x + r) * k + column : 0), valid);
    }
#pragma unroll
    for (int i = 0; i < BN / ROWS_A_PASS; ++i) {
      const uint32_t r = row + i * ROWS_A_PASS;
      const bool valid = inside && row_w + r < args.y.n;
      copy_async16(stage + BM * BK + chunk_offset(r, chunk), args.w + (valid ? (row_w + r) * k + column : 0), valid);
    }
  }

  static __device__ __forceinline__ void load_fragments(Fragments& f, uint32_t stage, uint32_t warp_m, uint32_t warp_n,
                                                        int step) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const uint32_t row = warp_m * WM + i * 16 + lane % 16;
      load_matrix_x4(f.x[i], stage + chunk_offset(row, 2 * step + lane / 16));
    }
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      const uint32_t row = warp_n * WN + i * 16 + lane % 8 + lane / 16 * 8;
      load_matrix_x4(f.w[i], stage + BM * BK + chunk_offset(row, 2 * step + lane / 8 % 2));
    }
  }

  static __device__ __forceinline__ void run(const GemmW8A8Args& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint2 tile = tile_of_block<BM, BN>(args.y.m, args.y.n);
    const uint32_t row_x = tile.x * BM, row_w = tile.y * BN;
    const uint32_t warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;
    const uint32_t slices = (args.k + BK - 1) / BK;

    int32_t acc[MT][2 * NT][4] = {};
    Fragments f[2];

#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < slices) load_slice(base + s * STAGE_BYTES, args, row_x, row_w, s);
      commit_copies();
    }
    wait_copies<STAGES - 2>();
    __syncthreads();
    load_fragments(f[0], base, warp_m, warp_n, 0);

    // `stage` is read, `free_stage` was read in the previous turn and is filled again.
    uint32_t stage = 0, free_stage = STAGES - 1;
    for (uint32_t slice = 0; slice < slices; ++slice) {
#pragma unroll
      for (int step = 0; step < KS; ++step) {
        if (step == KS - 1) {
          // Everyone has read the last fragments of this stage, and the next one has arrived.
          wait_copies<STAGES - 2>();
          __syncthreads();
          free_stage = stage;
          stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        load_fragments(f[(step + 1) % 2], base + stage * STAGE_BYTES, warp_m, warp_n, (step + 1) % KS);
        if (step == 0) {
          const uint32_t ahead = slice + STAGES - 1;
          if (ahead < slices) load_slice(base + free_stage * STAGE_BYTES, args, row_x, row_w, ahead);
          commit_copies();
        }
        const Fragments& now = f[step % 2];
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
          for (int j = 0; j < 2 * NT; ++j) {
            constexpr auto mma = U8 ? mma_u8 : mma_s8;
            mma(acc[i][j], now.x[i], now.w[j / 2][j % 2 * 2], now.w[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }
    wait_copies<0>();
    const uint2 warp = make_uint2(row_x + warp_m * WM, row_w + warp_n * WN);
    if constexpr (!IS_VOID<Outlier>) {
      using Tile = OutlierTile<Outlier, BM, BN, MT, NT, THREADS>;
      static_assert(sizeof(typename Tile::Shared) <= STAGES * STAGE_BYTES, "the ring holds outliers");
      __syncthreads();
      return Tile::store(args, acc, *reinterpret_cast<typename Tile::Shared*>(shared), make_uint2(row_x, row_w), warp);
    }
    if (args.w_sums != nullptr) correct(args, acc, warp);
    if (is_plain(args.y)) return store(args, acc, warp);
    __syncthreads();
    store_fused(args, acc, reinterpret_cast<float*>(shared), make_uint2(row_x, row_w), warp);
  }

  // Takes the zero points of x away: from sums over codes to exact sums. `warp` is the warp's first row and column.
  static __device__ __forceinline__ void correct(const GemmW8A8Args& args, int32_t (&acc)[MT][2 * NT][4], uint2 warp) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j) {
      const uint32_t col = warp.y + j * 8 + 2 * t, last = args.y.n - 1;
      const int32_t w_sums[2] = {args.w_sums[min(col, last)], args.w_sums[min(col + 1, last)]};
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i) {
        const int32_t zero = zero_of_row(args, min(warp.x + i * 8 + g, args.y.m - 1));
        acc[i / 2][j][i % 2 * 2] -= zero * w_sums[0];
        acc[i / 2][j][i % 2 * 2 + 1] -= zero * w_sums[1];
      }
    }
  }

  static __device__ __forceinline__ void store(const GemmW8A8Args& args, const int32_t (&acc)[MT][2 * NT][4],
                                               uint2 warp) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const LinearWriter writer(args.y);
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j) {
      const uint32_t col = warp.y + j * 8 + 2 * t;
      if (col >= args.y.n) continue;
      const uint32_t next = min(col + 1, args.y.n - 1);
      const float scale0 = args.w_scales[col], scale1 = args.w_scales[next];
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i) {
        const uint32_t row = warp.x + i * 8 + g;
        if (row >= args.y.m) continue;
        const float x_scale = args.x_scales[row];
        writer.store2(row, col, dequantize_w8a8(acc[i / 2][j][i % 2 * 2], 0, x_scale, scale0),
                      dequantize_w8a8(acc[i / 2][j][i % 2 * 2 + 1], 0, x_scale, scale1));
      }
    }
  }

  // As `store`, with an epilogue; `tile` is the block's first row and column.
  static __device__ __forceinline__ void store_fused(const GemmW8A8Args& args, const int32_t (&acc)[MT][2 * NT][4],
                                                     float* shared, uint2 tile, uint2 warp) {
    using Fused = FusedTile<WARPS_M, WARPS_N, WM, WN>;
    static_assert(Fused::BYTES <= STAGES * STAGE_BYTES, "the ring holds what is finished at once");
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Fused::finish(args.y, args.x_scales, shared, tile.x, tile.y, [&](int i, int j, int e) {
      if (args.y.mode == LOWBIT_OUT_FIXED) return __int_as_float(acc[i][j][e]);
      const float x_scale = args.x_scales[min(warp.x + i * 16 + e / 2 * 8 + g, args.y.m - 1)];
      return dequantize_w8a8(acc[i][j][e], 0, x_scale, args.w_scales[min(warp.y + j * 8 + 2 * t + e % 2, args.y.n - 1)]);
    });
  }
};
