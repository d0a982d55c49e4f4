// Unquantized linear layer on 16-bit tensor cores (mma.sync), sm_80 and newer: used where cuBLASLt is not there.
//
// Computes: y[m, n] = sum_k x[m, k] * w[n, k].
// Layout:   x and w row-major with rows of exactly k elements, k a multiple of 8 so that rows start on 16 bytes.
// Dtypes:   x and w f16 or bf16, f32 sums.
// Grid:     one block a BM x BN tile of y; a warp a (BM / WARPS_M) x (BN / WARPS_N) part.
// Shared:   STAGES * (BM + BN) * 128 bytes: a ring of 64-column slices filled by cp.async, chunks permuted for ldmatrix.
// Numerics: deterministic, no split over k.
// Limits:   k a multiple of 8 (gemm_any takes the rest).

#include "common/async_copy.cuh"
#include "common/linear_out.cuh"
#include "common/mma.cuh"
#include "common/tile_order.cuh"
#include "gemm_dense/abi.h"
#include "gemm_dense/configs.h"

template <typename T, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
struct GemmDense {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M;
  static constexpr int WN = BN / WARPS_N;
  static constexpr int MT = WM / 16;  // m16 fragments of a warp
  static constexpr int NT = WN / 16;  // pairs of n8 fragments of a warp
  static constexpr int STAGE_BYTES = (BM + BN) * 128;
  static_assert(WM % 16 == 0 && WN % 16 == 0, "tile");

  static __device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  static __device__ __forceinline__ void load_rows(uint32_t to, const void* matrix, int rows, uint32_t first,
                                                   uint32_t limit, uint32_t k, uint32_t slice) {
#pragma unroll
    for (int i = threadIdx.x; i < rows * 8; i += THREADS) {
      const uint32_t row = i / 8, chunk = i % 8, column = slice * 64 + chunk * 8;
      const bool valid = column < k && first + row < limit;
      const size_t at = valid ? static_cast<size_t>(first + row) * k + column : 0;
      copy_async16(to + chunk_offset(row, chunk), static_cast<const T*>(matrix) + at, valid);
    }
  }

  static __device__ __forceinline__ void run(const GemmDenseArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint2 tile = tile_of_block<BM, BN>(args.y.m, args.y.n);
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;
    const uint32_t row_x = tile.x * BM, row_w = tile.y * BN;
    const uint32_t slices = (args.k + 63) / 64;
    float acc[MT][2 * NT][4] = {};

    const auto load_slice = [&](uint32_t to, uint32_t slice) {
      load_rows(to, args.x, BM, row_x, args.y.m, args.k, slice);
      load_rows(to + BM * 128, args.w, BN, row_w, args.y.n, args.k, slice);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < slices) load_slice(base + s * STAGE_BYTES, s);
      commit_copies();
    }
    uint32_t stage = 0, free_stage = STAGES - 1;
    for (uint32_t slice = 0; slice < slices; ++slice) {
      wait_copies<STAGES - 2>();
      __syncthreads();
      const uint32_t ahead = slice + STAGES - 1;
      if (ahead < slices) load_slice(base + free_stage * STAGE_BYTES, ahead);
      commit_copies();
      const uint32_t x = base + stage * STAGE_BYTES, w = x + BM * 128;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[MT][4], b[NT][4];
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          load_matrix_x4(a[i], x + chunk_offset(warp_m * WM + i * 16 + lane % 16, 2 * step + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const uint32_t row = warp_n * WN + j * 16 + lane % 8 + lane / 16 * 8;
          load_matrix_x4(b[j], w + chunk_offset(row, 2 * step + lane / 8 % 2));
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
          for (int j = 0; j < 2 * NT; ++j) {
            mma_16bit<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
      free_stage = stage;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wait_copies<0>();

    const LinearWriter writer(args.y);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j) {
        writer.store2(row_x + warp_m * WM + i * 8 + g, row_w + warp_n * WN + j * 8 + 2 * t, acc[i / 2][j][i % 2 * 2],
                      acc[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }
};

// The kernels of configs.h.
#define GEMM_DENSE(T, BM, BN, WARPS_M, WARPS_N, STAGES, MIN_BLOCKS)                   \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, MIN_BLOCKS)    \
      gemm_dense_##BM##x##BN##_##T(const __grid_constant__ GemmDenseArgs args) {      \
    GemmDense<T, BM, BN, WARPS_M, WARPS_N, STAGES>::run(args);                        \
  }
#define GEMM_DENSE_OF_F16(...) GEMM_DENSE(f16, __VA_ARGS__)
#define GEMM_DENSE_OF_BF16(...) GEMM_DENSE(bf16, __VA_ARGS__)
GEMM_DENSE_SM80(GEMM_DENSE_OF_F16)
GEMM_DENSE_SM80(GEMM_DENSE_OF_BF16)
