// The order in which tiles of an output are computed.
#pragma once

#include <stdint.h>

// Of tiles numbered so that those that run together share what they read (down a band of BAND tiles of rows of x, then on to the next
// rows of w) the place of one: number of its rows of x, and of its rows of w.
template <uint32_t BAND>
__device__ __forceinline__ uint2 banded_tile(uint32_t down, uint32_t across, uint32_t index) {
  const uint32_t band = index / (BAND * across);
  const uint32_t height = min(BAND, down - band * BAND);
  const uint32_t inside = index - band * BAND * across;
  return make_uint2(band * BAND + inside % height, inside / height);
}

// All tiles of ROWS rows of w by TOKENS rows of x.
template <uint32_t ROWS, uint32_t TOKENS, uint32_t BAND>
struct BandedTiles {
  uint32_t down, across;

  __device__ __forceinline__ BandedTiles(uint32_t m, uint32_t n)
      : down((m + TOKENS - 1) / TOKENS), across((n + ROWS - 1) / ROWS) {}
  __device__ __forceinline__ uint32_t count() const { return down * across; }
  __device__ __forceinline__ uint2 at(uint32_t index) const { return banded_tile<BAND>(down, across, index); }
};

// The tile of this block, of BM rows of x by BN rows of w, where each block has one.
template <int BM, int BN>
__device__ __forceinline__ uint2 tile_of_block(uint32_t m, uint32_t n) {
  return banded_tile<8>((m + BM - 1) / BM, (n + BN - 1) / BN, blockIdx.x);
}
