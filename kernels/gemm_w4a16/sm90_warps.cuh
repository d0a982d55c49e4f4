// W4A16 for up to sixteen rows on sm_90a: tiles of 64 GROUPS rows of w by TOKENS rows of x, k split over warps.
//
// Blocks:   as many as run at once, each walking over tiles of w; in y they are tiles of x. A cluster of them shares a tile,
//           and each takes a slice of k.
// Threads:  GROUPS * PARTS warps that multiply, each 64 rows of the tile and every PARTS-th block of the slice; one more that
//           fetches x where not all of its slice has room.
// Copies:   each warp has blocks of w of its own, DEPTH of them under way and across tiles, one copy each: it waits for no
//           other. The first stages of x come by all threads, later ones by the copy engine.
// Sums:     a block's parts of k go through its shared memory, then its slice's sums to the block of the cluster that adds
//           up those sixteen rows and eight tokens: blocks wait for each other only there.
// Numerics: operands are code minus zero point, exact; each group's sum is scaled in f32. Parts and slices of k are added in
//           order.
// Overlap:  weights are asked for while the kernel that makes x still runs (programmatic dependent launch).
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "gemm_w4a16/sm90_block.cuh"

template <typename T, int BITS, int TOKENS, int GROUPS, int PARTS, int DEPTH>
struct GemmW4A16Warps {
  static constexpr uint32_t WARPS = GROUPS * PARTS, THREADS = 32 * WARPS + 32;
  static constexpr int EIGHTS = TOKENS / 8;
  static constexpr uint32_t SIXTEENS = 4 * GROUPS, PAIRS = SIXTEENS * EIGHTS;  // of sixteen rows and eight tokens
  static constexpr uint32_t WRITERS = PAIRS < WARPS ? PAIRS : WARPS;
  static constexpr uint32_t ALL_SUM_BYTES = 4 * EIGHTS * 512;  // of a warp
  using Sums = float[4][EIGHTS][4];

  // Shared memory: barriers, two turns of sums of other slices, places to turn tiles over, slots of weights, the warps' sums
  // (of a block that has one tile: in its slots, by then empty), stages of x.
  static constexpr uint32_t HEAD_BYTES = 1024, MAX_STAGES = 32;
  static_assert(8 * (2 * MAX_STAGES + 3 + WARPS * DEPTH) <= HEAD_BYTES, "barriers");

  // What of k this block multiplies, in steps of PARTS blocks of 128 columns, and of which tiles of w.
  struct Share {
    uint32_t slices, log, rank, begin, blocks, steps;  // 1, 2, 4 or 8 slices and its logarithm: no divisions
    uint32_t tile, by, tiles;  // the first, then every `by`-th before `tiles`
    uint32_t depth;            // slots of a warp, no more than it has use for
    uint32_t block_bytes;

    __device__ __forceinline__ explicit Share(const GemmW4A16Sm90Args& args) : slices(cluster_size()), rank(cluster_rank()) {
      log = 31 - __clz(slices);
      begin = args.k_blocks * rank >> log;
      blocks = (args.k_blocks * (rank + 1) >> log) - begin;
      steps = (blocks + PARTS - 1) / PARTS;
      tile = blockIdx.x >> log, by = gridDim.x >> log, tiles = (args.row_blocks + GROUPS - 1) / GROUPS;
      const uint32_t most = (((args.k_blocks + slices - 1) >> log) + PARTS - 1) / PARTS;  // steps of any slice
      depth = has_one_tile() ? min(static_cast<uint32_t>(DEPTH), most) : DEPTH;
      block_bytes = args.block_bytes;
    }
    __device__ __forceinline__ bool has_one_tile() const { return by >= tiles; }
    // Of a tile, those of `part`.
    __device__ __forceinline__ uint32_t blocks_of(uint32_t part) const { return (blocks + PARTS - 1 - part) / PARTS; }
    // Of a turn of sums from other slices.
    __device__ __forceinline__ uint32_t gather_bytes() const {
      return slices == 1 ? 0 : ((PAIRS + slices - 1) & ~(slices - 1)) * 512;
    }
    __device__ __forceinline__ uint32_t turns_at() const { return HEAD_BYTES + 2 * gather_bytes(); }
    __device__ __forceinline__ uint32_t slots_at() const { return turns_at() + WRITERS * TURN_BYTES; }
    // Sums of the first warp, and from a warp's to the next one's.
    __device__ __forceinline__ uint32_t sums_at() const { return slots_at() + (has_one_tile() ? 0 : WARPS * depth * block_bytes); }
    __device__ __forceinline__ uint32_t sums_pitch() const { return has_one_tile() ? depth * block_bytes : ALL_SUM_BYTES; }
    __device__ __forceinline__ uint32_t end() const {
      return slots_at() + WARPS * (depth * block_bytes + (has_one_tile() ? 0 : ALL_SUM_BYTES));
    }
  };
  static_assert(ALL_SUM_BYTES <= 1024 * BITS, "a slot has room for sums");

  // x in shared memory: PARTS blocks of 128 columns a stage, of two boxes of 64 columns each. Where all of the slice has room
  // boxes have the rows that there are, else as many as the copy engine brings.
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
    __device__ __forceinline__ uint32_t stage_bytes() const { return PARTS * 2 * box_bytes; }
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

  // What a warp asks for of w: its 64 rows of its part of k, then in the next tile. All lanes know, one asks.
  struct Reader {
    const GemmW4A16Sm90Args& args;
    const Share& share;
    const uint32_t part, group, first_barrier, slots;  // where this warp's are
    const uint64_t policy;
    uint32_t tile, left = 0;  // blocks of this tile
    const uint8_t* from;

    __device__ __forceinline__ Reader(const GemmW4A16Sm90Args& args, const Share& share, const Stages& stages, uint32_t warp)
        : args(args),
          share(share),
          part(warp / GROUPS),
          group(warp % GROUPS),
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
      return tile < share.tiles && tile * GROUPS + group < args.row_blocks;
    }
    __device__ __forceinline__ void aim() {
      left = has(tile) ? share.blocks_of(part) : 0;
      from = args.w + (static_cast<size_t>(tile * GROUPS + group) * args.k_blocks + share.begin + part) * args.block_bytes;
    }
    __device__ __forceinline__ void ask(uint32_t slot) {
      if (left == 0) return;
      if (elect_lane()) {
        barrier_expect(barrier(slot), args.block_bytes);
        copy_bulk(at(slot), from, args.block_bytes, barrier(slot), policy);
      }
      __syncwarp();
      from += static_cast<size_t>(PARTS) * args.block_bytes;
      if (--left == 0) tile += share.by, aim();
    }
  };

  // Products of a block of k, which lies at `w` in shared memory, and two boxes of x, of which `x` is what this lane has eight
  // rows at a time of for `ldmatrix`: of FLUSH parts of 32 columns (4 where the block is in one group, else 1), then their scales.
  template <int FLUSH>
  static __device__ __forceinline__ void multiply(const GemmW4A16Sm90Args& args, uint32_t w, const uint32_t (&x)[EIGHTS],
                                                  uint32_t box_bytes, Sums& acc) {
    const uint32_t lane = threadIdx.x % 32;
    CodeTile<T, BITS> codes[4][4];
#pragma unroll
    for (int first = 0; first < 4; first += FLUSH) {
      GroupParameters parameters[4];
      float sums[4][EIGHTS][4] = {};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        parameters[r] = WeightBlock<T, BITS>(w, r * 32 + lane).group(args, FLUSH == 4 ? 0 : first * args.groups / 4);
      }
#pragma unroll
      for (int j = first; j < first + FLUSH; ++j) {
        constexpr int TILES = 8 / BITS;  // that sixteen bytes hold
        if (j % TILES == 0) {
#pragma unroll
          for (int r = 0; r < 4; ++r) WeightBlock<T, BITS>(w, r * 32 + lane).load(j / TILES, codes[r]);
        }
        uint32_t b[EIGHTS][4];
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) load_matrix_x4(b[i], (x[i] ^ j % 2 * 64) + j / 2 * box_bytes);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const Fragments<T, BITS> fragments(parameters[r]);
          uint32_t a[2][4];
          fragments.template make<0>(codes[r][j], a[0]);
          fragments.template make<1>(codes[r][j], a[1]);
#pragma unroll
          for (int i = 0; i < EIGHTS; ++i) {
            mma_16bit<T>(sums[r][i], a[0], b[i][0], b[i][1]);
            mma_16bit<T>(sums[r][i], a[1], b[i][2], b[i][3]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 scale = parameters[r].template scale<T>(args);
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r][i][e] = fmaf(sums[r][i][e], e < 2 ? scale.x : scale.y, acc[r][i][e]);
        }
      }
    }
  }

  // x of the first stages, as its boxes would lie, by the warps that multiply it: a few rows come sooner this way than through
  // the copy engine. What lies in rows that are not there never reaches an output.
  static __device__ __forceinline__ void load_x(const GemmW4A16Sm90Args& args, const Share& share, const Stages& stages,
                                                uint32_t part, uint32_t group) {
    const uint32_t chunk = threadIdx.x % 16, tokens = tokens_of<TOKENS>(args), blocks = min(stages.count * PARTS, share.blocks);
    const T* x = static_cast<const T*>(args.x_rows) + static_cast<size_t>(blockIdx.y * TOKENS) * args.k;
    for (uint32_t row = group * 2 + threadIdx.x % 32 / 16; row < tokens; row += 2 * GROUPS) {
      const uint32_t to = stages.x() + chunk / 8 * stages.box_bytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
      for (uint32_t block = part; block < blocks; block += PARTS) {
        const uint32_t column = (share.begin + block) * 128 + chunk * 8;
        copy_async16(to + block * 2 * stages.box_bytes, x + (column < args.k ? static_cast<size_t>(row) * args.k + column : 0),
                     column < args.k);
      }
    }
    commit_copies();
    wait_copies<0>();
    if (GROUPS == 1) {
      __syncwarp();  // no other warp has this part
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
        const uint32_t first = step * PARTS, blocks = min(static_cast<uint32_t>(PARTS), share.blocks - first);
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
    const uint32_t lane = threadIdx.x % 32, tokens = tokens_of<TOKENS>(args), blocks = share.blocks_of(reader.part);
    const bool whole = stages.is_whole();
    const LinearWriter writer(args.y);
    const uint32_t sums_pitch = share.sums_pitch();
    const auto sums = [&](uint32_t warp, uint32_t sixteen, uint32_t eight) -> float4& {
      return reinterpret_cast<float4*>(shared + share.sums_at() + warp * sums_pitch)[(sixteen * EIGHTS + eight) * 32 + lane];
    };
    uint32_t rows[EIGHTS];  // of x in its box; of tokens that are not there, another: no output has those sums
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
      const uint32_t row = min(8 * i + lane % 8, tokens - 1);
      rows[i] = reader.part * 2 * stages.box_bytes + row * 128 + ((lane / 8 ^ row % 8) << 4);
    }
    const uint32_t slices = share.slices, pairs = SIXTEENS * ((tokens + 7) / 8), gather_bytes = share.gather_bytes();
    float* turn_over = reinterpret_cast<float*>(shared + share.turns_at() + warp * TURN_BYTES);
    const auto write = [&](uint32_t tile, uint32_t pair, const float(&total)[4]) {
      write_16x8(writer, turn_over, blockIdx.y * TOKENS + pair / SIXTEENS * 8, (tile * SIXTEENS + pair % SIXTEENS) * 16, total);
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
          uint32_t x[EIGHTS];
#pragma unroll
          for (int i = 0; i < EIGHTS; ++i) x[i] = stages.x() + rows[i];
          multiply<FLUSH>(args, reader.at(slot), x, stages.box_bytes, acc);
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
        for (int i = 0; i < EIGHTS; ++i) {
          constexpr float UNIT = 1 / Fragments<T, BITS>::UNIT;
          const float(&v)[4] = acc[r][i];
          sums(warp, r, i) = make_float4(v[0] * UNIT, v[1] * UNIT, v[2] * UNIT, v[3] * UNIT);
        }
      }
      named_barrier(1, 32 * WARPS);
      if (done == 0 && slices != 1) cluster_wait();  // the others have started
      for (uint32_t pair = warp; pair < pairs; pair += WARPS) {
        float total[4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const uint32_t sixteen = pair % SIXTEENS;
          const float4 v = sums(part * GROUPS + sixteen / 4, sixteen % 4, pair / SIXTEENS);
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
        stages.init(SIXTEENS * ((tokens_of<TOKENS>(args) + 7) / 8));
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
    load_x(args, share, stages, reader.part, reader.group);
    if (args.groups == 1) return walk<4>(args, shared, share, reader, stages, warp);
    walk<1>(args, shared, share, reader, stages, warp);
  }
};
