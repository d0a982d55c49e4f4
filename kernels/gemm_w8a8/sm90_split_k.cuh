// W8A8 for few rows on sm_90a: the operands swapped, rows of w by TOKENS rows of x, k split over a cluster.
//
// Blocks:   cluster of `splits` blocks for each tile of 64 * ROW_BLOCKS rows of w and TOKENS rows of x, each block with its
//           own part of k. They exchange their exact sums through distributed shared memory.
// Threads:  ROW_BLOCKS warpgroups of 64 x TOKENS sums each, then one warp of which a lane feeds the ring by TMA.
// Overlap:  weights are asked for before the kernel that makes x is through (programmatic dependent launch).
#pragma once

#include "common/pipeline.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "gemm_w8a8/sm90_epilogue.cuh"
#include "gemm_w8a8/sm90_outliers.cuh"

// OUTLIERS: LLM.int8(). A warp adds those of the outputs it writes, for which the exact sums of all blocks are there.
template <int TOKENS, int ROW_BLOCKS, int STAGES, bool OUTLIERS = false>
struct GemmW8A8SplitK {
  static constexpr int THREADS = 128 * ROW_BLOCKS + 32;
  static constexpr uint32_t ROWS = 64 * ROW_BLOCKS;
  static constexpr uint32_t BLOCK_BYTES = 64 * 128;
  static constexpr uint32_t W_BYTES = ROW_BLOCKS * BLOCK_BYTES;
  static constexpr uint32_t STAGE_BYTES = W_BYTES + (TOKENS * 128 + 1023) / 1024 * 1024;
  static constexpr uint32_t THREADS_PER_TOKEN = ROWS / 8;
  static constexpr uint32_t PITCH = ROWS + 4;  // words between tokens of the sums in shared memory: no bank conflicts
  // Passes of writing, in each of which a lane has eight columns of a token.
  static constexpr uint32_t WARP_TOKENS = 32 / THREADS_PER_TOKEN, PASS_TOKENS = 128 * ROW_BLOCKS / THREADS_PER_TOKEN;
  static constexpr uint32_t PASSES = (TOKENS + PASS_TOKENS - 1) / PASS_TOKENS;
  using Outliers = std::conditional_t<OUTLIERS, WarpOutliers<PASSES * WARP_TOKENS, ROWS, GEMM_LLM_INT8_SM90_COLUMNS>, NoOutliers>;
  using Ring = FixedRing<STAGES, STAGE_BYTES>;
  static constexpr uint32_t SHARED_BYTES = Ring::BYTES + 4 * ROW_BLOCKS * Outliers::BYTES;
  // Products of a slice are waited for only once those of the next are under way, which keeps one warpgroup busy where its
  // tile is large. The slot it holds back meanwhile is a slice less under way, which small tiles and short rings feel.
  static constexpr bool LAG = TOKENS >= 64 && TOKENS * ROW_BLOCKS <= 128 && STAGES >= 6;
  static_assert(PITCH * TOKENS * 4 <= STAGES * STAGE_BYTES, "the sums take the place of the ring");

  // Feeds the ring: what one lane does, elected each time (common/mbarrier.cuh says why).
  struct Producer {
    const GemmW8A8Sm90Args& args;
    uint32_t base, slices, blocks;
    const int8_t* w;

    __device__ __forceinline__ Producer(const GemmW8A8Sm90Args& args, uint32_t base, uint32_t tile)
        : args(args),
          base(base),
          slices((args.k + 127) / 128),
          blocks(min(static_cast<uint32_t>(ROW_BLOCKS), (args.y.n + 63) / 64 - tile * ROW_BLOCKS)),
          w(args.w + static_cast<size_t>(tile) * ROW_BLOCKS * slices * BLOCK_BYTES) {}

    __device__ __forceinline__ void copy_w(uint32_t slot, uint32_t slice) const {
      barrier_expect(Ring::full(base, slot), blocks * BLOCK_BYTES + TOKENS * 128);
      for (uint32_t i = 0; i < blocks; ++i) {
        copy_bulk(Ring::stage(base, slot) + i * BLOCK_BYTES, w + (static_cast<size_t>(i) * slices + slice) * BLOCK_BYTES,
                  BLOCK_BYTES, Ring::full(base, slot), L2_EVICT_FIRST);
      }
    }
    __device__ __forceinline__ void copy_x(uint32_t slot, uint32_t slice) const {
      copy_box(Ring::stage(base, slot) + W_BYTES, args.x, slice * 128, blockIdx.y * TOKENS, Ring::full(base, slot), L2_EVICT_LAST);
    }
    // Weights of the first stages, which wait for no kernel before.
    __device__ __forceinline__ void begin(uint32_t first, uint32_t end) const {
      prefetch_map(args.x);
      for (uint32_t i = 0; i < min(static_cast<uint32_t>(STAGES), end - first); ++i) copy_w(i, first + i);
    }
    __device__ __forceinline__ void run(uint32_t first, uint32_t end) const {
      const uint32_t ahead = min(static_cast<uint32_t>(STAGES), end - first);
      wait_for_dependencies();
      for (uint32_t i = 0; i < ahead; ++i) copy_x(i, first + i);
      RingPosition<STAGES> at;
      for (uint32_t slice = first + ahead; slice < end; ++slice) {
        barrier_wait(Ring::empty(base, at.slot), at.parity);
        copy_w(at.slot, slice);
        copy_x(at.slot, slice);
        at.advance();
      }
    }
  };

  // Adds the products of slices `begin` to `end` to `sums`. X: int8_t or uint8_t, what x is.
  template <typename X>
  static __device__ __forceinline__ void multiply(int32_t (&sums)[TOKENS / 2], uint32_t base, uint32_t begin, uint32_t end) {
    const uint32_t group = threadIdx.x / 128;
    RingPosition<STAGES> at;
    uint32_t previous = 0;
    for (uint32_t slice = begin; slice < end; ++slice) {
      const uint32_t shared = Ring::stage(base, at.slot);
      const uint64_t w = matrix_descriptor(shared + group * BLOCK_BYTES), x = matrix_descriptor(shared + W_BYTES);
      barrier_wait(Ring::full(base, at.slot), at.parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) Wgmma8Bit<int8_t, X, TOKENS>::run(sums, w + 2 * step, x + 2 * step, true);
      wgmma_commit();
      if (LAG) {
        wgmma_wait<1>();
        if (slice != begin && threadIdx.x % 128 == 0) barrier_arrive(Ring::empty(base, previous));
        previous = at.slot;
      } else {
        wgmma_wait<0>();
        if (threadIdx.x % 128 == 0) barrier_arrive(Ring::empty(base, at.slot));
      }
      at.advance();
    }
    if (LAG) wgmma_wait<0>();
  }

  static __device__ __forceinline__ void consume(const GemmW8A8Sm90Args& args, uint32_t base, uint32_t begin,
                                                 uint32_t end) {
    const uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32;
    int32_t sums[TOKENS / 2] = {};
    if (!OUTLIERS && args.x_unsigned) {
      multiply<uint8_t>(sums, base, begin, end);
    } else {
      multiply<int8_t>(sums, base, begin, end);
    }
    named_barrier(1, 128 * ROW_BLOCKS);  // all have read the ring, which now takes the sums

    const uint32_t row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4, token = 2 * (lane % 4);
    int32_t* out = shared_sums();
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[(8 * j + token + i % 2) * PITCH + row + i / 2 * 8] = sums[4 * j + i];
    }
  }

  static __device__ __forceinline__ int32_t* shared_sums() {
    extern __shared__ __align__(1024) uint8_t shared[];
    return reinterpret_cast<int32_t*>(shared + LOWBIT_RING_HEAD_BYTES);
  }

  // The tokens of the tile that this block writes: the first, and the one behind the last.
  static __device__ __forceinline__ uint2 tokens_of(const GemmW8A8Sm90Args& args, uint32_t rank, uint32_t splits) {
    const uint32_t part = (TOKENS + splits - 1) / splits, begin = rank * part;
    return make_uint2(begin, min(min(static_cast<uint32_t>(TOKENS), begin + part), args.y.m - blockIdx.y * TOKENS));
  }

  // Adds what the blocks of the cluster have of this block's tokens of the tile, and writes it out.
  static __device__ __forceinline__ void reduce(const GemmW8A8Sm90Args& args, uint32_t base, const Columns8& columns,
                                                uint32_t col, uint32_t rank, uint32_t splits, Outliers& outliers) {
    const LinearWriter writer(args.y);
    const bool plain = !OUTLIERS && is_plain(args.y);
    const uint32_t first_row = blockIdx.y * TOKENS;
    const uint2 tokens = tokens_of(args, rank, splits);
    const uint32_t begin = tokens.x, end = tokens.y;
    for (uint32_t token = begin + threadIdx.x / THREADS_PER_TOKEN; token < end && col < args.y.n; token += PASS_TOKENS) {
      const uint32_t row = first_row + token, place = token * PITCH + threadIdx.x % THREADS_PER_TOKEN * 8;
      const uint32_t address = base + LOWBIT_RING_HEAD_BYTES + place * 4;
      const float x_scale = args.x_scales[row];
      const int32_t x_zero_point = zero_of_row(args, row);
      int32_t sums[8] = {};
      add_cluster8(address, splits, sums);
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = columns.scaled(i, sums[i], x_zero_point, x_scale);
      if (plain) {
        store_plain8(writer, args.y, row, col, y);
        continue;
      }
      // Back to where the sums were: of these tokens no other block reads this block's.
      float* to = reinterpret_cast<float*>(shared_sums()) + place;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        to[i] = args.y.mode == LOWBIT_OUT_FIXED ? __int_as_float(sums[i] - x_zero_point * columns.w_sums[i]) : y[i];
      }
    }
    if (plain) return;
    if constexpr (OUTLIERS) return add_outliers(args, tokens, col, outliers);
    named_barrier(1, 128 * ROW_BLOCKS);
    const auto row_of = [&](uint32_t token) { return token >= begin && token < end ? first_row + token : args.y.m; };
    finish_tile<128 * ROW_BLOCKS, TOKENS, ROWS>(FusedWriter(args.y, args.x_scales), args.y,
                                            reinterpret_cast<const float*>(shared_sums()), PITCH, threadIdx.x,
                                            blockIdx.x / splits * ROWS, row_of);
  }

  // The token of row `row` of this warp's outliers: the warp's of the first pass of `reduce`, then those of the next.
  static __device__ __forceinline__ uint32_t token_of(uint32_t begin, uint32_t row) {
    return begin + row / WARP_TOKENS * PASS_TOKENS + threadIdx.x / 32 * WARP_TOKENS + row % WARP_TOKENS;
  }

  // Adds the products of outliers to what `reduce` has left in shared memory, each thread to its own, and writes it out.
  static __device__ __forceinline__ void add_outliers(const GemmW8A8Sm90Args& args, uint2 tokens, uint32_t col,
                                                      Outliers& outliers) {
    const uint32_t column = threadIdx.x % THREADS_PER_TOKEN * 8, row = threadIdx.x % 32 / THREADS_PER_TOKEN;
    const float* left = reinterpret_cast<const float*>(shared_sums()) + column;
    float y[PASSES][8];
#pragma unroll
    for (uint32_t i = 0; i < PASSES; ++i) {
      load8(left + min(token_of(tokens.x, i * WARP_TOKENS + row), TOKENS - 1u) * PITCH, y[i]);
    }
    outliers.each([&](const float* x, const float* w) {
      float weights[8];
      load8(w + column, weights);
#pragma unroll
      for (uint32_t i = 0; i < PASSES; ++i) {
        const float value = x[i * WARP_TOKENS + row];
        if (value == 0.0f) continue;
#pragma unroll
        for (int c = 0; c < 8; ++c) y[i][c] = __fmaf_rn(value, weights[c], y[i][c]);
      }
    });
    const LinearWriter writer(args.y);
#pragma unroll
    for (uint32_t i = 0; i < PASSES; ++i) {
      const uint32_t token = token_of(tokens.x, i * WARP_TOKENS + row);
      if (token < tokens.y && col < args.y.n) store_plain8(writer, args.y, blockIdx.y * TOKENS + token, col, y[i]);
    }
  }

  // The row of x that this lane has among its warp's outliers, or m.
  static __device__ __forceinline__ uint32_t outlier_row(const GemmW8A8Sm90Args& args, uint2 tokens) {
    const uint32_t token = token_of(tokens.x, threadIdx.x % 32);
    return token < tokens.y ? blockIdx.y * TOKENS + token : args.y.m;
  }

  static __device__ __forceinline__ void run(const GemmW8A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint32_t splits = cluster_size(), rank = cluster_rank(), tile = blockIdx.x / splits;
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t begin = slices * rank / splits, end = slices * (rank + 1) / splits;
    const bool consumer = threadIdx.x < 128 * ROW_BLOCKS;
    const Producer producer(args, base, tile);
    if (!consumer) {
      if (elect_lane()) {
        Ring::init(base, 1, ROW_BLOCKS);
        producer.begin(begin, end);
      }
      __syncwarp();
    }
    __syncthreads();
    launch_dependents();
    const uint32_t col = tile * ROWS + threadIdx.x % THREADS_PER_TOKEN * 8;
    const Columns8 columns(args, col < args.y.n ? col : 0);
    Outliers outliers(args, outlier_row(args, tokens_of(args, rank, splits)), tile * ROWS,
                      shared + Ring::BYTES + threadIdx.x / 32 * Outliers::BYTES);
    if (consumer) {
      if constexpr (OUTLIERS) {
        wait_for_dependencies();
        outliers.begin();
      }
      consume(args, base, begin, end);
      wait_for_dependencies();
    } else if (elect_lane()) {
      producer.run(begin, end);
    }
    if (splits == 1) {
      if (!consumer) return;
      named_barrier(1, 128 * ROW_BLOCKS);
      reduce(args, base, columns, col, rank, splits, outliers);
      return;
    }
    __syncwarp();
    cluster_sync();
    if (consumer) reduce(args, base, columns, col, rank, splits, outliers);
    __syncwarp();
    cluster_sync();  // no block leaves while another reads its sums
  }
};
