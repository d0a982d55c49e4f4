// W4A16 for up to sixteen rows on sm_90a: tiles of 16 SIXTEENS rows of w by TOKENS rows of x, k split over a block's warps.
//
// Blocks:   as many as run at once, each walking over tiles of w; in y they are tiles of x. There is no cluster: nothing is
//           waited for but memory.
// Threads:  SIXTEENS * PARTS warps that multiply, each sixteen rows of the tile and every PARTS-th block of k; four more that
//           fetch x.
// Copies:   each warp asks for its own weights, DEPTH blocks of k ahead and across tiles, by cp.async to where only itself
//           reads. x comes by cp.async of threads of their own, for which otherwise everyone would wait in the order of copies;
//           where all of it has room, once.
// Numerics: operands are code minus zero point, exact; each group's sum is scaled in f32. The parts of k are added in order.
// Overlap:  weights are asked for while the kernel that makes x still runs (programmatic dependent launch).
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "gemm_w4a16/sm90_block.cuh"

template <typename T, int BITS, int TOKENS, int SIXTEENS, int PARTS>
struct GemmW4A16Warps {
  static constexpr uint32_t WARPS = SIXTEENS * PARTS, FEEDERS = 128, THREADS = 32 * WARPS + FEEDERS;
  static constexpr int EIGHTS = TOKENS / 8;
  static constexpr uint32_t DEPTH = 256 / BITS / WARPS;  // 64 KB under way
  using Block = WeightBlock<T, BITS, 16>;
  using Sums = float[EIGHTS][4];
  static_assert(EIGHTS <= PARTS, "a warp adds up the parts of sixteen rows and eight tokens");

  // Shared memory: barriers, the warps' sums, places to turn tiles over, slots of weights, stages of x.
  static constexpr uint32_t HEAD_BYTES = 1024, MAX_STAGES = HEAD_BYTES / 16 - 1;
  static constexpr uint32_t SUM_BYTES = WARPS * EIGHTS * 512;
  static constexpr uint32_t SLOTS_AT = HEAD_BYTES + SUM_BYTES + SIXTEENS * EIGHTS * TURN_BYTES;
  static constexpr uint32_t PITCH = PARTS * 256 + 16;  // of rows of x, so that they begin in different banks

  // x in shared memory: a stage has PARTS blocks of k.
  struct Stages {
    uint32_t base, count, bytes;  // barriers at `base` of shared memory; x `begin` behind it
    uint32_t begin, steps;
    uint32_t slot = 0, parity = 0;

    __device__ __forceinline__ Stages(const GemmW4A16Sm90Args& args, uint32_t base)
        : base(base),
          bytes(min(static_cast<uint32_t>(TOKENS), args.y.m) * PITCH),
          begin(SLOTS_AT + WARPS * DEPTH * slot_bytes(args)),
          steps((args.k_blocks + PARTS - 1) / PARTS) {
      uint32_t all;
      asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(all));
      count = min(min((all - begin) / bytes, MAX_STAGES), steps);
    }
    // Whether all of x stays.
    __device__ __forceinline__ bool is_whole() const { return count == steps; }
    __device__ __forceinline__ uint32_t full() const { return base + 8 * slot; }
    __device__ __forceinline__ uint32_t empty() const { return base + 8 * (MAX_STAGES + slot); }
    __device__ __forceinline__ uint32_t sums_read() const { return base + 8 * 2 * MAX_STAGES; }
    __device__ __forceinline__ uint32_t x() const { return base + begin + slot * bytes; }
    // `adders`: warps that add up sums.
    __device__ __forceinline__ void init(uint32_t adders) const {
      for (uint32_t i = 0; i < count; ++i) {
        barrier_init(base + 8 * i, FEEDERS);
        barrier_init(base + 8 * (MAX_STAGES + i), WARPS);
      }
      barrier_init(sums_read(), adders);
    }
    __device__ __forceinline__ void advance() {
      if (++slot == count) slot = 0, parity ^= 1;
    }
  };

  // Words of parameters of a row pair in a block, and bytes of a block's sixteen rows.
  static __device__ __forceinline__ uint32_t words(const GemmW4A16Sm90Args& args) {
    return args.groups * (1 + args.low_scales + args.zeros);
  }
  static __device__ __forceinline__ uint32_t slot_bytes(const GemmW4A16Sm90Args& args) {
    return Block::CODE_BYTES + words(args) * Block::ROW_BYTES;
  }

  // Blocks of k of part `part`.
  static __device__ __forceinline__ uint32_t blocks_of(const GemmW4A16Sm90Args& args, uint32_t part) {
    return (args.k_blocks + PARTS - 1 - part) / PARTS;
  }

  // What a warp asks for of w: its sixteen rows of its part of k, then in the block's next tile.
  struct Reader {
    const GemmW4A16Sm90Args& args;
    const uint32_t part, sixteen, steps, slot_bytes;
    const uint32_t slots;   // where this warp's are
    const bool parameters;  // whether this lane copies sixteen bytes of them
    uint32_t at = 0, tile = blockIdx.x, step = 0, blocks;
    const uint8_t* codes;
    int32_t to_parameters;  // from `codes`

    __device__ __forceinline__ Reader(const GemmW4A16Sm90Args& args, const Stages& x, uint32_t warp)
        : args(args),
          part(warp / SIXTEENS),
          sixteen(warp % SIXTEENS),
          steps(x.steps),
          slot_bytes(GemmW4A16Warps::slot_bytes(args)),
          slots(x.base + SLOTS_AT + warp * DEPTH * slot_bytes),
          parameters(threadIdx.x % 32 < 2 * words(args)) {
      aim();
    }
    __device__ __forceinline__ void aim() {
      const uint32_t lane = threadIdx.x % 32, row16 = tile * SIXTEENS + sixteen, in_block = row16 % 4;
      blocks = row16 < 4 * args.row_blocks ? blocks_of(args, part) : 0;
      codes = args.w + (static_cast<size_t>(row16 / 4) * args.k_blocks + part) * args.block_bytes + in_block * 512 + lane * 16;
      to_parameters = 1024 * BITS + in_block * 32 + lane / 2 * 128 + lane % 2 * 16 - (in_block * 512 + lane * 16);
    }
    // The next block of k. Each call is a group of copies, also where there is nothing.
    __device__ __forceinline__ void ask() {
      if (step < blocks) {
        const uint32_t to = slots + at + threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < Block::PARTS; ++i) copy_async16(to + i * 512, codes + i * 2048, true);
        if (parameters) copy_async16(to + Block::CODE_BYTES, codes + to_parameters, true);
      }
      commit_copies();
      at = at + slot_bytes == DEPTH * slot_bytes ? 0 : at + slot_bytes;
      codes += static_cast<size_t>(PARTS) * args.block_bytes;
      if (++step == steps) {
        step = 0, tile += gridDim.x;
        aim();
      }
    }
  };

  // Products of a block of k, whose codes and parameters lie in `slot`, and x in the stage at `x`: of FLUSH parts of 32 columns (4
  // where the block is in one group, else 1), then their scales.
  template <int FLUSH>
  static __device__ __forceinline__ void multiply(const GemmW4A16Sm90Args& args, uint32_t slot, uint32_t x,
                                                  const uint32_t (&rows)[EIGHTS], Sums& acc) {
    const Block block(slot);
    CodeTile<T, BITS> codes[4];
    block.load(codes);
#pragma unroll
    for (int first = 0; first < 4; first += FLUSH) {
      const GroupParameters parameters = block.group(args, FLUSH == 4 ? 0 : first * args.groups / 4);
      const Fragments<T, BITS> fragments(parameters);
      constexpr int CHAINS = EIGHTS == 1 ? 2 : 1;  // products that do not wait for each other
      float sums[CHAINS][EIGHTS][4] = {};
#pragma unroll
      for (int j = first; j < first + FLUSH; ++j) {
        uint32_t a[2][4];
        fragments.template make<0>(codes[j], a[0]);
        fragments.template make<1>(codes[j], a[1]);
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
          uint32_t b[4];
          load_matrix_x4(b, x + rows[i] + j * 64);
          mma_16bit<T>(sums[0][i], a[0], b[0], b[1]);
          mma_16bit<T>(sums[CHAINS - 1][i], a[1], b[2], b[3]);
        }
      }
      const float2 scale = parameters.template scale<T>(args);
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float sum = CHAINS == 2 ? sums[0][i][e] + sums[CHAINS - 1][i][e] : sums[0][i][e];
          acc[i][e] = fmaf(sum, e < 2 ? scale.x : scale.y, acc[i][e]);
        }
      }
    }
  }

  static __device__ __forceinline__ uint32_t tokens_of(const GemmW4A16Sm90Args& args) {
    return min(static_cast<uint32_t>(TOKENS), args.y.m - blockIdx.y * TOKENS);
  }

  // What the last warps do: fill stages of x, all at once or as they come free.
  static __device__ __forceinline__ void feed(const GemmW4A16Sm90Args& args, Stages stages, uint32_t tiles) {
    constexpr uint32_t CHUNKS = PARTS * 16;  // of a row of a stage
    const uint32_t thread = threadIdx.x - 32 * WARPS, tokens = tokens_of(args);
    const T* x = static_cast<const T*>(args.x_rows) + static_cast<size_t>(blockIdx.y * TOKENS) * args.k;
    wait_for_dependencies();
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      for (uint32_t step = 0; step < stages.steps; ++step, stages.advance()) {
        if (tile != blockIdx.x || step >= stages.count) barrier_wait(stages.empty(), stages.parity ^ 1);
        for (uint32_t i = thread; i < tokens * CHUNKS; i += FEEDERS) {
          const uint32_t row = i / CHUNKS, chunk = i % CHUNKS, column = step * PARTS * 128 + chunk * 8;
          const bool valid = column < args.k;
          copy_async16(stages.x() + row * PITCH + chunk * 16, x + (valid ? static_cast<size_t>(row) * args.k + column : 0), valid);
        }
        barrier_arrive_after_copies(stages.full());
      }
      if (stages.is_whole()) break;
    }
    commit_copies();
    wait_copies<0>();
  }

  template <int FLUSH>
  static __device__ __forceinline__ void walk(const GemmW4A16Sm90Args& args, uint8_t* shared, Reader reader, Stages stages,
                                              uint32_t warp, uint32_t tiles) {
    const uint32_t lane = threadIdx.x % 32, tokens = tokens_of(args), blocks = blocks_of(args, reader.part);
    const LinearWriter writer(args.y);
    uint32_t rows[EIGHTS];  // of x in a stage, for `ldmatrix`; of tokens that are not there, another: no output has those sums
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
      rows[i] = min(8 * i + lane % 8, tokens - 1) * PITCH + reader.part * 256 + lane / 8 * 16;
      asm volatile("" : "+r"(rows[i]));  // made once, not at every step
    }
    float4* sums = reinterpret_cast<float4*>(shared + HEAD_BYTES) + lane;
    uint32_t sums_parity = 0;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      Sums acc = {};
      for (uint32_t step = 0; step < stages.steps; ++step, stages.advance()) {
        wait_copies<DEPTH - 1>();
        if (tile == blockIdx.x || !stages.is_whole()) barrier_wait(stages.full(), stages.parity);
        __syncwarp();  // parameters that other lanes asked for are there for all
        if (step < blocks) multiply<FLUSH>(args, reader.slots + reader.at, stages.x(), rows, acc);
        __syncwarp();
        if (!stages.is_whole() && lane == 0) barrier_arrive(stages.empty());
        reader.ask();
      }
      // All parts of sixteen rows and eight tokens to one warp, once those of the tile before are read.
      if (tile != blockIdx.x) barrier_wait(stages.sums_read(), sums_parity), sums_parity ^= 1;
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        constexpr float UNIT = 1 / Fragments<T, BITS>::UNIT;
        sums[(warp * EIGHTS + i) * 32] = make_float4(acc[i][0] * UNIT, acc[i][1] * UNIT, acc[i][2] * UNIT, acc[i][3] * UNIT);
      }
      named_barrier(1, 32 * WARPS);
      const uint32_t sixteen = warp % SIXTEENS, eight = warp / SIXTEENS;
      if (eight * 8 < tokens) {
        float total[4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const float4 v = sums[((part * SIXTEENS + sixteen) * EIGHTS + eight) * 32];
          total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(stages.sums_read());
        wait_for_dependencies();
        float* turn = reinterpret_cast<float*>(shared + HEAD_BYTES + SUM_BYTES + warp * TURN_BYTES);
        write_16x8(writer, turn, blockIdx.y * TOKENS + eight * 8, (tile * SIXTEENS + sixteen) * 16, total);
      }
    }
    wait_copies<0>();
  }

  static __device__ __forceinline__ void run(const GemmW4A16Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    const uint32_t tiles = (args.y.n + 16 * SIXTEENS - 1) / (16 * SIXTEENS);
    const Stages stages(args, shared_address(shared));
    launch_dependents();
    if (warp >= WARPS) {
      if (threadIdx.x == 32 * WARPS) stages.init(SIXTEENS * ((tokens_of(args) + 7) / 8));
      __syncthreads();
      return feed(args, stages, tiles);
    }
    Reader reader(args, stages, warp);
#pragma unroll 1
    for (uint32_t i = 0; i < DEPTH; ++i) reader.ask();
    __syncthreads();
    if (args.groups == 1) return walk<4>(args, shared, reader, stages, warp, tiles);
    walk<1>(args, shared, reader, stages, warp, tiles);
  }
};
