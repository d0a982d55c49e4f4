// W4A8 and W2A8 for few rows on sm_90: tiles of 16 ROW_TILES rows of w by TOKENS rows of x, k split over a block's warps.
//
// Blocks:   as many as run at once, each walking over tiles of w; in y they are tiles of x.
// Threads:  ROW_TILES * WARPS_K warps. Each has sixteen rows of the tile and its part of every round of columns.
// Products: mma.sync, which on so few columns is faster than wgmma and lets each warp go at its own pace. Codes come straight
//           to registers, a round ahead; x and scales by cp.async, a round ahead too.
// Numerics: the exact sums of every group go through shared memory, and one thread adds up those of an output in
//           order: the bits are the CPU's although k is split. Of rows that are one group warps add up all of their k first.
// Overlap:  weights of the first round are asked for while the kernel that makes x still runs.
#pragma once

#include "common/async_copy.cuh"
#include "common/load.cuh"
#include "common/mbarrier.cuh"
#include "common/mma.cuh"
#include "gemm_w4a8/sm90_epilogue.cuh"
#include "gemm_w4a8/sm90_block.cuh"

// Codes: Signed4; or Signed2 and Factored4, of rows that are one group.
template <class Codes, int TOKENS, int ROW_TILES, int WARPS_K>
struct GemmW4A8WarpSplitK {
  static constexpr uint32_t THREADS = 32 * ROW_TILES * WARPS_K, ROWS = 16 * ROW_TILES;
  static constexpr uint32_t WARP_SUMS = GEMM_W4A8_SM90_WARP_SUMS;  // in a round: of groups, or of blocks where those are larger
  static constexpr uint32_t UNITS = (Codes::ONE_GROUP ? 1 : WARP_SUMS) * WARPS_K;  // those of a block
  static constexpr uint32_t SUM_BYTES = UNITS * ROWS * TOKENS * 4, SCALE_BYTES = Codes::ONE_GROUP ? 0 : UNITS * ROWS * 4;
  static constexpr uint32_t HEAD_BYTES = SUM_BYTES + 2 * SCALE_BYTES;  // then x
  static_assert(TOKENS == 8 || TOKENS == 16, "sums are swizzled for these");
  static_assert(ROWS * TOKENS <= 2 * THREADS, "a thread has two outputs");

  // GROUPS_PER_BLOCK: of a block of w, 1, 2 or 4.
  template <int GROUPS_PER_BLOCK>
  struct Walk {
    static constexpr uint32_t BLOCKS = WARP_SUMS / GROUPS_PER_BLOCK;  // of a warp in a round
    static constexpr uint32_t ROUND = BLOCKS * WARPS_K;  // of all warps of sixteen rows

    const GemmW4A8Sm90Args& args;
    uint8_t* const shared;
    const uint32_t rounds, tiles, lane, row_tile, warp_k, token, tokens;
    const uint32_t row, pair;  // of the tile, and of its tokens: this thread's two outputs
    static constexpr int HALVES = Codes::BITS / 2;  // of a block: sixteen bytes a thread each
    uint4 codes[BLOCKS][HALVES];
    uint32_t factors[Codes::HAS_FACTORS ? BLOCKS : 1];
    const uint8_t* next;  // what `load_codes` takes, and how many blocks of it there are
    uint32_t next_blocks, next_factors;  // and where a block's factors are from there
    int32_t acc[TOKENS / 8][4] = {};  // where rows are one group: of this warp's part of k

    __device__ __forceinline__ Walk(const GemmW4A8Sm90Args& args, uint8_t* shared)
        : args(args),
          shared(shared),
          rounds((args.k_blocks + ROUND - 1) / ROUND),
          tiles((4 * args.row_blocks + ROW_TILES - 1) / ROW_TILES),
          lane(threadIdx.x % 32),
          row_tile(threadIdx.x / 32 % ROW_TILES),
          warp_k(threadIdx.x / 32 / ROW_TILES),
          token(blockIdx.y * TOKENS),
          tokens(min(static_cast<uint32_t>(TOKENS), args.y.m - blockIdx.y * TOKENS)),
          row(threadIdx.x / (TOKENS / 2)),
          pair(threadIdx.x % (TOKENS / 2)) {}

    // Of a row of the tile, those of two tokens: no bank conflicts, neither from fragments nor a pair a thread.
    __device__ __forceinline__ int2* sums(uint32_t unit, uint32_t row, uint32_t pair) const {
      const uint32_t swizzled = TOKENS == 16 ? pair ^ (row & 2) * 2 : pair;
      return reinterpret_cast<int2*>(shared) + (unit * ROWS + row) * (TOKENS / 2) + swizzled;
    }
    __device__ __forceinline__ float* scales(uint32_t buffer) const {
      return reinterpret_cast<float*>(shared + SUM_BYTES + buffer * SCALE_BYTES);
    }
    // x of a round: of all of k, where that has room (one stage), else in two places in turn.
    __device__ __forceinline__ bool has_all_x() const { return args.stages == 1; }
    __device__ __forceinline__ uint32_t x(uint32_t buffer, uint32_t round) const {
      const uint32_t at = has_all_x() ? round * ROUND * 128 : buffer * TOKENS * args.stage_bytes;
      return shared_address(shared) + HEAD_BYTES + at;
    }
    __device__ __forceinline__ const uint8_t* block(uint32_t row16, uint32_t k_block) const {
      return args.w + (static_cast<size_t>(row16 / 4) * args.k_blocks + k_block) * args.block_bytes;
    }

    __device__ __forceinline__ void aim(uint32_t tile, uint32_t round) {
      const uint32_t row16 = tile * ROW_TILES + row_tile, first = round * ROUND + warp_k * BLOCKS;
      const bool inside = tile < tiles && row16 < 4 * args.row_blocks && first < args.k_blocks;
      next_blocks = inside ? min(BLOCKS, args.k_blocks - first) : 0;
      next = block(row16, first) + row16 % 4 * 512 + lane * 16;
      if (Codes::HAS_FACTORS) next_factors = 1024 * Codes::BITS + row16 % 4 * 32 + lane / 4 * 4 - (row16 % 4 * 512 + lane * 16);
    }
    __device__ __forceinline__ void load_codes(uint32_t i) {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        codes[i][half] = make_uint4(0, 0, 0, 0);
        if (i < next_blocks) codes[i][half] = load_stream(next + i * args.block_bytes + half * 2048);
      }
      if constexpr (Codes::HAS_FACTORS) {
        // 0 times a code is what there is of w beyond k.
        factors[i] = i < next_blocks ? load_stream4(next + i * args.block_bytes + next_factors) : 0;
      }
    }
    __device__ __forceinline__ void load_scales(uint32_t buffer, uint32_t tile, uint32_t round) const {
      const uint32_t chunk = threadIdx.x % 4, at = threadIdx.x / 4 % ROW_TILES, unit = threadIdx.x / 4 / ROW_TILES;
      const uint32_t row16 = tile * ROW_TILES + at, k_block = round * ROUND + unit / GROUPS_PER_BLOCK;
      if (unit >= UNITS || row16 >= 4 * args.row_blocks || k_block >= args.k_blocks || args.w_scales != nullptr) return;
      const uint8_t* from = block(row16, k_block) + 1024 * Codes::BITS + unit % GROUPS_PER_BLOCK * 256 + row16 % 4 * 64 + chunk * 16;
      copy_async16(shared_address(scales(buffer)) + (unit * ROW_TILES + at) * 64 + chunk * 16, from, true);
    }
    __device__ __forceinline__ void load_x(uint32_t buffer, uint32_t round) const {
      constexpr uint32_t CHUNKS = ROUND * 8;
      for (uint32_t i = threadIdx.x; i < tokens * CHUNKS; i += THREADS) {
        const uint32_t at = i / CHUNKS, chunk = i % CHUNKS, column = round * ROUND * 128 + chunk * 16;
        const bool inside = column < args.k;
        copy_async16(x(buffer, round) + at * args.stage_bytes + chunk * 16,
                     args.x_rows + (inside ? static_cast<size_t>(token + at) * args.k + column : 0), inside);
      }
    }

    // uint8 of x become int8 in registers. Their zero where x has none, and a token's, less that.
    __device__ __forceinline__ int32_t signed_zero() const { return args.x_unsigned ? 128 : 0; }
    __device__ __forceinline__ int32_t zero(uint32_t at) const {
      return at < tokens ? zero_of_row(args, token + at) - signed_zero() : 0;
    }

    // Where this warp puts sums of its sixteen rows and eight tokens.
    __device__ __forceinline__ void put(uint32_t unit, uint32_t j, const int32_t (&d)[4]) const {
      const uint32_t row = row_tile * 16 + lane / 4;
      *sums(unit, row, 4 * j + lane % 4) = make_int2(d[0], d[1]);
      *sums(unit, row + 8, 4 * j + lane % 4) = make_int2(d[2], d[3]);
    }
    // Takes off what zero points of x add, `w` being sums of the operand w.
    __device__ __forceinline__ void correct(int32_t (&d)[4], uint32_t j, int2 w) const {
      const int32_t z0 = zero(8 * j + lane % 4 * 2), z1 = zero(8 * j + lane % 4 * 2 + 1);
      d[0] -= z0 * w.x, d[1] -= z1 * w.x, d[2] -= z0 * w.y, d[3] -= z1 * w.y;
    }
    __device__ __forceinline__ bool has_zeros() const { return args.x_zero_points != nullptr || args.x_zero_point != signed_zero(); }

    // Sums of this warp's blocks of a round; codes that `next` says come in their place.
    __device__ __forceinline__ void multiply(uint32_t x) {
      uint32_t matrix[TOKENS / 8];  // rows that are not there: what it reads reaches no output
#pragma unroll
      for (uint32_t j = 0; j < TOKENS / 8; ++j) {
        matrix[j] = x + min(8 * j + lane % 8, tokens - 1) * args.stage_bytes + warp_k * BLOCKS * 128 + lane / 8 * 16;
      }
#pragma unroll
      for (uint32_t i = 0; i < BLOCKS; ++i) {
        uint32_t a[4][4];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          if constexpr (Codes::HAS_FACTORS) {
            unpack(codes[i][half], Factors(factors[i]), *reinterpret_cast<uint32_t(*)[2][4]>(&a[2 * half]));
          } else {
            unpack(codes[i][half], *reinterpret_cast<uint32_t(*)[4 / HALVES][4]>(&a[2 * half]));
          }
        }
        load_codes(i);
        int2 w_sums[GROUPS_PER_BLOCK];
        if (has_zeros()) {
#pragma unroll
          for (int g = 0; g < GROUPS_PER_BLOCK; ++g) {
            w_sums[g] = make_int2(0, 0);
            add_rows(*reinterpret_cast<uint32_t(*)[4 / GROUPS_PER_BLOCK][4]>(&a[4 / GROUPS_PER_BLOCK * g]), w_sums[g]);
          }
        }
#pragma unroll
        for (uint32_t j = 0; j < TOKENS / 8; ++j) {
          uint32_t b[2][4];
          load_matrix_x4(b[0], matrix[j] + i * 128);
          load_matrix_x4(b[1], matrix[j] + i * 128 + 64);
          if (args.x_unsigned) {
#pragma unroll
            for (int e = 0; e < 8; ++e) b[e / 4][e % 4] ^= 0x80808080u;
          }
#pragma unroll
          for (int g = 0; g < GROUPS_PER_BLOCK; ++g) {
            int32_t sums[4] = {0, 0, 0, 0};
            int32_t(&d)[4] = Codes::ONE_GROUP ? acc[j] : sums;
#pragma unroll
            for (int s = 4 / GROUPS_PER_BLOCK * g; s < 4 / GROUPS_PER_BLOCK * (g + 1); ++s) {
              mma_s8(d, a[s], b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1]);
            }
            if (has_zeros()) correct(d, j, w_sums[g]);
            if (!Codes::ONE_GROUP) put((warp_k * BLOCKS + i) * GROUPS_PER_BLOCK + g, j, d);
          }
        }
      }
    }

    // All of this warp's, which begin again.
    __device__ __forceinline__ void put_all() {
#pragma unroll
      for (uint32_t j = 0; j < TOKENS / 8; ++j) {
        put(warp_k, j, acc[j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] = 0;
      }
    }

    // Adds a round's sums in order: to `sum` those of a group, to `y` groups.
    __device__ __forceinline__ void add(uint32_t buffer, uint32_t round, int2& sum, float2& y) const {
      const uint32_t first = round * ROUND, blocks = min(ROUND, args.k_blocks - first);
      const bool one_group = args.w_scales != nullptr;
      if constexpr (Codes::ONE_GROUP) {
#pragma unroll
        for (uint32_t unit = 0; unit < UNITS; ++unit) {
          const int2 more = *sums(unit, row, pair);
          sum.x += more.x, sum.y += more.y;
        }
        return;
      }
      const float* scale = scales(buffer) + row / 16 * 16 + row % 8 * 2 + row / 8 % 2;
      const auto end_group = [&](uint32_t unit) {
        y.x = __fmaf_rn(__int2float_rn(sum.x), scale[unit * ROWS], y.x);
        y.y = __fmaf_rn(__int2float_rn(sum.y), scale[unit * ROWS], y.y);
      };
      if constexpr (GROUPS_PER_BLOCK == 1) {
        if (one_group || args.group_blocks != 1) {
#pragma unroll 4
          for (uint32_t unit = 0; unit < blocks; ++unit) {
            const int2 more = *sums(unit, row, pair);
            sum.x += more.x, sum.y += more.y;
            const uint32_t end = first + unit + 1;
            if (!one_group && (end % args.group_blocks == 0 || end == args.k_blocks)) {
              end_group(unit);
              sum = make_int2(0, 0);
            }
          }
          return;
        }
      }
#pragma unroll 8
      for (uint32_t unit = 0; unit < blocks * GROUPS_PER_BLOCK; ++unit) {
        sum = *sums(unit, row, pair);
        end_group(unit);
      }
    }

    __device__ __forceinline__ void run() {
      aim(blockIdx.x, 0);
#pragma unroll
      for (uint32_t i = 0; i < BLOCKS; ++i) load_codes(i);
      load_scales(0, blockIdx.x, 0);
      wait_for_dependencies();
      load_x(0, 0);
      commit_copies();
      const bool mine = row < ROWS && 2 * pair < tokens;
      float x_scales[2] = {0.0f, 0.0f};
      if (mine) x_scales[0] = args.x_scales[token + 2 * pair];
      if (mine && 2 * pair + 1 < tokens) x_scales[1] = args.x_scales[token + 2 * pair + 1];
      const LinearWriter writer(args.y);
      const bool plain = is_plain(args.y), exact = args.y.mode == LOWBIT_OUT_FIXED, one_group = args.w_scales != nullptr;
      uint32_t buffer = 0;
      for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float2 y = make_float2(0.0f, 0.0f);
        int2 sum = make_int2(0, 0);
        for (uint32_t round = 0; round < rounds; ++round, buffer ^= 1) {
          const uint32_t next_round = round + 1 < rounds ? round + 1 : 0, next_tile = next_round == 0 ? tile + gridDim.x : tile;
          wait_copies<0>();
          __syncthreads();  // what came for this round is there for all, and sums of the round before are read
          if (next_tile < tiles) {
            load_scales(buffer ^ 1, next_tile, next_round);
            if (has_all_x() ? tile == blockIdx.x && next_round != 0 : true) load_x(buffer ^ 1, next_round);
          }
          commit_copies();
          aim(next_tile, next_round);
          multiply(x(buffer, round));
          if (Codes::ONE_GROUP && next_round != 0) continue;
          if (Codes::ONE_GROUP) put_all();
          __syncthreads();
          if (mine) add(buffer, round, sum, y);
        }
        const uint32_t col = tile * ROWS + row;
        float v[2] = {y.x, y.y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t a = i == 0 ? sum.x : sum.y;
          if (exact) {
            v[i] = __int_as_float(a >> Codes::SUM_SHIFT);
            continue;
          }
          if (one_group) v[i] = __fmul_rn(__int2float_rn(a), SUM_UNIT<Codes>);
          v[i] = __fmul_rn(v[i], x_scales[i]);
          if (one_group) v[i] = __fmul_rn(v[i], mine && col < args.y.n ? args.w_scales[col] : 0.0f);
          if (plain && mine && 2 * pair + i < tokens) writer.store1(token + 2 * pair + i, col, v[i]);
        }
        if (plain) continue;
        __syncthreads();  // all have read the sums, which now make room for values
        constexpr uint32_t PITCH = ROWS + 4;
        float* values = reinterpret_cast<float*>(shared);
        if (row < ROWS) values[2 * pair * PITCH + row] = v[0], values[(2 * pair + 1) * PITCH + row] = v[1];
        __syncthreads();
        finish_tile<THREADS, TOKENS, ROWS>(FusedWriter(args.y, args.x_scales), args.y, values, PITCH, threadIdx.x, tile * ROWS,
                                           [&](uint32_t at) { return token + at; });
      }
      wait_copies<0>();
    }
  };

  static __device__ __forceinline__ void run(const GemmW4A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    launch_dependents();
    if constexpr (Codes::ONE_GROUP) {
      Walk<1>(args, shared).run();
    } else {
      switch (args.groups_per_block) {
        case 1: return Walk<1>(args, shared).run();
        case 2: return Walk<2>(args, shared).run();
        default: return Walk<4>(args, shared).run();
      }
    }
  }
};
