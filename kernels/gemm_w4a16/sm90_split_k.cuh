// W4A16 for few rows on sm_90a: rows of w by TOKENS rows of x, k split over a cluster.
//
// Blocks:   a cluster for each tile of 64 ROW_BLOCKS rows of w and TOKENS rows of x, each block with its own part of k. They
//           send each other their f32 sums through distributed shared memory, and add them up in the order of their ranks.
// Threads:  each warp has 16 rows in BLOCKS_PER_WARP of the ROW_BLOCKS blocks of w. Up to 16 tokens it multiplies by mma.sync,
//           which on so few columns is faster than wgmma and lets each warp go at its own pace; above by wgmma. The first
//           thread also feeds the ring by TMA: a warp of its own would cost the registers of four.
// Numerics: operands are code minus zero point, exact; each group's sum is scaled in f32.
// Overlap:  weights are asked for before the kernel that makes x is through (programmatic dependent launch).
#pragma once

#include "common/async_copy.cuh"
#include "common/wgmma.cuh"
#include "gemm_w4a16/sm90_mma.cuh"

template <typename T, typename Codes, int TOKENS, int ROW_BLOCKS, int BLOCKS_PER_WARP>
struct GemmW4A16SplitK {
  static constexpr int THREADS = 128 * ROW_BLOCKS / BLOCKS_PER_WARP;
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr bool BY_WARPGROUP = TOKENS >= 32;
  static constexpr uint32_t ROWS = 64 * ROW_BLOCKS;
  static constexpr uint32_t WARPS = THREADS / 32, ROW_TILES = 4 * ROW_BLOCKS;
  static constexpr uint32_t SUM_BYTES = 16 * TOKENS * 4;  // of sixteen rows
  using Ring = W4A16Ring<TOKENS, ROW_BLOCKS>;
  // Of each sixteen rows this warp has, by eight tokens, as products leave them.
  using Sums = float[BLOCKS_PER_WARP][TOKEN_TILES][4];

  // A warp's tile of sixteen rows in one of its blocks, among those of the block's tile.
  static __device__ __forceinline__ uint32_t row_tile(int block) {
    const uint32_t warp = threadIdx.x / 32;
    return (warp / 4 * BLOCKS_PER_WARP + block) * 4 + warp % 4;
  }

  // Feeds the ring: what one thread does.
  struct Producer {
    const GemmW4A16Sm90Args& args;
    const uint8_t* w;
    uint32_t blocks, end;
    uint64_t policy;

    __device__ __forceinline__ Producer(const GemmW4A16Sm90Args& args, uint32_t tile, uint32_t end)
        : args(args),
          w(args.w + static_cast<size_t>(tile) * ROW_BLOCKS * args.k_blocks * args.block_bytes),
          blocks(min(static_cast<uint32_t>(ROW_BLOCKS), args.row_blocks - tile * ROW_BLOCKS)),
          end(end),
          policy(gridDim.y == 1 ? L2_EVICT_FIRST : L2_EVICT_NORMAL) {}

    // `x_bytes`: of x, which come by copies of their own to the same barrier.
    __device__ __forceinline__ void copy_w(const Ring& at, uint32_t k_block, uint32_t x_bytes) const {
      barrier_expect(at.full(), blocks * args.block_bytes + x_bytes);
      for (uint32_t i = 0; i < blocks; ++i) {
        copy_bulk(at.w() + i * args.block_bytes,
                  w + (static_cast<size_t>(i) * args.k_blocks + k_block) * args.block_bytes, args.block_bytes, at.full(),
                  policy);
      }
    }
    __device__ __forceinline__ void copy_x(const Ring& at, uint32_t k_block) const {
      const uint32_t token = blockIdx.y * TOKENS;
      copy_box(at.x(), args.x, k_block * 256, token, at.full(), L2_EVICT_LAST);
      copy_box(at.x() + Ring::BOX_BYTES, args.x, k_block * 256 + 128, token, at.full(), L2_EVICT_LAST);
    }
    // Weights of the first stages, which do not wait for the kernels before.
    __device__ __forceinline__ void fill_w(Ring ring, uint32_t begin) const {
      prefetch_map(args.x);
      for (uint32_t i = begin; i < min(end, begin + ring.stages); ++i, ring.advance()) {
        copy_w(ring, i, BY_WARPGROUP ? 2 * Ring::BOX_BYTES : 0);
      }
    }
    // Of x, the same stages.
    __device__ __forceinline__ void fill_x(Ring ring, uint32_t begin) const {
      for (uint32_t i = begin; i < min(end, begin + ring.stages); ++i, ring.advance()) copy_x(ring, i);
    }
    // The slot of `k_block` again, once all have left it.
    __device__ __forceinline__ void refill(const Ring& at, uint32_t k_block) const {
      barrier_wait(at.empty(), at.parity);
      if (elect_lane()) {
        copy_w(at, k_block + at.stages, 2 * Ring::BOX_BYTES);
        copy_x(at, k_block + at.stages);
      }
      __syncwarp();
    }
  };

  // x of the first stages by all threads, sixteen of them a row of a stage, as its boxes would lie: a few rows come sooner
  // this way than through TMA. What lies in rows that are not there never reaches an output.
  static __device__ __forceinline__ void load_x(const GemmW4A16Sm90Args& args, const Ring& ring, uint32_t begin,
                                                uint32_t end) {
    const uint32_t chunk = threadIdx.x % 16, row = threadIdx.x / 16 % TOKENS;
    if (row >= tokens_of<TOKENS>(args)) return;
    const T* x = static_cast<const T*>(args.x_rows) + static_cast<size_t>(blockIdx.y * TOKENS + row) * args.k;
    const uint32_t to = ring.base + Ring::HEAD_BYTES + chunk / 8 * Ring::BOX_BYTES + row * 128 + ((chunk % 8 ^ row % 8) << 4);
    const uint32_t count = min(ring.stages, end - begin);
    for (uint32_t i = threadIdx.x / 16 / TOKENS; i < count; i += THREADS / 16 / TOKENS) {
      const uint32_t column = (begin + i) * 128 + chunk * 8;
      copy_async16(to + i * ring.stage_bytes, x + (column < args.k ? column : 0), column < args.k);
    }
  }

  // One stage by mma.sync. FLUSH: parts of 32 columns before sums are scaled: 4 where a block of w is in one group, else 1.
  template <int FLUSH>
  static __device__ __forceinline__ void multiply_stage(const GemmW4A16Sm90Args& args, const Ring& at, Sums& acc) {
    const uint32_t lane = threadIdx.x % 32, row = lane % 8;
    const uint32_t x = at.x() + row * 128 + ((lane / 8 ^ row) << 4);
    const uint32_t w = at.w() + threadIdx.x / 128 * BLOCKS_PER_WARP * args.block_bytes;
    multiply_by_warp<T, Codes, FLUSH, true>(
        args, [&](int r) { return WeightBlock<T, Codes>(w + r * args.block_bytes); },
        [&](int i, int j) { return (x ^ j % 2 * 64) + j / 2 * Ring::BOX_BYTES + i * 1024; }, acc);
  }

  // The same by wgmma.
  template <int FLUSH>
  static __device__ __forceinline__ void multiply_by_warpgroup(const GemmW4A16Sm90Args& args, const Ring& at,
                                                               Sums& acc) {
    static_assert(BLOCKS_PER_WARP == 1, "a warpgroup has 64 rows");
    const WeightBlock<T, Codes> block(at.w() + threadIdx.x / 128 * args.block_bytes);
    const uint64_t x = matrix_descriptor(at.x()), x64 = matrix_descriptor(at.x() + Ring::BOX_BYTES);
    CodeTile<T, Codes> codes[4];
    block.load(codes);
#pragma unroll
    for (int first = 0; first < 4; first += FLUSH) {
      const GroupParameters parameters[1] = {block.group(args, FLUSH == 4 ? 0 : first * args.groups / 4)};
      const Fragments<T, Codes> fragments(parameters[0]);
      // Columns that are started together. Of many tokens the operands of the next are made beside the products of these.
      constexpr int UNIT = TOKENS > 32 ? 1 : FLUSH;
      uint32_t a[2][UNIT][2][4];
      Sums sums;
#pragma unroll
      for (int i = 0; i < FLUSH; i += UNIT) {
        uint32_t(&now)[UNIT][2][4] = a[i / UNIT % 2];
#pragma unroll
        for (int j = 0; j < UNIT; ++j) {
          fragments.template make<0>(codes[first + i + j], now[j][0]);
          fragments.template make<1>(codes[first + i + j], now[j][1]);
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2 * UNIT; ++j) {
          const int step = 2 * (first + i) + j;
          Wgmma16Bit<T, TOKENS>::run(reinterpret_cast<float(&)[TOKENS / 2]>(sums), now[j / 2][j % 2],
                                       (step < 4 ? x : x64) + step % 4 * 2, i + j != 0);
        }
        wgmma_commit();
        if (i + UNIT < FLUSH) wgmma_wait<1>();
      }
      wgmma_wait<0>();
      add_scaled<T>(args, parameters, sums, acc);
    }
  }

  // The sums of this block's part of k.
  template <int FLUSH>
  static __device__ __forceinline__ void accumulate(const Producer& producer, Ring ring, uint32_t begin, Sums& acc) {
    const uint32_t end = producer.end;
    const uint32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    Ring previous = ring;
    for (uint32_t k_block = begin; k_block < end; ++k_block, ring.advance()) {
      barrier_wait(ring.full(), ring.parity);
      if constexpr (BY_WARPGROUP) {
        multiply_by_warpgroup<FLUSH>(producer.args, ring, acc);
      } else {
        multiply_stage<FLUSH>(producer.args, ring, acc);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty());
      // One stage late, so that the others have most likely left it.
      if (k_block != begin && k_block - 1 + ring.stages < end && (k_block - begin) % WARPS == warp) {
        producer.refill(previous, k_block - 1);
      }
      previous = ring;
    }
#pragma unroll
    for (int r = 0; r < BLOCKS_PER_WARP; ++r) {
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[r][i][j] *= 1 / Fragments<T, Codes>::UNIT;
      }
    }
  }

  // Where a warp's sums go: the blocks take turns in adding up the warps' sixteen rows.
  struct Destination {
    uint32_t owner, place;
    __device__ __forceinline__ Destination(int block, uint32_t splits)
        : owner(row_tile(block) % splits), place(row_tile(block) / splits) {}
  };

  static __device__ __forceinline__ void send(uint32_t exchange, uint32_t rank, uint32_t splits, const Sums& acc,
                                              uint32_t token_tiles) {
#pragma unroll
    for (int r = 0; r < BLOCKS_PER_WARP; ++r) {
      const Destination destination(r, splits);
      const uint32_t to = exchange + (destination.place * splits + rank) * SUM_BYTES + threadIdx.x % 32 * 16;
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; ++i) {
        const float4 v = make_float4(acc[r][i][0], acc[r][i][1], acc[r][i][2], acc[r][i][3]);
        if (i < token_tiles) store_cluster_shared16(to + i * 512, destination.owner, v);
      }
    }
  }

  // Adds up the sums of this block's tiles of sixteen rows, eight tokens at a time, and writes them out.
  static __device__ __forceinline__ void reduce(const LinearWriter& writer, const uint8_t* exchange, float* transpose,
                                                uint32_t token_tiles, uint32_t tile, uint32_t rank, uint32_t splits,
                                                uint32_t per_block) {
    uint32_t mine = threadIdx.x / 32, token_tile = 0;
    while (true) {
      while (mine >= per_block) mine -= per_block, ++token_tile;
      if (token_tile >= token_tiles) return;
      if (mine * splits + rank < ROW_TILES) {
        const uint8_t* from = exchange + mine * splits * SUM_BYTES + token_tile * 512 + threadIdx.x % 32 * 16;
        float sums[4] = {};
#pragma unroll 4
        for (uint32_t i = 0; i < splits; ++i) {
          const float4 v = *reinterpret_cast<const float4*>(from + i * SUM_BYTES);
          sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
        }
        write_16x8(writer, transpose, blockIdx.y * TOKENS + token_tile * 8, tile * ROWS + (mine * splits + rank) * 16, sums);
      }
      mine += WARPS;
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A16Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const uint32_t splits = cluster_size(), rank = cluster_rank(), tile = blockIdx.x / splits;
    const uint32_t begin = args.k_blocks * rank / splits, end = args.k_blocks * (rank + 1) / splits;
    const uint32_t per_block = (ROW_TILES + splits - 1) / splits;
    // A warp's place to turn its tile over, then what the other blocks send.
    const uint32_t transposes = WARPS * TRANSPOSE_BYTES;
    const Ring ring(base, args.block_bytes, transposes + (splits == 1 ? 0 : per_block * splits * SUM_BYTES));
    const Producer producer(args, tile, end);
    if (threadIdx.x < 32) {
      if (elect_lane()) {
        launch_dependents();
        ring.init(1, WARPS);
        producer.fill_w(ring, begin);
        if constexpr (BY_WARPGROUP) {
          wait_for_dependencies();
          producer.fill_x(ring, begin);
        }
      }
      __syncwarp();
    }
    if constexpr (!BY_WARPGROUP) {
      wait_for_dependencies();
      load_x(args, ring, begin, end);
      commit_copies();
      wait_copies<0>();
    }
    __syncthreads();
    if (splits != 1) cluster_arrive_relaxed();
    Sums acc = {};
    if (args.groups == 1) {
      accumulate<4>(producer, ring, begin, acc);
    } else {
      accumulate<1>(producer, ring, begin, acc);
    }
    wait_for_dependencies();

    const LinearWriter writer(args.y);
    float* transpose = reinterpret_cast<float*>(shared + ring.end() + threadIdx.x / 32 * TRANSPOSE_BYTES);
    const uint32_t token_tiles = (tokens_of<TOKENS>(args) + 7) / 8;
    if (splits == 1) {
#pragma unroll
      for (int r = 0; r < BLOCKS_PER_WARP; ++r) {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
          if (i < token_tiles) write_16x8(writer, transpose, blockIdx.y * TOKENS + i * 8, tile * ROWS + row_tile(r) * 16, acc[r][i]);
        }
      }
      return;
    }
    cluster_wait();  // the others have started
    send(base + ring.end() + transposes, rank, splits, acc, token_tiles);
    cluster_sync();
    reduce(writer, shared + ring.end() + transposes, transpose, token_tiles, tile, rank, splits, per_block);
  }
};
