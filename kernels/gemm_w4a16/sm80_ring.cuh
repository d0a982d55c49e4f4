// The ring of stages of gemm_w4a16/sm80: 64 columns of x and of w each, filled by cp.async, and the way from it into registers.
#pragma once

#include "common/async_copy.cuh"
#include "common/load.cuh"
#include "gemm_w4a16/dequant.cuh"
#include "gemm_w4a16/sm80_stream_k.cuh"

// How BM rows of x and BN of w are shared out among warps, and what a stage holds.
template <typename Codes_, int BM_, int BN_, int WARPS_M_, int WARPS_N_>
struct TileShape {
  using Codes = Codes_;
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // of a warp
  static constexpr int MT = WM / 8, NT = WN / 16;
  static constexpr int TILE_BYTES = 128 * Codes::BITS;  // 16 rows of w, 64 columns
  static constexpr int X_BYTES = BM * 128;       // 64 columns of x
  static constexpr int STAGE_BYTES = X_BYTES + BN / 16 * TILE_BYTES;
  static_assert(WM % 8 == 0 && WN % 16 == 0, "tile");

  // Chunk of 16 bytes in a row of 128 of x: odd rows swap halves, so that eight lanes (two rows, four chunks) that load
  // 16 bytes each meet eight groups of banks.
  static __device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    return row * 128 + ((chunk ^ (row % 2 * 4)) << 4);
  }
};

// Copies slices into the ring, in the order in which they are computed.
template <typename T, typename Shape>
struct SliceLoader {
  static constexpr int BM = Shape::BM, BN = Shape::BN, THREADS = Shape::THREADS, TILE_BYTES = Shape::TILE_BYTES;
  static constexpr uint32_t X_ROWS = THREADS / 8, X_COPIES = (BM + X_ROWS - 1) / X_ROWS;
  static constexpr uint32_t W_CHUNKS = TILE_BYTES / 16, W_TILES = THREADS / W_CHUNKS, W_COPIES = BN / 16 / W_TILES;
  static_assert(THREADS % W_CHUNKS == 0 && BN / 16 % W_TILES == 0 && X_ROWS % 2 == 0, "a thread's copies");

  const uint8_t *x, *w;           // this thread's first chunks of the next slice
  uint32_t x_copies, w_copies;    // of those that there are in y
  uint32_t columns, slices_left, index = 0;
  uint32_t x_to, w_to;            // where in a stage
  bool inside;                    // the block has all that it copies

  __device__ __forceinline__ void seek(const GemmW4A16Sm80Args& args) {
    const TilePart part = StreamK<BM, BN>::part(args, index++);
    const GemmW4A16Args& layer = args.layer;
    const uint32_t first = threadIdx.x / 8, row = part.row + first, column = part.begin * 64 + threadIdx.x % 8 * 8;
    const uint32_t tile = part.col / 16 + threadIdx.x / W_CHUNKS, tiles = layer.n_pad / 16;
    x = static_cast<const uint8_t*>(layer.x) + (static_cast<size_t>(row) * layer.k + column) * sizeof(T);
    w = layer.w + (static_cast<size_t>(tile) * ((layer.k + 63) / 64) + part.begin) * TILE_BYTES + threadIdx.x % W_CHUNKS * 16;
    x_copies = row < layer.y.m ? (layer.y.m - row + X_ROWS - 1) / X_ROWS : 0;
    w_copies = tile < tiles ? (tiles - tile + W_TILES - 1) / W_TILES : 0;
    x_to = Shape::chunk_offset(first, threadIdx.x % 8);
    w_to = Shape::X_BYTES + threadIdx.x * 16;
    inside = part.row + BM <= layer.y.m && part.col + BN <= layer.n_pad && layer.k % 64 == 0;
    columns = layer.k - min(column, layer.k);
    slices_left = part.valid ? part.end - part.begin : 0;
  }

  __device__ __forceinline__ void next(uint32_t stage, const GemmW4A16Args& layer) {
    if (slices_left != 0) {
      const size_t x_step = static_cast<size_t>(layer.k) * (X_ROWS * sizeof(T));
      const size_t w_step = static_cast<size_t>((layer.k + 63) / 64) * (W_TILES * TILE_BYTES);
      const uint8_t *xi = x, *wi = w;
      if (__builtin_expect(inside, 1)) {
#pragma unroll
        for (uint32_t i = 0; i < X_COPIES; ++i, xi += x_step) {
          if (BM % X_ROWS != 0 && threadIdx.x / 8 + i * X_ROWS >= BM) break;
          copy_async16(stage + x_to + i * X_ROWS * 128, xi);
        }
#pragma unroll
        for (uint32_t i = 0; i < W_COPIES; ++i, wi += w_step) copy_async16(stage + w_to + i * THREADS * 16, wi);
      } else {
#pragma unroll
        for (uint32_t i = 0; i < X_COPIES; ++i, xi += x_step) {
          if (BM % X_ROWS != 0 && threadIdx.x / 8 + i * X_ROWS >= BM) break;
          const bool valid = columns != 0 && i < x_copies;
          copy_async16(stage + x_to + i * X_ROWS * 128, valid ? xi : layer.x, valid);
        }
#pragma unroll
        for (uint32_t i = 0; i < W_COPIES; ++i, wi += w_step) {
          const bool valid = i < w_copies;
          copy_async16(stage + w_to + i * THREADS * 16, valid ? wi : layer.w, valid);
        }
        columns -= min(columns, 64u);
      }
      x += 128, w += TILE_BYTES;
      --slices_left;
    }
    commit_copies();
  }
};

// A warp's operands from shared memory: of x 32 columns, of w 16 as floats and the codes of the next.
template <typename T, typename Shape>
struct Operands {
  using Codes = typename Shape::Codes;
  static constexpr int MT = Shape::MT, NT = Shape::NT, TILE_BYTES = Shape::TILE_BYTES;

  uint4 x[MT];
  uint32_t w[NT][4];
  CodeTile<T, Codes> codes[NT];
  uint32_t x_from, codes_from;  // of this lane, in a stage

  __device__ __forceinline__ Operands() {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x_from = warp % Shape::WARPS_M * Shape::WM * 128 + Shape::chunk_offset(lane / 4, lane % 4);
    codes_from = Shape::X_BYTES + warp / Shape::WARPS_M * (NT * TILE_BYTES) + lane * 16;
  }
  __device__ __forceinline__ void load_x(uint32_t stage, int i, int step) {
    x[i] = load_shared16(stage + (x_from ^ (step * 64)) + i * 1024);
  }
  // A lane's 16 bytes hold two steps of 4-bit codes, one step of 8-bit codes.
  __device__ __forceinline__ void load_codes(uint32_t stage, int j, int step) {
    const uint32_t at = stage + codes_from + j * TILE_BYTES;
    if constexpr (Codes::BITS == 4) {
      const uint2 v = load_shared8(at + step * 8);
      codes[j].words[0] = v.x, codes[j].words[1] = v.y;
    } else {
      const uint4 v = load_shared16(at + step * 512);
      codes[j].words[0] = v.x, codes[j].words[1] = v.y, codes[j].words[2] = v.z, codes[j].words[3] = v.w;
    }
  }
};
