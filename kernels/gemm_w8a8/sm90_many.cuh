// W8A8 for many rows on sm_90a: tiles of 128 rows of x by BN rows of w.
//
// Blocks:   one per multiprocessor, each walking over tiles.
// Threads:  two warpgroups that multiply, then one whose first lane feeds the copy engine and which leaves its registers
//           to the others. The two have 64 x BN sums of a tile each, or with TURNS all of every other tile: what one does
//           with its sums then falls beside the other's products.
// Shared:   a ring of STAGES slices of 128 bytes of k: x as the engine's 128-byte swizzle leaves it, w as it is stored.
#pragma once

#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "gemm_w8a8/epilogue_sm90.cuh"
#include "gemm_w8a8/outliers_sm90.cuh"

// OUTLIERS: LLM.int8().
template <int BN, int STAGES, bool TURNS, bool OUTLIERS = false>
struct GemmW8A8Many {
  static constexpr int BM = 128;
  static constexpr int GROUPS = 2;  // consumer warpgroups
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int HALVES = TURNS ? 2 : 1;  // times 64 rows of x for a warpgroup
  static constexpr uint32_t X_BYTES = BM * 128;
  static constexpr uint32_t BLOCK_BYTES = 64 * 128;  // of w: 64 rows of a slice, contiguous in memory
  static constexpr uint32_t STAGE_BYTES = X_BYTES + BN * 128;
  static constexpr uint32_t W_BLOCKS = BN / 64;
  static constexpr uint32_t BAND = 16;  // tiles of a column that run together
  // In the memory where rows of y wait before and after. As many columns of w at a time as there are registers for.
  using Outliers = std::conditional_t<OUTLIERS, WarpOutliers<16 * HALVES, BN, 512 / BN>, NoOutliers>;
  static constexpr uint32_t WARP_BYTES = Outliers::BYTES > WarpRows::BYTES ? Outliers::BYTES : WarpRows::BYTES;
  static constexpr uint32_t EPILOGUE_BYTES = TileColumns<BN>::BYTES + 4 * WARP_BYTES;  // of a warpgroup
  static constexpr uint32_t SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + GROUPS * EPILOGUE_BYTES;
  static_assert(WARP_BYTES == (OUTLIERS ? 2560 : 2048), "as src/device/cuda/choose_sm90.rs counts");

  struct Tiles {
    uint32_t down, across;
    __device__ explicit Tiles(const LinearOut& y) : down((y.m + BM - 1) / BM), across((y.n + BN - 1) / BN) {}
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

  static __device__ __forceinline__ void produce(const GemmW8A8Sm90Args& args, uint32_t base) {
    const Tiles tiles(args.y);
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t w_blocks = (args.y.n + 63) / 64;
    RingPosition<STAGES> at;
    prefetch_map(args.x);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
      const uint2 tile = tiles.at(index);
      const uint32_t first_block = tile.y * W_BLOCKS, blocks = min(W_BLOCKS, w_blocks - first_block);
      const int8_t* w = args.w + static_cast<size_t>(first_block) * slices * BLOCK_BYTES;
      for (uint32_t slice = 0; slice < slices; ++slice) {
        const uint32_t shared = stage(base, at.slot), barrier = full(base, at.slot);
        barrier_wait(empty(base, at.slot), at.parity ^ 1);
        barrier_expect(barrier, X_BYTES + blocks * BLOCK_BYTES);
        copy_box(shared, args.x, slice * 128, tile.x * BM, barrier, L2_EVICT_NORMAL);
#pragma unroll
        for (uint32_t i = 0; i < W_BLOCKS; ++i) {
          if (i >= blocks) break;
          copy_bulk(shared + X_BYTES + i * BLOCK_BYTES, w + (static_cast<size_t>(i) * slices + slice) * BLOCK_BYTES,
                    BLOCK_BYTES, barrier, L2_EVICT_NORMAL);
        }
        at.advance();
      }
    }
  }

  // This warpgroup is through with a slot.
  static __device__ __forceinline__ void release(uint32_t base, uint32_t slot) {
    if (threadIdx.x % 128 == 0) barrier_arrive(empty(base, slot));
  }

  // Named barrier at which a warpgroup waits for its turn: the other has then seen its last slice. Before, the parity of the
  // first slice's barrier could be that of a round long past.
  static __device__ __forceinline__ uint32_t turn_of(uint32_t group) { return 1 + GROUPS + group; }

  // The sums of a tile, from the slices that come next. X: int8_t or uint8_t, what x is.
  template <typename X>
  static __device__ __forceinline__ void multiply(int32_t (&sums)[HALVES][BN / 2], uint32_t base, uint32_t group, uint32_t slices,
                                                  RingPosition<STAGES>& at) {
    uint32_t previous = 0;
    for (uint32_t slice = 0; slice < slices; ++slice) {
      const uint32_t shared = stage(base, at.slot);
      const uint64_t w = matrix_descriptor(shared + X_BYTES);
      barrier_wait(full(base, at.slot), at.parity);
      if (TURNS && slice + 1 == slices) named_barrier_arrive(turn_of(group ^ 1), 128 * GROUPS);
      products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          const uint64_t x = matrix_descriptor(shared + (TURNS ? half : group) * 64 * 128);
          Product8Bit<X, int8_t, BN>::run(sums[half], x + 2 * step, w + 2 * step, slice + step != 0);
        }
      }
      products_commit();
      products_wait<1>();
      if (slice != 0) release(base, previous);
      previous = at.slot;
      at.advance();
    }
    products_wait<0>();
    release(base, previous);
  }

  // A warp's outputs of 16 rows, as WarpTile has them, before outliers and bias.
  static __device__ __forceinline__ void scale_sums(const TileColumns<BN>& columns, const float (&x_scales)[2],
                                                    const int32_t (&sums)[BN / 2], float (&y)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 2; i += 2) {
      const float2 scale = columns.scale(i / 4 * 8 + threadIdx.x % 4 * 2);
      y[i] = dequantize_w8a8(sums[i], 0, x_scales[i / 2 % 2], scale.x);
      y[i + 1] = dequantize_w8a8(sums[i + 1], 0, x_scales[i / 2 % 2], scale.y);
    }
  }

  // Adds the products of a column of outliers: `x` of the warp's rows, `w` of the tile's columns.
  static __device__ __forceinline__ void add_column(float (&y)[HALVES][BN / 2], const float* x, const float* w) {
    float values[HALVES][2];
#pragma unroll
    for (int i = 0; i < 2 * HALVES; ++i) values[i / 2][i % 2] = x[i * 8 + threadIdx.x % 32 / 4];
#pragma unroll
    for (int b = 0; b < BN / 8; ++b) {
      const float2 weight = *reinterpret_cast<const float2*>(w + 8 * b + threadIdx.x % 4 * 2);
#pragma unroll
      for (int i = 0; i < 2 * HALVES; ++i) {
        float *const to = y[i / 2] + 4 * b + i % 2 * 2, value = values[i / 2][i % 2];
        if (value != 0.0f) to[0] = __fmaf_rn(value, weight.x, to[0]), to[1] = __fmaf_rn(value, weight.y, to[1]);
      }
    }
  }

  static __device__ __forceinline__ void consume(const GemmW8A8Sm90Args& args, uint32_t base) {
    const Tiles tiles(args.y);
    const uint32_t slices = (args.k + 127) / 128;
    const uint32_t group = threadIdx.x / 128;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    const uint32_t warp = threadIdx.x % 128 / 32, epilogue = 1024 + STAGES * STAGE_BYTES + group * EPILOGUE_BYTES;
    TileColumns<BN> columns(shared_memory + epilogue, 1 + group);
    uint8_t* const warp_memory = shared_memory + epilogue + TileColumns<BN>::BYTES + warp * WARP_BYTES;
    const WarpRows rows(warp_memory);
    const uint32_t turn = TURNS ? group : 0, turns = TURNS ? GROUPS : 1;
    RingPosition<STAGES> at;
    at.advance(turn * slices);
    if (TURNS && group != 0) named_barrier_arrive(turn_of(0), 128 * GROUPS);
    wait_for_dependencies();
    for (uint32_t index = blockIdx.x + turn * gridDim.x; index < tiles.count(); index += turns * gridDim.x) {
      const uint2 tile = tiles.at(index);
      const uint32_t first = tile.x * BM + (TURNS ? 0 : group * 64) + warp * 16;
      columns.load(args, tile.y * BN);
      float x_scales[HALVES][2];
      int32_t x_zeros[HALVES][2];
#pragma unroll
      for (int i = 0; i < 2 * HALVES; ++i) {
        const uint32_t row = first + threadIdx.x % 32 / 4 + i / 2 * 64 + i % 2 * 8;
        x_scales[i / 2][i % 2] = row < args.y.m ? args.x_scales[row] : 0.0f;
        x_zeros[i / 2][i % 2] = row < args.y.m && !OUTLIERS ? zero_of_row(args, row) : 0;
      }
      const uint32_t lane = threadIdx.x % 32;
      Outliers outliers(args, first + lane / 16 * 64 + lane % 16, tile.y * BN, warp_memory);
      if constexpr (OUTLIERS) outliers.begin();
      int32_t sums[HALVES][BN / 2];
      if constexpr (OUTLIERS) {
        // The first product ignores them, but the compiler takes what it has not seen written for alive since the tile before.
#pragma unroll
        for (int i = 0; i < HALVES * BN / 2; ++i) sums[i / (BN / 2)][i % (BN / 2)] = 0;
      }
      if (TURNS) named_barrier(turn_of(group), 128 * GROUPS);
      if (!OUTLIERS && args.x_unsigned) {
        multiply<uint8_t>(sums, base, group, slices, at);
      } else {
        multiply<int8_t>(sums, base, group, slices, at);
      }
      if (TURNS) at.advance(slices);  // the other's
      columns.publish();
      if constexpr (OUTLIERS) {
        float y[HALVES][BN / 2];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) scale_sums(columns, x_scales[half], sums[half], y[half]);
        outliers.each([&](const float* x, const float* w) { add_column(y, x, w); });
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          WarpTile<BN, float>{args, columns, first + 64 * half, tile.y * BN, {}, {}}.store(rows, y[half]);
        }
      } else {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          const WarpTile<BN> out{args, columns, first + 64 * half, tile.y * BN, {x_scales[half][0], x_scales[half][1]},
                                 {x_zeros[half][0], x_zeros[half][1]}};
          out.store(rows, sums[half]);
        }
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmW8A8Sm90Args& args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < STAGES; ++slot) {
        barrier_init(full(base, slot), 1);
        barrier_init(empty(base, slot), TURNS ? 1 : GROUPS);
      }
      barrier_init_fence();
    }
    launch_dependents();
    __syncthreads();
    if (threadIdx.x < 128 * GROUPS) {
      more_registers<232>();
      consume(args, base);
    } else {
      fewer_registers<40>();
      if (threadIdx.x < 128 * GROUPS + 32 && elect_lane()) produce(args, base);
    }
  }
};
