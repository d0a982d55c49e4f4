// W4A8 and W2A8 of rows that are one group on sm_90a, where tiles are few: tiles of 64 ROW_BLOCKS rows of w by TOKENS rows of x,
// k split over a cluster.
//
// Blocks:   a cluster of `splits` for each tile, each block with its own part of k. They exchange their exact sums through
//           distributed shared memory, each adding up those of some tokens.
// Threads:  ROW_BLOCKS * WARPGROUPS_K warpgroups of 64 x TOKENS sums each, of which WARPGROUPS_K take stages of the
//           same rows in turn: one alone is slower than its weights come. Then two warps of which a lane each feeds the ring
//           by TMA, with w and with x.
// Shared:   a ring of stages of 128 columns, a multiple of WARPGROUPS_K so that a stage is always the same warpgroup's: the
//           parity of a barrier tells one round from the next only. In the end sums take its place.
// Numerics: sums are exact in int32, in any order.
// Overlap:  weights of the first stages are asked for while the kernel that makes x still runs.
#pragma once

#include "gemm_w4a8/sm90_epilogue.cuh"
#include "gemm_w4a8/sm90_mainloop.cuh"

// Codes: Signed4Row, Signed2 or Factored4.
template <class Codes, int TOKENS, int ROW_BLOCKS, int WARPGROUPS_K>
struct GemmW4A8SplitK {
  static constexpr uint32_t CONSUMERS = 128 * ROW_BLOCKS * WARPGROUPS_K, THREADS = CONSUMERS + 64;
  static constexpr uint32_t ROWS = 64 * ROW_BLOCKS, X_BYTES = TOKENS * 128;
  static constexpr uint32_t PITCH = ROWS + GEMM_W4A8_SM90_SUM_PADDING;  // words between tokens of the sums: no bank conflicts
  static constexpr uint32_t WORDS = TOKENS * PITCH;  // of the sums of each of WARPGROUPS_K
  static constexpr uint32_t THREADS_PER_TOKEN = ROWS / 8;
  static constexpr int UNIT = TOKENS < 128 ? 2 : 1;

  // What this block of the cluster has: blocks of k of a tile of w.
  struct Work {
    uint32_t splits, rank, tile, begin, end;
    __device__ __forceinline__ explicit Work(uint32_t k_blocks)
        : splits(cluster_size()),
          rank(cluster_rank()),
          tile(blockIdx.x / splits),
          begin(k_blocks * rank / splits),
          end(k_blocks * (rank + 1) / splits) {}
  };

  static __device__ __forceinline__ void produce_w(const GemmW4A8Sm90Args& args, const Work& work, BlockRing ring) {
    const uint32_t row_block = work.tile * ROW_BLOCKS, blocks = min(static_cast<uint32_t>(ROW_BLOCKS), args.row_blocks - row_block);
    const size_t row_bytes = static_cast<size_t>(args.k_blocks) * args.block_bytes;
    const uint8_t* w = args.w + row_block * row_bytes + static_cast<size_t>(work.begin) * args.block_bytes;
    for (uint32_t k_block = work.begin; k_block < work.end; ++k_block, ring.advance(), w += args.block_bytes) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), blocks * args.block_bytes);
      for (uint32_t i = 0; i < blocks; ++i) {
        copy_bulk(ring.base + ring.offset() + X_BYTES + i * args.block_bytes, w + i * row_bytes, args.block_bytes, ring.full(),
                  L2_EVICT_FIRST);
      }
    }
  }
  static __device__ __forceinline__ void produce_x(const GemmW4A8Sm90Args& args, const Work& work, BlockRing ring) {
    prefetch_map(args.x);
    wait_for_dependencies();
    for (uint32_t k_block = work.begin; k_block < work.end; ++k_block, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), X_BYTES);
      copy_box(ring.base + ring.offset(), args.x, k_block * 128, blockIdx.y * TOKENS, ring.full(), L2_EVICT_LAST);
    }
  }

  // Leaves the sums of this block in place of the ring.
  static __device__ __forceinline__ void consume(const GemmW4A8Sm90Args& args, const Work& work, BlockRing ring, uint8_t* shared) {
    const uint32_t row_block = threadIdx.x / 128 / WARPGROUPS_K, warpgroup_k = threadIdx.x / 128 % WARPGROUPS_K;
    const uint32_t stages = work.end - work.begin;
    const bool zeros = has_zeros(args);
    int32_t sums[TOKENS / 2];
    int2 w_sums = make_int2(0, 0);
    if (args.x_unsigned) {
      multiply_stages<Codes, uint8_t, TOKENS, UNIT>(args, ring, shared, row_block, warpgroup_k, WARPGROUPS_K, stages, zeros, sums,
                                                    w_sums);
    } else {
      multiply_stages<Codes, int8_t, TOKENS, UNIT>(args, ring, shared, row_block, warpgroup_k, WARPGROUPS_K, stages, zeros, sums,
                                                   w_sums);
    }
    wait_for_dependencies();  // for scales and zero points of x
    const bool any = warpgroup_k < stages;
    named_barrier(1, CONSUMERS);  // all have read the ring
    const uint32_t row = row_block * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2;
    int32_t* out = reinterpret_cast<int32_t*>(shared + BlockRing::HEAD_BYTES) + warpgroup_k * WORDS;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t token = 8 * j + first + i, x_row = blockIdx.y * TOKENS + token;
        const int32_t zero = zeros && x_row < args.y.m ? zero_of_row(args, x_row) : 0;
        out[token * PITCH + row] = any ? sums[4 * j + i] - zero * w_sums.x >> Codes::SUM_SHIFT : 0;
        out[token * PITCH + row + 8] = any ? sums[4 * j + i + 2] - zero * w_sums.y >> Codes::SUM_SHIFT : 0;
      }
    }
  }

  // Adds what the blocks of the cluster have of this block's tokens of the tile, and writes it out.
  static __device__ __forceinline__ void reduce(const GemmW4A8Sm90Args& args, const Work& work, uint8_t* shared) {
    const LinearWriter writer(args.y);
    const bool plain = is_plain(args.y);
    const uint32_t first_row = blockIdx.y * TOKENS, rows = min(static_cast<uint32_t>(TOKENS), args.y.m - first_row);
    const uint32_t begin = rows * work.rank / work.splits, end = rows * (work.rank + 1) / work.splits;
    const uint32_t column = threadIdx.x % THREADS_PER_TOKEN * 8, col = work.tile * ROWS + column;
    float w_scales[8] = {};
    if (col < args.y.n) load8(args.w_scales + col, w_scales);
    constexpr uint32_t TOGETHER = CONSUMERS / THREADS_PER_TOKEN;  // tokens
    for (uint32_t token = begin + threadIdx.x / THREADS_PER_TOKEN; token < end && col < args.y.n; token += TOGETHER) {
      const uint32_t place = BlockRing::HEAD_BYTES + (token * PITCH + column) * 4;
      const float x_scale = args.x_scales[first_row + token];
      int32_t sums[8] = {};
#pragma unroll
      for (uint32_t i = 0; i < WARPGROUPS_K; ++i) add_cluster8(shared_address(shared) + place + i * WORDS * 4, work.splits, sums);
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = dequantize_w8a8(sums[i], 0, x_scale, w_scales[i]);
      if (plain) {
        store_plain8(writer, args.y, first_row + token, col, y);
        continue;
      }
      // Back to where the sums were: of these tokens no other block reads this block's.
      float* to = reinterpret_cast<float*>(shared + place);
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = args.y.mode == LOWBIT_OUT_FIXED ? __int_as_float(sums[i]) : y[i];
    }
    if (plain) return;
    named_barrier(1, CONSUMERS);
    const auto row_of = [&](uint32_t token) { return token >= begin && token < end ? first_row + token : args.y.m; };
    finish_tile<CONSUMERS, TOKENS, ROWS>(FusedWriter(args.y, args.x_scales), args.y,
                                         reinterpret_cast<const float*>(shared + BlockRing::HEAD_BYTES), PITCH, threadIdx.x,
                                         work.tile * ROWS, row_of);
  }

  static __device__ __forceinline__ void run(const GemmW4A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const BlockRing ring(args.stages, args.stage_bytes, shared_address(shared));
    const Work work(args.k_blocks);
    if (threadIdx.x == CONSUMERS) ring.init(2, 4 * ROW_BLOCKS);
    __syncthreads();
    launch_dependents();
    const bool consumer = threadIdx.x < CONSUMERS;
    if (consumer) {
      consume(args, work, ring, shared);
    } else if (elect_lane()) {
      if (threadIdx.x / 32 == CONSUMERS / 32) {
        produce_w(args, work, ring);
      } else {
        produce_x(args, work, ring);
      }
    }
    __syncwarp();
    cluster_sync();
    if (consumer) reduce(args, work, shared);
    __syncwarp();
    cluster_sync();  // no block leaves while another reads its sums
  }
};
