// Products of blocks of w with few tokens by mma.sync (sm_90): operands are code minus zero point, exact; each group's sum is scaled
// in f32.
#pragma once

#include "common/mma.cuh"
#include "gemm_w4a16/sm90_block.cuh"

// Adds `sums` of ROW_TILES times sixteen rows, each in one group, to `acc`.
template <typename T, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void add_scaled(const GemmW4A16Sm90Args& args, const GroupParameters (&parameters)[ROW_TILES],
                                           const float (&sums)[ROW_TILES][TOKEN_TILES][4],
                                           float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    const float2 scale = parameters[r].template scale<T>(args);
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[r][i][e] = fmaf(sums[r][i][e], e < 2 ? scale.x : scale.y, acc[r][i][e]);
    }
  }
}

// Adds to `acc` what 128 columns of a warp's ROW_TILES times sixteen rows of w make with 8 TOKEN_TILES tokens: of FLUSH parts of 32
// columns (4 where a block of w is in one group, else 1), then their scales. `block(r)` is what a lane has of the block with rows r;
// `x(i, j)` where it has, for `ldmatrix`, part j of eight tokens i. CODES_FIRST: all codes are loaded before the first product.
template <typename T, typename Codes, int FLUSH, bool CODES_FIRST, int ROW_TILES, int TOKEN_TILES, typename Block, typename X>
__device__ __forceinline__ void multiply_by_warp(const GemmW4A16Sm90Args& args, Block block, X x,
                                                 float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
  CodeTile<T, Codes> codes[ROW_TILES][4];
  if (CODES_FIRST) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) block(r).load(codes[r]);
  }
#pragma unroll
  for (int first = 0; first < 4; first += FLUSH) {
    GroupParameters parameters[ROW_TILES];
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) parameters[r] = block(r).group(args, FLUSH == 4 ? 0 : first * args.groups / 4);
#pragma unroll
    for (int j = first; j < first + FLUSH; ++j) {
      constexpr int PARTS = 8 / Codes::BITS;  // that sixteen bytes of codes hold
      if (!CODES_FIRST && j % PARTS == 0) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) block(r).load(j / PARTS, codes[r]);
      }
      uint32_t b[TOKEN_TILES][4];
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; ++i) load_matrix_x4(b[i], x(i, j));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const Fragments<T, Codes> fragments(parameters[r]);
        uint32_t a[2][4];
        fragments.template make<0>(codes[r][j], a[0]);
        fragments.template make<1>(codes[r][j], a[1]);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
          mma_16bit<T>(sums[r][i], a[0], b[i][0], b[i][1]);
          mma_16bit<T>(sums[r][i], a[1], b[i][2], b[i][3]);
        }
      }
    }
    add_scaled<T>(args, parameters, sums, acc);
  }
}
