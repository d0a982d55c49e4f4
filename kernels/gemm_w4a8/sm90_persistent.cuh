// W4A8 on sm_90a: tiles of 64 ROW_BLOCKS rows of w by TOKENS rows of x.
//
// Blocks:   as many as run at once, each walking over tiles.
// Threads:  ROW_BLOCKS warpgroups of 64 x TOKENS sums each, then 1 + ROW_BLOCKS warps of which a lane each feeds the ring by TMA: x,
//           and the weights of one warpgroup; where sums fill the registers they are of a warpgroup that leaves its own to
//           the others.
// Shared:   a ring of stages of 128 columns; then, for each warpgroup, room to turn its tile over.
// Numerics: a warpgroup has all of k of its outputs, so that it adds up groups in order. Products are exact in int32.
// Overlap:  warpgroups take stages each at its own pace: one makes floats of its sums beside the products of others. The
//           weights of the first stages are asked for while the kernel that makes x still runs.
#pragma once

#include "common/tile_order.cuh"
#include "gemm_w4a8/sm90_epilogue.cuh"
#include "gemm_w4a8/sm90_mainloop.cuh"

// Codes: Signed4; or Signed4Row, Signed2 and Factored4, of rows that are one group. X: int8_t or uint8_t.
template <class Codes, typename X, int TOKENS, int ROW_BLOCKS>
struct GemmW4A8Persistent {
  static constexpr bool LARGE = TOKENS >= 128;
  static constexpr int THREADS = 128 * ROW_BLOCKS + (LARGE ? 128 : 32 * (1 + ROW_BLOCKS));
  static_assert(!LARGE || ROW_BLOCKS <= 3, "a warpgroup feeds the ring");
  // Of a thread of a large tile: what the producer's warpgroup gives up, the others take.
  static constexpr int PRODUCER_REGISTERS = ROW_BLOCKS == 2 ? 40 : 32, CONSUMER_REGISTERS = ROW_BLOCKS == 2 ? 232 : 160;
  static constexpr uint32_t ROWS = 64 * ROW_BLOCKS, X_BYTES = TOKENS * 128;
  using Tile = TokenTile<TOKENS>;
  using Tiles = BandedTiles<ROWS, TOKENS, 2048 / TOKENS>;

  // What feeds the ring, a lane of each of its warps: the first copies x,
  static __device__ __forceinline__ void produce_x(const GemmW4A8Sm90Args& args, BlockRing ring) {
    const Tiles tiles(args.y.m, args.y.n);
    prefetch_map(args.x);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      const uint32_t token = tiles.at(index).x * TOKENS;
      for (uint32_t k_block = 0; k_block < args.k_blocks; ++k_block, ring.advance()) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        barrier_expect(ring.full(), X_BYTES);
        copy_box(ring.base + ring.offset(), args.x, k_block * 128, token, ring.full(), L2_EVICT_NORMAL);
      }
    }
  }
  // the others the weights of one warpgroup each, which no kernel before this one makes.
  static __device__ __forceinline__ void produce_w(const GemmW4A8Sm90Args& args, BlockRing ring, uint32_t group) {
    const Tiles tiles(args.y.m, args.y.n);
    const uint64_t policy = args.y.m <= TOKENS ? L2_EVICT_FIRST : L2_EVICT_NORMAL;
    const uint32_t to = ring.base + X_BYTES + group * args.block_bytes;
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      const uint32_t row_block = tiles.at(index).y * ROW_BLOCKS + group;
      const uint8_t* w = args.w + static_cast<size_t>(row_block) * args.k_blocks * args.block_bytes;
      for (uint32_t k_block = 0; k_block < args.k_blocks; ++k_block, ring.advance(), w += args.block_bytes) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        if (row_block < args.row_blocks) {
          barrier_expect(ring.full(), args.block_bytes);
          copy_bulk(to + ring.offset(), w, args.block_bytes, ring.full(), policy);
        } else {
          barrier_arrive(ring.full());
        }
      }
    }
  }

  // Products of STEPS times 32 columns of a block, from 32 `first` on, onto `sums` or in their place. With ZEROS adds to
  // `w_sums` those of the thread's rows.
  template <int STEPS, bool ZEROS>
  static __device__ __forceinline__ void multiply(const WeightBlock<Codes>& block, uint64_t x, uint32_t first, bool onto,
                                                  int32_t (&sums)[TOKENS / 2], int2& w_sums) {
    uint32_t a[STEPS][4];
    block.load(first, a);
    if (ZEROS) add_rows(a, w_sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      // Three warpgroups have no registers for the shorter way.
      const uint64_t at = ROW_BLOCKS == 3 ? x + 2 * (first + i) : matrix_at(x, 2 * (first + i));
      Wgmma8Bit<int8_t, X, TOKENS>::run(sums, a[i], at, onto || i != 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  // Sums over groups in ascending order, which are of whole blocks where GROUPS_PER_BLOCK is 1. ZEROS: rows of x have zero
  // points.
  template <int GROUPS_PER_BLOCK, bool ZEROS>
  static __device__ __forceinline__ void accumulate(const GemmW4A8Sm90Args& args, const Tile& tile, BlockRing& ring,
                                                    const uint8_t* shared, float (&acc)[TOKENS / 2]) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.0f;
    int32_t sums[TOKENS / 2];
    for (uint32_t begin = 0; begin < args.k_blocks;) {
      const uint32_t end = GROUPS_PER_BLOCK == 1 ? min(begin + args.group_blocks, args.k_blocks) : begin + 1;
      float2 scale = make_float2(SUM_UNIT<Codes>, SUM_UNIT<Codes>);  // where there is one group
      int2 w_sums = make_int2(0, 0);
      const auto flush = [&] {
        if (ZEROS) tile.correct(sums, w_sums);
        if (GROUPS_PER_BLOCK == 1 && args.y.mode == LOWBIT_OUT_FIXED) {
#pragma unroll
          for (int i = 0; i < TOKENS / 2; ++i) acc[i] = __int_as_float(sums[i] >> Codes::SUM_SHIFT);
          return;
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
          acc[i] = __fmaf_rn(__int2float_rn(sums[i]), i % 4 < 2 ? scale.x : scale.y, acc[i]);
          asm volatile("" : "+f"(acc[i]));  // done before the next product: else sums are kept in registers beyond it
        }
      };
      for (uint32_t k_block = begin; k_block < end; ++k_block, ring.advance()) {
        barrier_wait(ring.full(), ring.parity);
        const WeightBlock<Codes> block(shared + ring.offset() + X_BYTES + threadIdx.x / 128 * args.block_bytes);
        const uint64_t x = matrix_descriptor(ring.base + ring.offset());
#pragma unroll 1
        for (uint32_t group = 0; group < GROUPS_PER_BLOCK; ++group) {
          if (args.w_scales == nullptr) scale = block.scale(group);
          if (GROUPS_PER_BLOCK != 1) w_sums = make_int2(0, 0);
          const bool onto = GROUPS_PER_BLOCK == 1 && k_block != begin;
          multiply<4 / GROUPS_PER_BLOCK, ZEROS>(block, x, group * 4 / GROUPS_PER_BLOCK, onto, sums, w_sums);
          if (group == GROUPS_PER_BLOCK - 1 && threadIdx.x % 32 == 0) barrier_arrive(ring.empty());
          if (GROUPS_PER_BLOCK != 1) flush();
        }
      }
      if (GROUPS_PER_BLOCK == 1) flush();
      begin = end;
    }
  }
  // The same where rows are one group.
  template <bool ZEROS>
  static __device__ __forceinline__ void accumulate_one_group(const GemmW4A8Sm90Args& args, const Tile& tile, BlockRing& ring,
                                                              const uint8_t* shared, float (&acc)[TOKENS / 2]) {
    // The first product ignores them, but the compiler takes what it has not seen written for alive since the tile before.
    int32_t sums[TOKENS / 2] = {};
    int2 w_sums = make_int2(0, 0);
    multiply_stages<Codes, X, TOKENS, 1>(args, ring, shared, threadIdx.x / 128, 0, 1, args.k_blocks, ZEROS, sums, w_sums);
    if (ZEROS) tile.correct(sums, w_sums);
    const bool exact = args.y.mode == LOWBIT_OUT_FIXED;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
      acc[i] = exact ? __int_as_float(sums[i] >> Codes::SUM_SHIFT) : __fmul_rn(__int2float_rn(sums[i]), SUM_UNIT<Codes>);
    }
  }
  template <bool ZEROS>
  static __device__ __forceinline__ void accumulate(const GemmW4A8Sm90Args& args, const Tile& tile, BlockRing& ring,
                                                    const uint8_t* shared, float (&acc)[TOKENS / 2]) {
    if constexpr (Codes::ONE_GROUP) {
      accumulate_one_group<ZEROS>(args, tile, ring, shared, acc);
    } else {
      switch (args.groups_per_block) {
        case 1: return accumulate<1, ZEROS>(args, tile, ring, shared, acc);
        case 2: return accumulate<2, ZEROS>(args, tile, ring, shared, acc);
        default: return accumulate<4, ZEROS>(args, tile, ring, shared, acc);
      }
    }
  }

  static __device__ __forceinline__ void consume(const GemmW4A8Sm90Args& args, BlockRing ring, uint8_t* shared) {
    const Tiles tiles(args.y.m, args.y.n);
    const uint32_t group = ROW_BLOCKS == 1 ? 0 : threadIdx.x / 128;
    Tile out(args, shared + ring.end() + group * Tile::BYTES, 1 + group);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      const uint2 tile = tiles.at(index);
      out.begin(tile.x * TOKENS);
      float acc[TOKENS / 2];
      if (!has_zeros(args)) {
        accumulate<false>(args, out, ring, shared, acc);
      } else {
        accumulate<true>(args, out, ring, shared, acc);
      }
      out.store((tile.y * ROW_BLOCKS + group) * 64, acc);
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const BlockRing ring(args.stages, args.stage_bytes, shared_address(shared));
    if (threadIdx.x == 0) ring.init(1 + ROW_BLOCKS, 4 * ROW_BLOCKS);
    __syncthreads();
    launch_dependents();
    if (threadIdx.x < 128 * ROW_BLOCKS) {
      if constexpr (LARGE) warpgroup_reg_alloc<CONSUMER_REGISTERS>();
      consume(args, ring, shared);
    } else {
      if constexpr (LARGE) warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
      const uint32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32 - 4 * ROW_BLOCKS, 0);
      if (warp > ROW_BLOCKS || !elect_lane()) return;
      if (warp == 0) {
        produce_x(args, ring);
      } else {
        produce_w(args, ring, warp - 1);
      }
    }
  }
};
