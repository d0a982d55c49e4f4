// How kernels of W4A8 and W2A8 on sm_90a are made of a configuration.
#pragma once

#include "gemm_w4a8/sm90_few.cuh"
#include "gemm_w4a8/sm90_split.cuh"
#include "gemm_w4a8/sm90_tile.cuh"

// CODES of w (sm90_block.cuh); X: int8_t or uint8_t.
#define GEMM_SM90_TILE(NAME, CODES, X, TOKENS, GROUPS, RESIDENT)                                            \
  extern "C" __global__ void __launch_bounds__((GemmW4A8Tile<CODES, X, TOKENS, GROUPS>::THREADS), RESIDENT) \
      NAME##_##TOKENS##x##GROUPS(const __grid_constant__ GemmW4A8Sm90Args args) {                          \
    GemmW4A8Tile<CODES, X, TOKENS, GROUPS>::run(args);                                                      \
  }
// Few rows of either.
#define GEMM_SM90_FEW(NAME, CODES, TOKENS, SIXTEENS, PARTS, RESIDENT)                                              \
  extern "C" __global__ void __launch_bounds__((GemmW4A8Few<CODES, TOKENS, SIXTEENS, PARTS>::THREADS), RESIDENT)   \
      NAME##_few_##TOKENS##x##SIXTEENS##x##PARTS(const __grid_constant__ GemmW4A8Sm90Args args) {                 \
    GemmW4A8Few<CODES, TOKENS, SIXTEENS, PARTS>::run(args);                                                        \
  }
// Of rows that are one group, k split.
#define GEMM_SM90_SPLIT(NAME, CODES, TOKENS, GROUPS, PARTS, RESIDENT)                                             \
  extern "C" __global__ void __launch_bounds__((GemmW4A8Split<CODES, TOKENS, GROUPS, PARTS>::THREADS), RESIDENT) \
      NAME##_split_##TOKENS##x##GROUPS##x##PARTS(const __grid_constant__ GemmW4A8Sm90Args args) {                \
    GemmW4A8Split<CODES, TOKENS, GROUPS, PARTS>::run(args);                                                      \
  }
