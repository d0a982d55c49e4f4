// W8A8 for many rows on sm_90a: tiles of 128 rows of x by BN rows of w.
//
// Blocks:   one per multiprocessor, each walking over tiles.
// Threads:  two warpgroups that multiply, then one whose first lane feeds the ring by TMA and which leaves its registers to the
//           others. The two have 64 x BN sums of a tile each, or with PINGPONG all of every other tile: what one does with
//           its sums then falls beside the other's products.
// Shared:   a ring of STAGES slices of 128 bytes of k: x as TMA's 128-byte swizzle leaves it, w as it is stored.
#pragma once

#include "common/pipeline.cuh"
#include "common/tile_order.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "gemm_w8a8/sm90_epilogue.cuh"
#include "gemm_w8a8/sm90_outliers.cuh"

// OUTLIERS: LLM.int8().
template <int BN, int STAGES, bool PINGPONG, bool OUTLIERS = false>
struct GemmW8A8Persistent {
  static constexpr int BM = GEMM_W8A8_SM90_BM;
  static constexpr int CONSUMERS = 2;  // warpgroups
  static constexpr int THREADS = 128 * (CONSUMERS + 1);
  static constexpr int ROW_BLOCKS = PINGPONG ? 2 : 1;  // times 64 rows of x for a warpgroup
  static constexpr uint32_t X_BYTES = BM * 128;
  static constexpr uint32_t BLOCK_BYTES = 64 * 128;  // of w: 64 rows of a slice, contiguous in memory
  static constexpr uint32_t STAGE_BYTES = X_BYTES + BN * 128;
  using Ring = FixedRing<STAGES, STAGE_BYTES>;
  static constexpr uint32_t W_BLOCKS = BN / 64;
  using Tiles = BandedTiles<BN, BM, 16>;
  // In the memory where rows of y wait before and after. As many columns of w at a time as there are registers for.
  using Outliers = std::conditional_t<OUTLIERS, WarpOutliers<16 * ROW_BLOCKS, BN, 512 / BN>, NoOutliers>;
  static constexpr uint32_t WARP_BYTES = Outliers::BYTES > WarpRows::BYTES ? Outliers::BYTES : WarpRows::BYTES;
  static constexpr uint32_t EPILOGUE_BYTES = TileColumns<BN>::BYTES + 4 * WARP_BYTES;  // of a warpgroup
  static constexpr uint32_t SHARED_BYTES = Ring::BYTES + CONSUMERS * EPILOGUE_BYTES;
  static_assert(WARP_BYTES == (OUTLIERS ? GEMM_LLM_INT8_SM90_LINE_BYTES : GEMM_W8A8_SM90_LINE_BYTES), "as abi.h says");

  static __device__ __forceinline__ void produce(const GemmW8A8Sm90Args& args, uint32_t base) {
    const Tiles tiles(args.y.m, args.y.n);
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t w_blocks = (args.y.n + 63) / 64;
    RingPosition<STAGES> at;
    prefetch_map(args.x);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      const uint2 tile = tiles.at(index);
      const uint32_t first_block = tile.y * W_BLOCKS, blocks = min(W_BLOCKS, w_blocks - first_block);
      const int8_t* w = args.w + static_cast<size_t>(first_block) * slices * BLOCK_BYTES;
      for (uint32_t slice = 0; slice < slices; ++slice) {
        const uint32_t shared = Ring::stage(base, at.slot), barrier = Ring::full(base, at.slot);
        barrier_wait(Ring::empty(base, at.slot), at.parity ^ 1);
        barrier_expect(barrier, X_BYTES + blocks * BLOCK_BYTES);
        copy_box(shared, args.x, slice * 128, tile.x * BM, barrier, L2_EVICT_NORMAL);
#pragma unroll
        for (uint32_t i = 0; i < W_BLOCKS; ++i) {
          if (i >= blocks) break;
          copy_bulk(shared + X_BYTES + i * BLOCK_BYTES, w + (static_cast<size_t>(i) * slices + slice) * BLOCK_BYTES,
                    BLOCK_BYTES, barrier, L2_EVICT_NORMAL);
        }
        at.advance();
      }
    }
  }

  // This warpgroup is through with a slot.
  static __device__ __forceinline__ void release(uint32_t base, uint32_t slot) {
    if (threadIdx.x % 128 == 0) barrier_arrive(Ring::empty(base, slot));
  }

  // Named barrier at which a warpgroup waits for its turn: the other has then seen its last slice. Before, the parity of the
  // first slice's barrier could be that of a round long past.
  static __device__ __forceinline__ uint32_t order_barrier(uint32_t group) { return 1 + CONSUMERS + group; }

  // The sums of a tile, from the slices that come next. X: int8_t or uint8_t, what x is.
  template <typename X>
  static __device__ __forceinline__ void multiply(int32_t (&sums)[ROW_BLOCKS][BN / 2], uint32_t base, uint32_t group,
                                                  uint32_t slices, RingPosition<STAGES>& at) {
    uint32_t previous = 0;
    for (uint32_t slice = 0; slice < slices; ++slice) {
      const uint32_t shared = Ring::stage(base, at.slot);
      const uint64_t w = matrix_descriptor(shared + X_BYTES);
      barrier_wait(Ring::full(base, at.slot), at.parity);
      if (PINGPONG && slice + 1 == slices) named_barrier_arrive(order_barrier(group ^ 1), 128 * CONSUMERS);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int row_block = 0; row_block < ROW_BLOCKS; ++row_block) {
          const uint64_t x = matrix_descriptor(shared + (PINGPONG ? row_block : group) * 64 * 128);
          Wgmma8Bit<X, int8_t, BN>::run(sums[row_block], x + 2 * step, w + 2 * step, slice + step != 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (slice != 0) release(base, previous);
      previous = at.slot;
      at.advance();
    }
    wgmma_wait<0>();
    release(base, previous);
  }

  // A warp's outputs of 16 rows, as WarpTile has them, before outliers and bias.
  static __device__ __forceinline__ void scale_sums(const TileColumns<BN>& columns, const float (&x_scales)[2],
                                                    const int32_t (&sums)[BN / 2], float (&y)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 2; i += 2) {
      const float2 scale = columns.scale(i / 4 * 8 + threadIdx.x % 4 * 2);
      y[i] = dequantize_w8a8(sums[i], 0, x_scales[i / 2 % 2], scale.x);
      y[i + 1] = dequantize_w8a8(sums[i + 1], 0, x_scales[i / 2 % 2], scale.y);
    }
  }

  // Adds the products of a column of outliers: `x` of the warp's rows, `w` of the tile's columns.
  static __device__ __forceinline__ void add_column(float (&y)[ROW_BLOCKS][BN / 2], const float* x, const float* w) {
    float values[ROW_BLOCKS][2];
#pragma unroll
    for (int i = 0; i < 2 * ROW_BLOCKS; ++i) values[i / 2][i % 2] = x[i * 8 + threadIdx.x % 32 / 4];
#pragma unroll
    for (int b = 0; b < BN / 8; ++b) {
      const float2 weight = *reinterpret_cast<const float2*>(w + 8 * b + threadIdx.x % 4 * 2);
#pragma unroll
      for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
        float *const to = y[i / 2] + 4 * b + i % 2 * 2, value = values[i / 2][i % 2];
        if (value != 0.0f) to[0] = __fmaf_rn(value, weight.x, to[0]), to[1] = __fmaf_rn(value, weight.y, to[1]);
      }
    }
  }

  static __device__ __forceinline__ void consume(const GemmW8A8Sm90Args& args, uint32_t base) {
    const Tiles tiles(args.y.m, args.y.n);
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t group = threadIdx.x / 128;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    const uint32_t warp = threadIdx.x % 128 / 32, epilogue = Ring::BYTES + group * EPILOGUE_BYTES;
    TileColumns<BN> columns(shared_memory + epilogue, 1 + group);
    uint8_t* const warp_memory = shared_memory + epilogue + TileColumns<BN>::BYTES + warp * WARP_BYTES;
    const WarpRows rows(warp_memory);
    const uint32_t first_tile = PINGPONG ? group : 0, apart = PINGPONG ? CONSUMERS : 1;
    RingPosition<STAGES> at;
    at.advance(first_tile * slices);
    if (PINGPONG && group != 0) named_barrier_arrive(order_barrier(0), 128 * CONSUMERS);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x + first_tile * gridDim.x; index < tiles.count(); index += apart * gridDim.x) {
      const uint2 tile = tiles.at(index);
      const uint32_t first = tile.x * BM + (PINGPONG ? 0 : group * 64) + warp * 16;
      columns.load(args, tile.y * BN);
      float x_scales[ROW_BLOCKS][2];
      int32_t x_zero_points[ROW_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
        const uint32_t row = first + threadIdx.x % 32 / 4 + i / 2 * 64 + i % 2 * 8;
        x_scales[i / 2][i % 2] = row < args.y.m ? args.x_scales[row] : 0.0f;
        x_zero_points[i / 2][i % 2] = row < args.y.m && !OUTLIERS ? zero_of_row(args, row) : 0;
      }
      const uint32_t lane = threadIdx.x % 32;
      Outliers outliers(args, first + lane / 16 * 64 + lane % 16, tile.y * BN, warp_memory);
      if constexpr (OUTLIERS) outliers.begin();
      int32_t sums[ROW_BLOCKS][BN / 2];
      if constexpr (OUTLIERS) {
        // The first product ignores them, but the compiler takes what it has not seen written for alive since the tile before.
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * BN / 2; ++i) sums[i / (BN / 2)][i % (BN / 2)] = 0;
      }
      if (PINGPONG) named_barrier(order_barrier(group), 128 * CONSUMERS);
      if (!OUTLIERS && args.x_unsigned) {
        multiply<uint8_t>(sums, base, group, slices, at);
      } else {
        multiply<int8_t>(sums, base, group, slices, at);
      }
      if (PINGPONG) at.advance(slices);  // the other's
      columns.publish();
      if constexpr (OUTLIERS) {
        float y[ROW_BLOCKS][BN / 2];
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) scale_sums(columns, x_scales[i], sums[i], y[i]);
        outliers.each([&](const float* x, const float* w) { add_column(y, x, w); });
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) {
          WarpTile<BN, float>{args, columns, first + 64 * i, tile.y * BN, {}, {}}.store(rows, y[i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) {
          const WarpTile<BN> out{args, columns, first + 64 * i, tile.y * BN, {x_scales[i][0], x_scales[i][1]},
                                 {x_zero_points[i][0], x_zero_points[i][1]}};
          out.store(rows, sums[i]);
        }
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmW8A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    if (threadIdx.x == 0) Ring::init(base, 1, PINGPONG ? 1 : CONSUMERS);
    launch_dependents();
    __syncthreads();
    if (threadIdx.x < 128 * CONSUMERS) {
      warpgroup_reg_alloc<232>();
      consume(args, base);
    } else {
      warpgroup_reg_dealloc<40>();
      if (threadIdx.x < 128 * CONSUMERS + 32 && elect_lane()) produce(args, base);
    }
  }
};
