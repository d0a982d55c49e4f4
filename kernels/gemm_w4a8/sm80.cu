// Linear layer with grouped 4- or 8-bit weights on int8 activations (mma.sync), sm_80 and newer.
//
// Computes: a[g] = sum over k in group g of (x[m, k] - x_zero_point[m]) * (code[n, k] - zero[g, n]), exact in int32. One group:
//           y = (float(a) * x_scale[m]) * w_scale[n]. Several: y = fma(float(a[g]), w_scale[g, n], y) from 0 in
//           ascending order, then y * x_scale[m]. Then bias.
// Layout:   x row-major, rows of exactly k bytes; w in fragment order (docs/formats.md). Within each 32 columns lane
//           4g + t takes columns 8t .. 8t + 7 of both operands. Nibbles become int8 in registers; 8-bit codes have
//           their zero point taken away when they are packed.
// Grid:     one block a BM x BN tile of y; a warp a (BM / WARPS_M) x (BN / WARPS_N) part.
// Shared:   STAGES * (128 BM + 16 BITS BN) bytes: a ring of 128-column slices filled by cp.async.
// Numerics: one thread adds an output's groups in order, so the bits are the CPU's whatever the tile.
// Limits:   k a multiple of 16, group a multiple of 32 or all of k, 8-bit code - zero within int8
//           (gemm_any takes the rest).

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/tile_order.cuh"
#include "gemm_w4a8/abi.h"
#include "gemm_w4a8/configs.h"
#include "common/epilogue.cuh"

// Four unsigned nibbles, one to a byte, minus `zeros` (0..16 in each byte), as four int8: bit 7 keeps each byte's
// borrow to itself and is flipped back.
__device__ __forceinline__ uint32_t nibbles_minus(uint32_t word, uint32_t zeros) {
  return (((word & 0x0f0f0f0fu) | 0x80808080u) - zeros) ^ 0x80808080u;
}

template <int BITS, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
struct GemmW4A8 {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M;
  static constexpr int WN = BN / WARPS_N;
  static constexpr int MT = WM / 16;
  static constexpr int NT = WN / 16;
  static constexpr int TILE_BYTES = 256 * BITS;  // 16 rows of w, 128 columns
  static constexpr int X_BYTES = BM * 128;
  static constexpr int STAGE_BYTES = X_BYTES + BN / 16 * TILE_BYTES;
  static_assert(WM % 16 == 0 && WN % 16 == 0, "tile");

  // Chunk of 16 bytes in a row of 128: of any four rows, the same quarter falls on four different groups of eight
  // banks, which is what sixteen lanes (four rows, four times 8 bytes) load at once.
  static __device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    return row * 128 + ((chunk ^ (row % 4 * 2)) << 4);
  }

  static __device__ __forceinline__ void load_slice(uint32_t stage, const GemmW4A8Args& args, uint32_t first_row,
                                                    uint32_t first_tile, uint32_t slice) {
#pragma unroll
    for (int i = threadIdx.x; i < BM * 8; i += THREADS) {
      const uint32_t row = i / 8, chunk = i % 8, column = slice * 128 + chunk * 16;
      const bool valid = column < args.k && first_row + row < args.y.m;
      const size_t at = valid ? static_cast<size_t>(first_row + row) * args.k + column : 0;
      copy_async16(stage + chunk_offset(row, chunk), args.x + at, valid);
    }
    // Rows of w are padded to 64 columns, so the last slice may have only its first half.
    constexpr int TILE_CHUNKS = TILE_BYTES / 16;
    const uint32_t halves = (args.k + 63) / 64;
#pragma unroll
    for (int i = threadIdx.x; i < BN / 16 * TILE_CHUNKS; i += THREADS) {
      const uint32_t tile = i / TILE_CHUNKS, chunk = i % TILE_CHUNKS;
      const bool valid = (first_tile + tile) * 16 < args.n_pad && slice * 2 + chunk / (TILE_CHUNKS / 2) < halves;
      const size_t row = static_cast<size_t>(first_tile + tile) * halves + slice * 2;
      copy_async16(stage + X_BYTES + i * 16, args.w + (valid ? row * (TILE_BYTES / 2) + chunk * 16 : 0), valid);
    }
  }

  struct Zeros {
    uint32_t g[NT], g8[NT];  // in every byte
  };
  static __device__ __forceinline__ Zeros load_zeros(const GemmW4A8Args& args, uint32_t group, uint32_t first_col) {
    Zeros z;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      z.g[j] = z.g8[j] = args.w_zero_point * 0x01010101u;
      const uint32_t col = first_col + j * 16 + threadIdx.x % 32 / 4;
      if (BITS == 4 && args.w_zero_points != nullptr && col < args.n_pad) {
        z.g[j] = args.w_zero_points[static_cast<size_t>(group) * args.n_pad + col] * 0x01010101u;
        z.g8[j] = args.w_zero_points[static_cast<size_t>(group) * args.n_pad + col + 8] * 0x01010101u;
      }
    }
    return z;
  }

  // Of the two columns that each n8 fragment gives this lane.
  static __device__ __forceinline__ void load_scales(float2 (&scales)[2 * NT], const GemmW4A8Args& args, uint32_t group,
                                                     uint32_t first_col) {
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j) {
      const uint32_t col = first_col + j * 8 + threadIdx.x % 4 * 2;
      const float* p = args.w_scales + static_cast<size_t>(group) * args.n_pad + col;
      scales[j] = col < args.n_pad ? *reinterpret_cast<const float2*>(p) : make_float2(0.0f, 0.0f);
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A8Args& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint2 tile = tile_of_block<BM, BN>(args.y.m, args.y.n);
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;
    const uint32_t first_row = tile.x * BM, first_tile = tile.y * (BN / 16);
    const uint32_t first_col = tile.y * BN + warp_n * WN;
    const uint2 warp = make_uint2(first_row + warp_m * WM, first_col);
    const uint32_t slices = (args.k + 127) / 128, steps = (args.k + 31) / 32;
    const uint32_t group = min(args.group, args.k), last_group = (args.k + group - 1) / group - 1;
    const uint32_t group_steps = (group + 31) / 32;
    const bool one_group = last_group == 0;

    float acc[MT][2 * NT][4] = {};
    int32_t sum[MT][2 * NT][4] = {};
    float2 scales[2 * NT];
    uint32_t this_group = 0, steps_left = group_steps;
    load_scales(scales, args, 0, first_col);
    Zeros zeros = load_zeros(args, 0, first_col), next_zeros = load_zeros(args, min(1u, last_group), first_col);

#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < slices) load_slice(base + s * STAGE_BYTES, args, first_row, first_tile, s);
      commit_copies();
    }
    uint32_t stage = 0, free_stage = STAGES - 1;
    for (uint32_t slice = 0; slice < slices; ++slice) {
      wait_copies<STAGES - 2>();
      __syncthreads();
      const uint32_t ahead = slice + STAGES - 1;
      if (ahead < slices) load_slice(base + free_stage * STAGE_BYTES, args, first_row, first_tile, ahead);
      commit_copies();
      const uint8_t* x = shared + stage * STAGE_BYTES;
      const uint8_t* w = x + X_BYTES + warp_n * (NT * TILE_BYTES);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (slice * 4 + step >= steps) break;
        uint32_t a[MT][4];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          const uint32_t row = warp_m * WM + i * 8 + g;
          const uint2 r = *reinterpret_cast<const uint2*>(x + chunk_offset(row, step * 2 + t / 2) + t % 2 * 8);
          a[i / 2][i % 2] = r.x;
          a[i / 2][2 + i % 2] = r.y;
        }
        if (args.x_flip != 0) {
#pragma unroll
          for (int i = 0; i < 4 * MT; ++i) a[i / 4][i % 4] ^= args.x_flip;
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const uint8_t* codes = w + j * TILE_BYTES;
          uint32_t b[2][2];  // rows g and g + 8; first and second four columns
          if constexpr (BITS == 4) {
            const uint2 v = *reinterpret_cast<const uint2*>(codes + step / 2 * 512 + lane * 16 + step % 2 * 8);
            b[0][0] = nibbles_minus(v.x, zeros.g[j]);
            b[1][0] = nibbles_minus(v.x >> 4, zeros.g8[j]);
            b[0][1] = nibbles_minus(v.y, zeros.g[j]);
            b[1][1] = nibbles_minus(v.y >> 4, zeros.g8[j]);
          } else {
            const uint4 v = *reinterpret_cast<const uint4*>(codes + step * 512 + lane * 16);
            b[0][0] = v.x, b[0][1] = v.y, b[1][0] = v.z, b[1][1] = v.w;
          }
#pragma unroll
          for (int i = 0; i < MT; ++i) {
            mma_s8(sum[i][2 * j], a[i], b[0][0], b[0][1]);
            mma_s8(sum[i][2 * j + 1], a[i], b[1][0], b[1][1]);
          }
        }
        if (--steps_left == 0 || slice * 4 + step + 1 == steps) {
          flush(args, acc, sum, scales, this_group, one_group, warp.x, first_col);
          steps_left = group_steps;
          this_group = min(this_group + 1, last_group);
          load_scales(scales, args, this_group, first_col);
          zeros = next_zeros;
          next_zeros = load_zeros(args, min(this_group + 1, last_group), first_col);
        }
      }
      free_stage = stage;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wait_copies<0>();
    if (is_plain(args.y)) return store(args, acc, scales, one_group, warp.x, first_col);
    __syncthreads();
    using Fused = FusedTile<WARPS_M, WARPS_N, WM, WN>;
    static_assert(Fused::BYTES <= STAGES * STAGE_BYTES, "the ring holds what is finished at once");
    Fused::finish(args.y, args.x_scales, reinterpret_cast<float*>(shared), first_row, tile.y * BN, [&](int i, int j, int e) {
      if (args.y.mode == LOWBIT_OUT_FIXED) return acc[i][j][e];
      const float x_scale = args.x_scales[min(warp.x + i * 16 + e / 2 * 8 + g, args.y.m - 1)];
      return scaled(acc[i][j][e], x_scale, e % 2 == 0 ? scales[j].x : scales[j].y, one_group);
    });
  }

  // Ends a group: acc = fma(float(sum - x_zero_point * w_sum), scale, acc), or the bare float when there is one group; in mode
  // FIXED the bits of the exact sum.
  static __device__ __forceinline__ void flush(const GemmW4A8Args& args, float (&acc)[MT][2 * NT][4],
                                               int32_t (&sum)[MT][2 * NT][4], const float2 (&scales)[2 * NT],
                                               uint32_t group, bool one_group, uint32_t first_row,
                                               uint32_t first_col) {
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j) {
      const uint32_t col = first_col + j * 8 + threadIdx.x % 4 * 2;
      if (args.w_sums != nullptr && col < args.n_pad) {
        const int2 w_sums = *reinterpret_cast<const int2*>(args.w_sums + static_cast<size_t>(group) * args.n_pad + col);
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          const int32_t zero = zero_of_row(args, min(first_row + i * 8 + threadIdx.x % 32 / 4, args.y.m - 1));
          sum[i / 2][j][i % 2 * 2] -= zero * w_sums.x;
          sum[i / 2][j][i % 2 * 2 + 1] -= zero * w_sums.y;
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t a = sum[i][j][e];
          const float exact = args.y.mode == LOWBIT_OUT_FIXED ? __int_as_float(a) : __int2float_rn(a);
          acc[i][j][e] = one_group ? exact : __fmaf_rn(exact, e % 2 == 0 ? scales[j].x : scales[j].y, acc[i][j][e]);
          sum[i][j][e] = 0;
        }
      }
    }
  }

  static __device__ __forceinline__ float scaled(float acc, float x_scale, float w_scale, bool one_group) {
    const float y = __fmul_rn(acc, x_scale);
    return one_group ? __fmul_rn(y, w_scale) : y;
  }

  static __device__ __forceinline__ void store(const GemmW4A8Args& args, const float (&acc)[MT][2 * NT][4],
                                               const float2 (&scales)[2 * NT], bool one_group, uint32_t first_row,
                                               uint32_t first_col) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const LinearWriter writer(args.y);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const uint32_t row = first_row + i * 8 + g;
      if (row >= args.y.m) continue;
      const float x_scale = args.x_scales[row];
#pragma unroll
      for (int j = 0; j < 2 * NT; ++j) {
        const float(&a)[4] = acc[i / 2][j];
        writer.store2(row, first_col + j * 8 + 2 * t, scaled(a[i % 2 * 2], x_scale, scales[j].x, one_group),
                      scaled(a[i % 2 * 2 + 1], x_scale, scales[j].y, one_group));
      }
    }
  }
};

// The kernels of configs.h.
#define GEMM_GROUPED(BITS, BM, BN, WARPS_M, WARPS_N, STAGES, MIN_BLOCKS)                \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, MIN_BLOCKS)      \
      gemm_grouped_w##BITS##a8_##BM##x##BN(const __grid_constant__ GemmW4A8Args args) { \
    GemmW4A8<BITS, BM, BN, WARPS_M, WARPS_N, STAGES>::run(args);                        \
  }
#define GEMM_GROUPED_W4A8(...) GEMM_GROUPED(4, __VA_ARGS__)
#define GEMM_GROUPED_W8A8(...) GEMM_GROUPED(8, __VA_ARGS__)
GEMM_W4A8_SM80(GEMM_GROUPED_W4A8)
GEMM_W4A8_SM80(GEMM_GROUPED_W8A8)
