// W4A16 for many rows on sm_90a: tiles of 64 ROW_BLOCKS rows of w by TOKENS rows of x.
//
// Blocks:   one per multiprocessor, each walking over tiles.
// Threads:  ROW_BLOCKS warpgroups of 64 x TOKENS sums each, then one warp whose first lane feeds the ring by TMA.
// Shared:   a ring of stages of 128 columns; then a few rows of sums for each warp, to turn the tile over.
// Numerics: a weight is code minus zero point, exact, times its scale, rounded once to the activations' type.
// Overlap:  the next sixteen columns are made into floats while the tensor cores work on these; the warpgroups take stages
//           each at its own pace, so that one's epilogue runs beside the other's products.
#pragma once

#include "common/tile_order.cuh"
#include "gemm_w4a16/sm90_mainloop.cuh"

template <typename T, typename Codes, int TOKENS, int ROW_BLOCKS>
struct GemmW4A16Persistent {
  static constexpr int THREADS = 128 * (ROW_BLOCKS + 1);
  // Of a thread: what the producer's warpgroup gives up, the others take.
  static constexpr int PRODUCER_REGISTERS = ROW_BLOCKS == 2 ? 40 : 32, CONSUMER_REGISTERS = ROW_BLOCKS == 2 ? 232 : 112;
  static constexpr uint32_t ROWS = 64 * ROW_BLOCKS;
  using Tiles = BandedTiles<ROWS, TOKENS, 1024 / TOKENS>;
  using Ring = W4A16Ring<TOKENS, ROW_BLOCKS>;

  static __device__ __forceinline__ void produce(const GemmW4A16Sm90Args& args, Ring ring) {
    const Tiles tiles(args.y.m, args.y.n);
    const size_t row_bytes = static_cast<size_t>(args.k_blocks) * args.block_bytes;
    prefetch_map(args.x);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      const uint2 tile = tiles.at(index);
      const uint32_t blocks = min(static_cast<uint32_t>(ROW_BLOCKS), args.row_blocks - tile.y * ROW_BLOCKS);
      const uint8_t* w = args.w + tile.y * ROW_BLOCKS * row_bytes;
      for (uint32_t k_block = 0; k_block < args.k_blocks; ++k_block, ring.advance()) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        barrier_expect(ring.full(), blocks * args.block_bytes + 2 * Ring::BOX_BYTES);
        for (uint32_t i = 0; i < blocks; ++i) {
          copy_bulk(ring.w() + i * args.block_bytes,
                    w + i * row_bytes + static_cast<size_t>(k_block) * args.block_bytes, args.block_bytes, ring.full(),
                    L2_EVICT_NORMAL);
        }
        copy_box(ring.x(), args.x, k_block * 256, tile.x * TOKENS, ring.full(), L2_EVICT_NORMAL);
        copy_box(ring.x() + Ring::BOX_BYTES, args.x, k_block * 256 + 128, tile.x * TOKENS, ring.full(), L2_EVICT_NORMAL);
      }
    }
  }

  // The sums of a tile.
  template <typename Way>
  static __device__ __forceinline__ void accumulate(Way, const GemmW4A16Sm90Args& args, Ring& ring,
                                                    float (&acc)[TOKENS / 2]) {
    const uint32_t warpgroup = threadIdx.x / 128;
    uint32_t a[2][4];
    uint32_t previous = 0;
    for (uint32_t k_block = 0; k_block < args.k_blocks; ++k_block, ring.advance()) {
      const WeightBlock<T, Codes> block(ring.w() + warpgroup * args.block_bytes);
      const uint64_t x = matrix_descriptor(ring.x());
      barrier_wait(ring.full(), ring.parity);
      multiply_stage<Way, T, Codes, TOKENS>(args, block, x, k_block != 0, a, acc, [&] {
        if (k_block != 0 && threadIdx.x % 32 == 0) barrier_arrive(previous);
      });
      previous = ring.empty();
    }
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(previous);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) acc[i] *= Way::rest;
  }

  template <bool GATED>
  static __device__ __forceinline__ void write(const LinearWriter& writer, uint32_t m, float* transpose, uint2 tile,
                                               const float (&acc)[TOKENS / 2]) {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
      const uint32_t token = tile.x * TOKENS + j * 8;
      if (token >= m) break;
      float sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = acc[4 * j + i];
      write_16x8<GATED>(writer, transpose, token, tile.y * ROWS + threadIdx.x / 32 * 16, sums);
    }
  }

  static __device__ __forceinline__ void consume(const GemmW4A16Sm90Args& args, Ring ring, uint8_t* shared) {
    const Tiles tiles(args.y.m, args.y.n);
    const uint32_t warp = threadIdx.x / 32;
    float* transpose = reinterpret_cast<float*>(shared + ring.end() + warp * TRANSPOSE_BYTES);
    const LinearWriter writer(args.y);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      float acc[TOKENS / 2];
      by_scaling<T, Codes, ROW_BLOCKS == 2>(args, [&](auto way) { accumulate(way, args, ring, acc); });
      const uint2 tile = tiles.at(index);
      // Asked once: in the loop the question costs a tenth of a tile.
      if (writer.is_gated()) {
        write<true>(writer, args.y.m, transpose, tile, acc);
      } else {
        write<false>(writer, args.y.m, transpose, tile, acc);
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A16Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const Ring ring(shared_address(shared), args.block_bytes, 4 * ROW_BLOCKS * TRANSPOSE_BYTES);
    if (threadIdx.x == 0) ring.init(1, 4 * ROW_BLOCKS);
    __syncthreads();
    launch_dependents();
    if (threadIdx.x < 128 * ROW_BLOCKS) {
      warpgroup_reg_alloc<CONSUMER_REGISTERS>();
      consume(args, ring, shared);
    } else {
      warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
      if (threadIdx.x < 128 * ROW_BLOCKS + 32 && elect_lane()) produce(args, ring);
    }
  }
};
