// How a product's tiles are shared out among the blocks of a grid, all of which run at once, and how the parts of a tile
// that several blocks computed become one.
//
// As many tiles as make whole rounds of the grid are computed whole. What is left, stream-K's tiles (Osama et al., 2023), is cut
// along k so that every block has the same number of slices. A part that is not a whole tile goes to a slot of the workspace; the
// block that comes last adds all of the tile's slots in ascending k, so that the result does not depend on who was last, and sets
// the tile's counter back to 0 for the next launch.
#pragma once

#include "common/tile_order.cuh"
#include "gemm_w4a16/abi.h"

// A part of a tile: slices [begin, end) of its sum.
struct TilePart {
  uint32_t row, col;  // first of the tile in y
  uint32_t begin, end;
  uint32_t tail;      // number of the tile among the stream-K tiles; unused in a whole one
  bool whole, valid;
};

template <int BM, int BN>
struct StreamK {
  // The index-th part of this block. Those of stream-K tiles come first.
  static __device__ __forceinline__ TilePart part(const GemmW4A16Sm80Args& args, uint32_t index) {
    const BandedTiles<BN, BM, 8> tiles(args.layer.y.m, args.layer.y.n);
    const uint32_t slices = (args.layer.k + 63) / 64;
    const uint32_t units = args.stream_k_tiles * slices, whole = tiles.count() - args.stream_k_tiles;
    const uint32_t first = units * blockIdx.x / gridDim.x, last = units * (blockIdx.x + 1) / gridDim.x;
    const uint32_t tail = first / slices + index;
    TilePart part;
    uint32_t tile;
    if (tail * slices < last) {
      part.tail = tail;
      part.begin = max(first, tail * slices) - tail * slices;
      part.end = min(last, (tail + 1) * slices) - tail * slices;
      tile = whole + tail;
      part.valid = true;
    } else {
      const uint32_t parts = last == 0 ? 0 : (last + slices - 1) / slices - first / slices;
      part.begin = 0;
      part.end = slices;
      tile = blockIdx.x + (index - parts) * gridDim.x;
      part.valid = tile < whole;
    }
    part.whole = part.begin == 0 && part.end == slices;
    const uint2 at = tiles.at(tile);
    part.row = at.x * BM;
    part.col = at.y * BN;
    return part;
  }

  // Adds up the parts of a tile. False in the blocks that are not the last; they have nothing more to do with it.
  template <int FRAGMENTS>
  static __device__ __forceinline__ bool reduce(const GemmW4A16Sm80Args& args, const TilePart& part,
                                                float (&sums)[FRAGMENTS][4]) {
    const uint32_t slices = (args.layer.k + 63) / 64, units = args.stream_k_tiles * slices;
    // The blocks that have the tile's first and last slice.
    const uint32_t first = ((part.tail * slices + 1) * gridDim.x - 1) / units;
    const uint32_t last = ((part.tail + 1) * slices * gridDim.x - 1) / units;
    // From one part to the next the block, or the tile, or both go up by one: no two parts share a slot.
    const auto slot = [&](uint32_t block) {
      const size_t at = static_cast<size_t>(block + part.tail) * FRAGMENTS * blockDim.x + threadIdx.x;
      return reinterpret_cast<float4*>(args.partials) + at;
    };
    float4* mine = slot(blockIdx.x);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      __stcg(mine + f * blockDim.x, make_float4(sums[f][0], sums[f][1], sums[f][2], sums[f][3]));
    }
    __threadfence();
    __syncthreads();
    __shared__ uint32_t arrived;
    if (threadIdx.x == 0) arrived = atomicAdd(args.counters + part.tail, 1);
    __syncthreads();
    if (arrived != last - first) return false;
    __threadfence();
    if (threadIdx.x == 0) args.counters[part.tail] = 0;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) sums[f][0] = sums[f][1] = sums[f][2] = sums[f][3] = 0.0f;
    // As many at once as registers take: each is a way to L2 and back.
    constexpr uint32_t AT_ONCE = FRAGMENTS < 32 ? 32 / FRAGMENTS : 1;
    for (uint32_t block = first; block <= last; block += AT_ONCE) {
      float4 v[AT_ONCE][FRAGMENTS];
#pragma unroll
      for (uint32_t i = 0; i < AT_ONCE; ++i) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          v[i][f] = block + i <= last ? __ldcg(slot(block + i) + f * blockDim.x) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < AT_ONCE; ++i) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          sums[f][0] += v[i][f].x, sums[f][1] += v[i][f].y, sums[f][2] += v[i][f].z, sums[f][3] += v[i][f].w;
        }
      }
    }
    return true;
  }
};
