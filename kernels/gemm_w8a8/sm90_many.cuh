// W8A8 for many rows on sm_90a: tiles of 128 rows of x by BN rows of w.
//
// Blocks:   one per multiprocessor, in clusters of CLUSTER along m, each walking over tiles; the blocks of a cluster have
//           the same rows of w, of which each copies a part into all of them.
// Threads:  two warpgroups of 64 x BN sums each, then one whose first lane feeds the copy engine and which leaves its
//           registers to the others.
// Shared:   a ring of STAGES slices of 128 bytes of k: x as the engine's 128-byte swizzle leaves it, w as it is stored.
#pragma once

#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "gemm_w8a8/epilogue_sm90.cuh"

// X: int8_t or uint8_t.
template <typename X, int BN, int CLUSTER, int STAGES>
struct GemmW8A8Many {
  static constexpr int BM = 128;
  static constexpr int GROUPS = 2;  // consumer warpgroups
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr uint32_t X_BYTES = BM * 128;
  static constexpr uint32_t BLOCK_BYTES = 64 * 128;  // of w: 64 rows of a slice, contiguous in memory
  static constexpr uint32_t STAGE_BYTES = X_BYTES + BN * 128;
  static constexpr uint32_t W_BLOCKS = BN / 64;
  static constexpr uint32_t BAND = 16 / CLUSTER;  // tiles of a column that run together
  static constexpr uint32_t EPILOGUE_BYTES = TileColumns<BN>::BYTES + 4 * WarpRows::BYTES;  // of a warpgroup
  static constexpr uint32_t SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + GROUPS * EPILOGUE_BYTES;
  static_assert(W_BLOCKS % CLUSTER == 0, "the blocks of a cluster copy equal parts of w");

  struct Tiles {
    uint32_t down, across;  // clusters' tiles
    __device__ explicit Tiles(const LinearOut& y)
        : down((y.m + BM * CLUSTER - 1) / (BM * CLUSTER)), across((y.n + BN - 1) / BN) {}
    __device__ uint32_t count() const { return down * across; }
    __device__ uint2 at(uint32_t index) const {
      const uint32_t band = index / (BAND * across), height = min(BAND, down - band * BAND);
      const uint32_t inside = index - band * BAND * across;
      return make_uint2(band * BAND + inside % height, inside / height);
    }
  };

  static __device__ __forceinline__ uint32_t full(uint32_t base, uint32_t slot) { return base + 8 * slot; }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, uint32_t slot) { return base + 8 * (STAGES + slot); }
  static __device__ __forceinline__ uint32_t stage(uint32_t base, uint32_t slot) { return base + 1024 + slot * STAGE_BYTES; }

  static __device__ __forceinline__ void produce(const GemmW8A8Sm90Args& args, uint32_t base, uint32_t rank) {
    const Tiles tiles(args.y);
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t w_blocks = (args.y.n + 63) / 64;
    RingPosition<STAGES> at;
    prefetch_map(args.x);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x / CLUSTER; index < tiles.count(); index += gridDim.x / CLUSTER) {
      const uint2 tile = tiles.at(index);
      const uint32_t row = (tile.x * CLUSTER + rank) * BM;
      const uint32_t first_block = tile.y * W_BLOCKS, blocks = min(W_BLOCKS, w_blocks - first_block);
      const int8_t* w = args.w + static_cast<size_t>(first_block) * slices * BLOCK_BYTES;
      for (uint32_t slice = 0; slice < slices; ++slice) {
        const uint32_t shared = stage(base, at.slot), barrier = full(base, at.slot);
        barrier_wait(empty(base, at.slot), at.parity ^ 1);
        barrier_expect(barrier, X_BYTES + blocks * BLOCK_BYTES);
        copy_box(shared, args.x, slice * 128, row, barrier, L2_EVICT_NORMAL);
#pragma unroll
        for (uint32_t i = 0; i < W_BLOCKS / CLUSTER; ++i) {
          const uint32_t block = rank * (W_BLOCKS / CLUSTER) + i;
          if (block >= blocks) break;
          const int8_t* from = w + (static_cast<size_t>(block) * slices + slice) * BLOCK_BYTES;
          const uint32_t to = shared + X_BYTES + block * BLOCK_BYTES;
          if (CLUSTER == 1) {
            copy_bulk(to, from, BLOCK_BYTES, barrier, L2_EVICT_NORMAL);
          } else {
            copy_bulk_multicast(to, from, BLOCK_BYTES, barrier, (1 << CLUSTER) - 1, L2_EVICT_NORMAL);
          }
        }
        at.advance();
      }
    }
  }

  // This warpgroup is through with a slot.
  static __device__ __forceinline__ void release(uint32_t base, uint32_t slot) {
    const uint32_t lane = threadIdx.x % 128;
    if (CLUSTER == 1) {
      if (lane == 0) barrier_arrive(empty(base, slot));
    } else {
      if (lane < CLUSTER) barrier_arrive_in(empty(base, slot), lane);
    }
  }

  static __device__ __forceinline__ void consume(const GemmW8A8Sm90Args& args, uint32_t base, uint32_t rank) {
    const Tiles tiles(args.y);
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t group = threadIdx.x / 128;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    const uint32_t warp = threadIdx.x % 128 / 32, epilogue = 1024 + STAGES * STAGE_BYTES + group * EPILOGUE_BYTES;
    TileColumns<BN> columns(shared_memory + epilogue, 1 + group);
    const WarpRows rows(shared_memory + epilogue + TileColumns<BN>::BYTES + warp * WarpRows::BYTES);
    RingPosition<STAGES> at;
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x / CLUSTER; index < tiles.count(); index += gridDim.x / CLUSTER) {
      const uint2 tile = tiles.at(index);
      const uint32_t first = (tile.x * CLUSTER + rank) * BM + group * 64 + warp * 16, row = first + threadIdx.x % 32 / 4;
      columns.load(args, tile.y * BN);
      const float x_scale0 = row < args.y.m ? args.x_scales[row] : 0.0f;
      const float x_scale1 = row + 8 < args.y.m ? args.x_scales[row + 8] : 0.0f;
      const int32_t x_zero0 = row < args.y.m ? zero_of_row(args, row) : 0;
      const int32_t x_zero1 = row + 8 < args.y.m ? zero_of_row(args, row + 8) : 0;
      int32_t sums[BN / 2];
      uint32_t previous = 0;
      for (uint32_t slice = 0; slice < slices; ++slice) {
        const uint32_t shared = stage(base, at.slot);
        const uint64_t x = matrix_descriptor(shared + group * 64 * 128), w = matrix_descriptor(shared + X_BYTES);
        barrier_wait(full(base, at.slot), at.parity);
        products_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) Product8Bit<X, int8_t, BN>::run(sums, x + 2 * step, w + 2 * step, slice + step != 0);
        products_commit();
        products_wait<1>();
        if (slice != 0) release(base, previous);
        previous = at.slot;
        at.advance();
      }
      products_wait<0>();
      release(base, previous);
      columns.publish();
      const WarpTile<BN> out{args, columns, first, tile.y * BN, {x_scale0, x_scale1}, {x_zero0, x_zero1}};
      out.store(rows, sums);
    }
  }

  static __device__ __forceinline__ void run(const GemmW8A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint32_t rank = CLUSTER == 1 ? 0 : cluster_rank();
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < STAGES; ++slot) {
        barrier_init(full(base, slot), 1);
        barrier_init(empty(base, slot), GROUPS * CLUSTER);
      }
      barrier_init_fence();
    }
    launch_dependents();
    if (CLUSTER == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
    if (threadIdx.x < 128 * GROUPS) {
      more_registers<232>();
      consume(args, base, rank);
    } else {
      fewer_registers<40>();
      if (threadIdx.x < 128 * GROUPS + 32 && elect_lane()) produce(args, base, rank);
    }
    // No block may leave while another still arrives at its barriers or copies into it.
    if (CLUSTER > 1) {
      __syncwarp();
      cluster_sync();
    }
  }
};
