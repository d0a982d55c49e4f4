// W4A16 for few rows on sm_90a: rows of w by TOKENS rows of x, k split over a cluster.
//
// Blocks:   a cluster for each tile of 64 GROUPS rows of w and TOKENS rows of x, each block with its own part of k. They
//           send each other their f32 sums through distributed shared memory, and add them up in the order of their ranks.
// Threads:  each warp has 16 rows in SHARE of the GROUPS blocks of w. Up to 16 tokens it multiplies by mma.sync, which on
//           so few columns is faster than wgmma and lets each warp go at its own pace; above by wgmma. The first thread
//           also feeds the copy engine: a warp of its own would cost the registers of four.
// Numerics: operands are code minus zero point, exact; each group's sum is scaled in f32.
// Overlap:  weights are asked for before the kernel that makes x is through (programmatic dependent launch).
#pragma once

#include "common/mma.cuh"
#include "common/wgmma.cuh"
#include "gemm_w4a16/sm90_block.cuh"

template <typename T, int BITS, int TOKENS, int GROUPS, int SHARE, bool WGMMA = (TOKENS >= 32)>
struct GemmW4A16Few {
  static constexpr int THREADS = 128 * GROUPS / SHARE;
  static constexpr int EIGHTS = TOKENS / 8;
  static constexpr bool BY_WARPGROUP = WGMMA;
  static constexpr uint32_t ROWS = 64 * GROUPS;
  static constexpr uint32_t WARPS = THREADS / 32, SIXTEENS = 4 * GROUPS;
  static constexpr uint32_t SUM_BYTES = 16 * TOKENS * 4;  // of sixteen rows
  using Ring = W4A16Ring<TOKENS, GROUPS>;
  // Of each sixteen rows this warp has, by eight tokens, as products leave them.
  using Sums = float[SHARE][EIGHTS][4];

  // Number of a warp's sixteen rows among those of the tile.
  static __device__ __forceinline__ uint32_t sixteen(int share) {
    const uint32_t warp = threadIdx.x / 32;
    return (warp / 4 * SHARE + share) * 4 + warp % 4;
  }

  // Feeds the ring: what one thread does.
  struct Producer {
    const GemmW4A16Sm90Args& args;
    const uint8_t* w;
    uint32_t blocks;
    uint64_t policy;

    __device__ __forceinline__ Producer(const GemmW4A16Sm90Args& args, uint32_t tile)
        : args(args),
          w(args.w + static_cast<size_t>(tile) * GROUPS * args.k_blocks * args.block_bytes),
          blocks(min(static_cast<uint32_t>(GROUPS), args.row_blocks - tile * GROUPS)),
          policy(gridDim.y == 1 ? L2_EVICT_FIRST : L2_EVICT_NORMAL) {}

    __device__ __forceinline__ void copy_w(const Ring& at, uint32_t k_block) const {
      barrier_expect(at.full(), blocks * args.block_bytes + 2 * Ring::BOX_BYTES);
      for (uint32_t i = 0; i < blocks; ++i) {
        copy_bulk(at.base + at.w_offset() + i * args.block_bytes,
                  w + (static_cast<size_t>(i) * args.k_blocks + k_block) * args.block_bytes, args.block_bytes, at.full(),
                  policy);
      }
    }
    __device__ __forceinline__ void copy_x(const Ring& at, uint32_t k_block) const {
      const uint32_t token = blockIdx.y * TOKENS;
      copy_box(at.x(), args.x, k_block * 256, token, at.full(), L2_EVICT_LAST);
      copy_box(at.x() + Ring::BOX_BYTES, args.x, k_block * 256 + 128, token, at.full(), L2_EVICT_LAST);
    }
    // The first stages, of which the weights do not wait for the kernels before.
    __device__ __forceinline__ void fill(Ring ring, uint32_t begin, uint32_t end) const {
      prefetch_map(args.x);
      const Ring first = ring;
      end = min(end, begin + ring.stages);
      for (uint32_t i = begin; i < end; ++i, ring.advance()) copy_w(ring, i);
      wait_for_dependencies();
      ring = first;
      for (uint32_t i = begin; i < end; ++i, ring.advance()) copy_x(ring, i);
    }
    // The slot of `k_block` again, once all have left it.
    __device__ __forceinline__ void refill(const Ring& at, uint32_t k_block) const {
      barrier_wait(at.empty(), at.parity);
      if (elect_lane()) {
        copy_w(at, k_block + at.stages);
        copy_x(at, k_block + at.stages);
      }
      __syncwarp();
    }
  };

  // One stage by mma.sync: products of FLUSH parts of 32 columns (4 where a block of w is in one group, else 1), then
  // their scales.
  template <int FLUSH>
  static __device__ __forceinline__ void multiply_by_warp(const GemmW4A16Sm90Args& args, const Ring& at,
                                                          const uint8_t* shared, Sums& acc) {
    const uint32_t lane = threadIdx.x % 32, row = lane % 8;
    const uint32_t x = at.x() + row * 128 + ((lane / 8 ^ row) << 4);
    const uint8_t* w = shared + at.w_offset() + threadIdx.x / 128 * SHARE * args.block_bytes;
    CodeTile<T, BITS> codes[SHARE][4];
#pragma unroll
    for (int r = 0; r < SHARE; ++r) WeightBlock<T, BITS>(w + r * args.block_bytes).load(codes[r]);
#pragma unroll
    for (int first = 0; first < 4; first += FLUSH) {
      GroupParameters parameters[SHARE];
#pragma unroll
      for (int r = 0; r < SHARE; ++r) {
        parameters[r] = WeightBlock<T, BITS>(w + r * args.block_bytes).group(args, FLUSH == 4 ? 0 : first * args.groups / 4);
      }
      Sums sums = {};
#pragma unroll
      for (int j = first; j < first + FLUSH; ++j) {
        uint32_t b[EIGHTS][4];
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) load_matrix_x4(b[i], (x ^ j % 2 * 64) + j / 2 * Ring::BOX_BYTES + i * 1024);
#pragma unroll
        for (int r = 0; r < SHARE; ++r) {
          uint32_t a[2][4];
          const Fragments<T, BITS> fragments(parameters[r]);
          fragments.template make<0>(codes[r][j], a[0]);
          fragments.template make<1>(codes[r][j], a[1]);
#pragma unroll
          for (int i = 0; i < EIGHTS; ++i) {
            mma_16bit<T>(sums[r][i], a[0], b[i][0], b[i][1]);
            mma_16bit<T>(sums[r][i], a[1], b[i][2], b[i][3]);
          }
        }
      }
      add_scaled(acc, sums, parameters);
    }
  }

  // The same by wgmma.
  template <int FLUSH>
  static __device__ __forceinline__ void multiply_by_warpgroup(const GemmW4A16Sm90Args& args, const Ring& at,
                                                               const uint8_t* shared, Sums& acc) {
    static_assert(SHARE == 1, "a warpgroup has 64 rows");
    const WeightBlock<T, BITS> block(shared + at.w_offset() + threadIdx.x / 128 * args.block_bytes);
    const uint64_t x = matrix_descriptor(at.x()), x64 = matrix_descriptor(at.x() + Ring::BOX_BYTES);
    CodeTile<T, BITS> codes[4];
    block.load(codes);
#pragma unroll
    for (int first = 0; first < 4; first += FLUSH) {
      const GroupParameters parameters[1] = {block.group(args, FLUSH == 4 ? 0 : first * args.groups / 4)};
      const Fragments<T, BITS> fragments(parameters[0]);
      uint32_t a[2 * FLUSH][4];
#pragma unroll
      for (int i = 0; i < FLUSH; ++i) {
        fragments.template make<0>(codes[first + i], a[2 * i]);
        fragments.template make<1>(codes[first + i], a[2 * i + 1]);
      }
      Sums sums;
      products_fence();
#pragma unroll
      for (int i = 0; i < 2 * FLUSH; ++i) {
        const int step = 2 * first + i;
        Product16Bit<T, TOKENS>::run(reinterpret_cast<float(&)[TOKENS / 2]>(sums), a[i], (step < 4 ? x : x64) + step % 4 * 2,
                                     i != 0);
      }
      products_commit();
      products_wait<0>();
      add_scaled(acc, sums, parameters);
    }
  }

  static __device__ __forceinline__ void add_scaled(Sums& acc, const Sums& sums,
                                                    const GroupParameters (&parameters)[SHARE]) {
#pragma unroll
    for (int r = 0; r < SHARE; ++r) {
      const float2 scale = parameters[r].template scale<T>(Fragments<T, BITS>::UNIT);
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        acc[r][i][0] = fmaf(sums[r][i][0], scale.x, acc[r][i][0]);
        acc[r][i][1] = fmaf(sums[r][i][1], scale.x, acc[r][i][1]);
        acc[r][i][2] = fmaf(sums[r][i][2], scale.y, acc[r][i][2]);
        acc[r][i][3] = fmaf(sums[r][i][3], scale.y, acc[r][i][3]);
      }
    }
  }

  // The sums of this block's part of k.
  template <int FLUSH>
  static __device__ __forceinline__ void accumulate(const Producer& producer, Ring ring, const uint8_t* shared,
                                                    uint32_t begin, uint32_t end, Sums& acc) {
    const uint32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    Ring previous = ring;
    for (uint32_t k_block = begin; k_block < end; ++k_block, ring.advance()) {
      barrier_wait(ring.full(), ring.parity);
      if constexpr (BY_WARPGROUP) {
        multiply_by_warpgroup<FLUSH>(producer.args, ring, shared, acc);
      } else {
        multiply_by_warp<FLUSH>(producer.args, ring, shared, acc);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty());
      // One stage late, so that the others have most likely left it.
      if (k_block != begin && k_block - 1 + ring.stages < end && (k_block - begin) % WARPS == warp) {
        producer.refill(previous, k_block - 1);
      }
      previous = ring;
    }
  }

  // A warp's sums, to where the block that adds them up expects those of block `rank`: the blocks take turns in the
  // warps' sixteen rows.
  static __device__ __forceinline__ void send(uint32_t exchange, uint32_t rank, uint32_t splits, const Sums& acc) {
#pragma unroll
    for (int r = 0; r < SHARE; ++r) {
      const uint32_t to = exchange + (sixteen(r) / splits * splits + rank) * SUM_BYTES + threadIdx.x % 32 * 16;
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        const float4 v = make_float4(acc[r][i][0], acc[r][i][1], acc[r][i][2], acc[r][i][3]);
        store_cluster_shared16(to + i * 512, sixteen(r) % splits, v);
      }
    }
  }

  // Adds up the sums of this block's sixteens of rows, and writes them out.
  static __device__ __forceinline__ void reduce(const LinearWriter& writer, const uint8_t* exchange, float* turn,
                                                uint32_t tokens, uint32_t tile, uint32_t rank, uint32_t splits) {
    const uint32_t sixteens = (SIXTEENS - rank + splits - 1) / splits, eights = (tokens + 7) / 8;
    for (uint32_t item = threadIdx.x / 32; item < sixteens * eights; item += WARPS) {
      const uint32_t mine = item / eights, eight = item % eights;
      const uint8_t* from = exchange + mine * splits * SUM_BYTES + eight * 512 + threadIdx.x % 32 * 16;
      float sums[4] = {};
#pragma unroll 4
      for (uint32_t i = 0; i < splits; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(from + i * SUM_BYTES);
        sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
      }
      write_16x8(writer, turn, blockIdx.y * TOKENS + eight * 8, tile * ROWS + (mine * splits + rank) * 16, sums);
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A16Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint32_t splits = cluster_size(), rank = cluster_rank(), tile = blockIdx.x / splits;
    const uint32_t begin = args.k_blocks * rank / splits, end = args.k_blocks * (rank + 1) / splits;
    // A warp's place to turn its tile over, then what the other blocks send.
    const uint32_t turns = WARPS * TURN_BYTES;
    const Ring ring(base, args.block_bytes,
                    turns + (splits == 1 ? 0 : (SIXTEENS + splits - 1) / splits * splits * SUM_BYTES));
    const Producer producer(args, tile);
    if (threadIdx.x < 32) {
      if (elect_lane()) {
        ring.init(WARPS);
        launch_dependents();
        producer.fill(ring, begin, end);
      }
      __syncwarp();
    }
    __syncthreads();
    if (splits != 1) cluster_arrive();
    Sums acc = {};
    if (args.groups == 1) {
      accumulate<4>(producer, ring, shared, begin, end, acc);
    } else {
      accumulate<1>(producer, ring, shared, begin, end, acc);
    }
    wait_for_dependencies();

    const LinearWriter writer(args.y);
    float* turn = reinterpret_cast<float*>(shared + ring.end() + threadIdx.x / 32 * TURN_BYTES);
    const uint32_t tokens = min(static_cast<uint32_t>(TOKENS), args.y.m - blockIdx.y * TOKENS);
    if (splits == 1) {
#pragma unroll
      for (int r = 0; r < SHARE; ++r) {
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
          if (i * 8 < tokens) write_16x8(writer, turn, blockIdx.y * TOKENS + i * 8, tile * ROWS + sixteen(r) * 16, acc[r][i]);
        }
      }
      return;
    }
    cluster_wait();  // the others have started
    send(base + ring.end() + turns, rank, splits, acc);
    cluster_sync();
    reduce(writer, shared + ring.end() + turns, turn, tokens, tile, rank, splits);
  }
};
