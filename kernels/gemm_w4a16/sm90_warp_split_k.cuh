// W4A16 for up to sixteen rows on sm_90a: tiles of 64 ROW_BLOCKS rows of w by TOKENS rows of x, k split over warps.
//
// Blocks:   as many as run at once, each walking over tiles of w; in y they are tiles of x. A cluster of them shares a tile,
//           and each takes a slice of k.
// Threads:  ROW_BLOCKS * WARPS_K warps that multiply, each 64 rows of the tile and every WARPS_K-th block of the slice; one more
//           that fetches x where not all of its slice has room.
// Copies:   each warp has blocks of w of its own, DEPTH of them under way and across tiles, one copy each: it waits for no
//           other. The first stages of x come by all threads, later ones by TMA.
// Sums:     the sums of a block's warps go through its shared memory, then its slice's sums to the block of the cluster that adds
//           up those sixteen rows and eight tokens: blocks wait for each other only there.
// Numerics: operands are code minus zero point, exact; each group's sum is scaled in f32. Warps and slices of k are added in
//           order.
// Overlap:  weights are asked for while the kernel that makes x still runs (programmatic dependent launch).
#pragma once

#include "common/async_copy.cuh"
#include "gemm_w4a16/sm90_mma.cuh"

template <typename T, typename Codes, int TOKENS, int ROW_BLOCKS, int WARPS_K, int DEPTH>
struct GemmW4A16WarpSplitK {
  static constexpr uint32_t WARPS = ROW_BLOCKS * WARPS_K, THREADS = 32 * WARPS + 32;
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr uint32_t ROW_TILES = 4 * ROW_BLOCKS, PAIRS = ROW_TILES * TOKEN_TILES;  // of sixteen rows and eight tokens
  static constexpr uint32_t WRITERS = PAIRS < WARPS ? PAIRS : WARPS;
  static constexpr uint32_t ALL_SUM_BYTES = 4 * TOKEN_TILES * 512;  // of a warp
  using Sums = float[4][TOKEN_TILES][4];

  // Shared memory: barriers, two turns of sums of other slices, places to turn tiles over, slots of weights, the warps' sums
  // (of a block that has one tile: in its slots, by then empty), stages of x.
  static constexpr uint32_t HEAD_BYTES = LOWBIT_RING_HEAD_BYTES;
  static constexpr uint32_t MAX_STAGES = GEMM_W4A16_SM90_WARP_SPLIT_K_MAX_STAGES;
  static_assert(8 * (2 * MAX_STAGES + 3 + WARPS * DEPTH) <= HEAD_BYTES, "barriers");

  // What of k this block multiplies, in steps of WARPS_K blocks of 128 columns, and of which tiles of w.
  struct Share {
    uint32_t slices, log, rank, begin, blocks, steps;  // 1, 2, 4 or 8 slices and its logarithm: no divisions
    uint32_t tile, by, tiles;  // the first, then every `by`-th before `tiles`
    uint32_t depth;            // slots of a warp, no more than it has use for
    uint32_t block_bytes;

    __device__ __forceinline__ explicit Share(const GemmW4A16Sm90Args& args) : slices(cluster_size()), rank(cluster_rank()) {
      log = 31 - __clz(slices);
      begin = args.k_blocks * rank >> log;
      blocks = (args.k_blocks * (rank + 1) >> log) - begin;
      steps = (blocks + WARPS_K - 1) / WARPS_K;
      tile = blockIdx.x >> log, by = gridDim.x >> log, tiles = (args.row_blocks + ROW_BLOCKS - 1) / ROW_BLOCKS;
      const uint32_t most = (((args.k_blocks + slices - 1) >> log) + WARPS_K - 1) / WARPS_K;  // steps of any slice
      depth = has_one_tile() ? min(static_cast<uint32_t>(DEPTH), most) : DEPTH;
      block_bytes = args.block_bytes;
    }
    __device__ __forceinline__ bool has_one_tile() const { return by >= tiles; }
    // Of a tile, those of a warp.
    __device__ __forceinline__ uint32_t blocks_of(uint32_t warp_k) const { return (blocks + WARPS_K - 1 - warp_k) / WARPS_K; }
    // Of a turn of sums from other slices.
    __device__ __forceinline__ uint32_t gather_bytes() const {
      return slices == 1 ? 0 : ((PAIRS + slices - 1) & ~(slices - 1)) * 512;
    }
    __device__ __forceinline__ uint32_t transposes_at() const { return HEAD_BYTES + 2 * gather_bytes(); }
    __device__ __forceinline__ uint32_t slots_at() const { return transposes_at() + WRITERS * TRANSPOSE_BYTES; }
    // Sums of the first warp, and from a warp's to the next one's.
    __device__ __forceinline__ uint32_t sums_at() const { return slots_at() + (has_one_tile() ? 0 : WARPS * depth * block_bytes); }
    __device__ __forceinline__ uint32_t sums_pitch() const { return has_one_tile() ? depth * block_bytes : ALL_SUM_BYTES; }
    __device__ __forceinline__ uint32_t end() const {
      return slots_at() + WARPS * (depth * block_bytes + (has_one_tile() ? 0 : ALL_SUM_BYTES));
    }
  };
  static_assert(ALL_SUM_BYTES <= 1024 * Codes::BITS, "a slot has room for sums");

  // x in shared memory: WARPS_K blocks of 128 columns a stage, of two boxes of 64 columns each. Where all of the slice has room
  // boxes have the rows that there are, else as many as TMA brings.
  struct Stages {
    uint32_t base, count, begin, steps, box_bytes;
    uint32_t slot = 0, round = 0;

    __device__ __forceinline__ Stages(const GemmW4A16Sm90Args& args, const Share& share, uint32_t base)
        : base(base), begin((share.end() + 1023) / 1024 * 1024), steps(share.steps) {
      uint32_t all;
      asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(all));
      box_bytes = min(static_cast<uint32_t>(TOKENS), args.y.m) * 128;
      if (steps > min((all - begin) / stage_bytes(), MAX_STAGES)) box_bytes = TOKENS * 128;
      count = min(min((all - begin) / stage_bytes(), MAX_STAGES), steps);
    }
    __device__ __forceinline__ uint32_t stage_bytes() const { return WARPS_K * 2 * box_bytes; }
    // Whether all of x stays.
    __device__ __forceinline__ bool is_whole() const { return count == steps; }
    __device__ __forceinline__ uint32_t full() const { return base + 8 * slot; }
    __device__ __forceinline__ uint32_t empty() const { return base + 8 * (MAX_STAGES + slot); }
    __device__ __forceinline__ uint32_t sums_read() const { return base + 8 * 2 * MAX_STAGES; }
    __device__ __forceinline__ uint32_t gathered(uint32_t turn) const { return base + 8 * (2 * MAX_STAGES + 1 + turn); }
    __device__ __forceinline__ uint32_t weights(uint32_t slot) const { return base + 8 * (2 * MAX_STAGES + 3 + slot); }
    __device__ __forceinline__ uint32_t x() const { return base + begin + slot * stage_bytes(); }
    // `pairs`: of which sums are added up.
    __device__ __forceinline__ void init(uint32_t pairs) const {
      for (uint32_t i = 0; i < count; ++i) {
        barrier_init(base + 8 * i, 1);
        barrier_init(base + 8 * (MAX_STAGES + i), WARPS);
      }
      barrier_init(sums_read(), pairs);
      barrier_init(gathered(0), 1);
      barrier_init(gathered(1), 1);
      barrier_init_fence();
    }
    __device__ __forceinline__ void advance() {
      if (++slot == count) slot = 0, ++round;
    }
  };

  // What a warp asks for of w: its 64 rows of its blocks of k, then in the next tile. All lanes know, one asks.
  struct Reader {
    const GemmW4A16Sm90Args& args;
    const Share& share;
    const uint32_t warp_k, row_block, first_barrier, slots;  // where this warp's are
    const uint64_t policy;
    uint32_t tile, left = 0;  // blocks of this tile
    const uint8_t* from;

    __device__ __forceinline__ Reader(const GemmW4A16Sm90Args& args, const Share& share, const Stages& stages, uint32_t warp)
        : args(args),
          share(share),
          warp_k(warp / ROW_BLOCKS),
          row_block(warp % ROW_BLOCKS),
          first_barrier(stages.weights(warp * DEPTH)),
          slots(stages.base + share.slots_at() + warp * share.depth * args.block_bytes),
          policy(gridDim.y == 1 ? L2_EVICT_FIRST : L2_EVICT_NORMAL),
          tile(share.tile) {
      aim();
    }
    __device__ __forceinline__ uint32_t barrier(uint32_t slot) const { return first_barrier + 8 * slot; }
    __device__ __forceinline__ uint32_t at(uint32_t slot) const { return slots + slot * args.block_bytes; }

    // Whether there is such a tile with rows for this warp.
    __device__ __forceinline__ bool has(uint32_t tile) const {
      return tile < share.tiles && tile * ROW_BLOCKS + row_block < args.row_blocks;
    }
    __device__ __forceinline__ void aim() {
      left = has(tile) ? share.blocks_of(warp_k) : 0;
      const size_t row = static_cast<size_t>(tile * ROW_BLOCKS + row_block) * args.k_blocks;
      from = args.w + (row + share.begin + warp_k) * args.block_bytes;
    }
    __device__ __forceinline__ void ask(uint32_t slot) {
      if (left == 0) return;
      if (elect_lane()) {
        barrier_expect(barrier(slot), args.block_bytes);
        copy_bulk(at(slot), from, args.block_bytes, barrier(slot), policy);
      }
      __syncwarp();
      from += static_cast<size_t>(WARPS_K) * args.block_bytes;
      if (--left == 0) tile += share.by, aim();
    }
  };

  // x of the first stages, as its boxes would lie, by the warps that multiply it: a few rows come sooner this way than through
  // TMA. What lies in rows that are not there never reaches an output.
  static __device__ __forceinline__ void load_x(const GemmW4A16Sm90Args& args, const Share& share, const Stages& stages,
                                                uint32_t warp_k, uint32_t row_block) {
    const uint32_t chunk = threadIdx.x % 16, tokens = tokens_of<TOKENS>(args), blocks = min(stages.count * WARPS_K, share.blocks);
    const T* x = static_cast<const T*>(args.x_rows) + static_cast<size_t>(blockIdx.y * TOKENS) * args.k;
    for (uint32_t row = row_block * 2 + threadIdx.x % 32 / 16; row < tokens; row += 2 * ROW_BLOCKS) {
      const uint32_t to = stages.x() + chunk / 8 * stages.box_bytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
      for (uint32_t block = warp_k; block < blocks; block += WARPS_K) {
        const uint32_t column = (share.begin + block) * 128 + chunk * 8;
        copy_async16(to + block * 2 * stages.box_bytes, x + (column < args.k ? static_cast<size_t>(row) * args.k + column : 0),
                     column < args.k);
      }
    }
    commit_copies();
    wait_copies<0>();
    if (ROW_BLOCKS == 1) {
      __syncwarp();  // no other warp has these columns
    } else {
      named_barrier(1, 32 * WARPS);
    }
  }

  // Later stages, as they come free: what one thread of the last warp does.
  static __device__ __forceinline__ void feed(const GemmW4A16Sm90Args& args, const Share& share, Stages stages) {
    for (uint32_t tile = share.tile; tile < share.tiles; tile += share.by) {
      for (uint32_t step = 0; step < stages.steps; ++step, stages.advance()) {
        if (stages.round == 0) continue;
        barrier_wait(stages.empty(), stages.round - 1 & 1);
        const uint32_t first = step * WARPS_K, blocks = min(static_cast<uint32_t>(WARPS_K), share.blocks - first);
        barrier_expect(stages.full(), blocks * 2 * stages.box_bytes);
        for (uint32_t i = 0; i < 2 * blocks; ++i) {
          copy_box(stages.x() + i * stages.box_bytes, args.x, (share.begin + first) * 256 + i * 128, blockIdx.y * TOKENS, stages.full(),
                   L2_EVICT_LAST);
        }
      }
    }
  }

  template <int FLUSH>
  static __device__ __forceinline__ void walk(const GemmW4A16Sm90Args& args, uint8_t* shared, const Share& share, Reader reader,
                                              Stages stages, uint32_t warp) {
    const uint32_t lane = threadIdx.x % 32, tokens = tokens_of<TOKENS>(args), blocks = share.blocks_of(reader.warp_k);
    const bool whole = stages.is_whole();
    const LinearWriter writer(args.y);
    const uint32_t sums_pitch = share.sums_pitch();
    const auto sums = [&](uint32_t warp, uint32_t row_tile, uint32_t token_tile) -> float4& {
      return reinterpret_cast<float4*>(shared + share.sums_at() + warp * sums_pitch)[(row_tile * TOKEN_TILES + token_tile) * 32 + lane];
    };
    uint32_t rows[TOKEN_TILES];  // of x in its box; of tokens that are not there, another: no output has those sums
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
      const uint32_t row = min(8 * i + lane % 8, tokens - 1);
      rows[i] = reader.warp_k * 2 * stages.box_bytes + row * 128 + ((lane / 8 ^ row % 8) << 4);
    }
    const uint32_t slices = share.slices, pairs = ROW_TILES * ((tokens + 7) / 8), gather_bytes = share.gather_bytes();
    float* transpose = reinterpret_cast<float*>(shared + share.transposes_at() + warp * TRANSPOSE_BYTES);
    const auto write = [&](uint32_t tile, uint32_t pair, const float(&total)[4]) {
      write_16x8(writer, transpose, blockIdx.y * TOKENS + pair / ROW_TILES * 8, (tile * ROW_TILES + pair % ROW_TILES) * 16, total);
    };
    uint32_t done = 0;  // tiles
    uint32_t slot = 0, parity = 0;
    for (uint32_t tile = share.tile; tile < share.tiles; tile += share.by, ++done) {
      Sums acc = {};
      const uint32_t mine = reader.has(tile) ? blocks : 0;
      for (uint32_t step = 0; step < stages.steps; ++step, stages.advance()) {
        if (!whole && stages.round != 0) barrier_wait(stages.full(), stages.round - 1 & 1);
        if (step < mine) {
          barrier_wait(reader.barrier(slot), parity);
          uint32_t x[TOKEN_TILES];
#pragma unroll
          for (int i = 0; i < TOKEN_TILES; ++i) x[i] = stages.x() + rows[i];
          const uint32_t w = reader.at(slot), box_bytes = stages.box_bytes;
          multiply_by_warp<T, Codes, FLUSH, false>(
              args, [&](int r) { return WeightBlock<T, Codes>(w, r * 32 + lane); },
              [&](int i, int j) { return (x[i] ^ j % 2 * 64) + j / 2 * box_bytes; }, acc);
          __syncwarp();
          reader.ask(slot);
          if (++slot == share.depth) slot = 0, parity ^= 1;
        }
        if (!whole && elect_lane()) barrier_arrive(stages.empty());
      }
      // All parts of a pair to one warp, once those of the tile before are read.
      if (done != 0) barrier_wait(stages.sums_read(), (done - 1) & 1);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
          constexpr float UNIT = 1 / Fragments<T, Codes>::UNIT;
          const float(&v)[4] = acc[r][i];
          sums(warp, r, i) = make_float4(v[0] * UNIT, v[1] * UNIT, v[2] * UNIT, v[3] * UNIT);
        }
      }
      named_barrier(1, 32 * WARPS);
      if (done == 0 && slices != 1) cluster_wait();  // the others have started
      for (uint32_t pair = warp; pair < pairs; pair += WARPS) {
        float total[4] = {};
#pragma unroll
        for (int warp_k = 0; warp_k < WARPS_K; ++warp_k) {
          const uint32_t row_tile = pair % ROW_TILES;
          const float4 v = sums(warp_k * ROW_BLOCKS + row_tile / 4, row_tile % 4, pair / ROW_TILES);
          total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        __syncwarp();
        if (elect_lane()) barrier_arrive(stages.sums_read());
        if (slices == 1) {
          write(tile, pair, total);
          continue;
        }
        // Turns alternate: who sends a tile's sums has got the sums of the one before from all, who by then had read those of
        // the one before that.
        const uint32_t place = (pair & ~(slices - 1)) + share.rank;
        store_cluster_async16(stages.base + HEAD_BYTES + done % 2 * gather_bytes + place * 512 + lane * 16, stages.gathered(done % 2),
                              pair & (slices - 1), make_float4(total[0], total[1], total[2], total[3]));
      }
      if (slices == 1) continue;
      if (threadIdx.x == 0) {
        const uint32_t of_this_block = (pairs - share.rank + slices - 1) >> share.log;
        barrier_expect(stages.gathered(done % 2), of_this_block * slices * 512);
      }
      __syncwarp();
      for (uint32_t at = warp; at * slices + share.rank < pairs; at += WARPS) {
        barrier_wait(stages.gathered(done % 2), done / 2 % 2);
        const float4* from = reinterpret_cast<const float4*>(shared + HEAD_BYTES + done % 2 * gather_bytes + at * slices * 512) + lane;
        float total[4] = {};
#pragma unroll 4
        for (uint32_t i = 0; i < slices; ++i) {
          const float4 v = from[i * 32];
          total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        write(tile, at * slices + share.rank, total);
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmW4A16Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    const Share share(args);
    const Stages stages(args, share, shared_address(shared));
    launch_dependents();
    if (warp == WARPS) {
      if (elect_lane()) {
        prefetch_map(args.x);
        stages.init(ROW_TILES * ((tokens_of<TOKENS>(args) + 7) / 8));
      }
      __syncthreads();
      if (share.slices != 1) cluster_arrive();
      wait_for_dependencies();
      if (!stages.is_whole() && elect_lane()) feed(args, share, stages);
      __syncwarp();
      if (share.slices != 1) cluster_wait();
      return;
    }
    Reader reader(args, share, stages, warp);
    if (elect_lane()) {
      for (uint32_t i = 0; i < share.depth; ++i) barrier_init(reader.barrier(i), 1);
      barrier_init_fence();
    }
    __syncwarp();
#pragma unroll 1
    for (uint32_t i = 0; i < share.depth; ++i) reader.ask(i);
    __syncthreads();
    if (share.slices != 1) cluster_arrive();
    wait_for_dependencies();
    load_x(args, share, stages, reader.warp_k, reader.row_block);
    if (args.groups == 1) return walk<4>(args, shared, share, reader, stages, warp);
    walk<1>(args, shared, share, reader, stages, warp);
  }
};
