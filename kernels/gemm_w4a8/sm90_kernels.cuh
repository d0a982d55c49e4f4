// How kernels of W4A8 and W2A8 on sm_90a are made of a configuration.
#pragma once

#include "gemm_w4a8/configs.h"
#include "gemm_w4a8/sm90_warp_split_k.cuh"
#include "gemm_w4a8/sm90_split_k.cuh"
#include "gemm_w4a8/sm90_persistent.cuh"

// CODES of w (sm90_block.cuh); X: int8_t or uint8_t.
#define GEMM_PERSISTENT(NAME, CODES, X, TOKENS, ROW_BLOCKS, MIN_BLOCKS)                                           \
  extern "C" __global__ void __launch_bounds__((GemmW4A8Persistent<CODES, X, TOKENS, ROW_BLOCKS>::THREADS), MIN_BLOCKS) \
      NAME##_persistent_##TOKENS##x##ROW_BLOCKS(const __grid_constant__ GemmW4A8Sm90Args args) {                  \
    GemmW4A8Persistent<CODES, X, TOKENS, ROW_BLOCKS>::run(args);                                                        \
  }
// Of either X.
#define GEMM_WARP_SPLIT_K(NAME, CODES, TOKENS, ROW_TILES, WARPS_K, MIN_BLOCKS)                                         \
  extern "C" __global__ void __launch_bounds__((GemmW4A8WarpSplitK<CODES, TOKENS, ROW_TILES, WARPS_K>::THREADS), MIN_BLOCKS)  \
      NAME##_warp_split_k_##TOKENS##x##ROW_TILES##x##WARPS_K(const __grid_constant__ GemmW4A8Sm90Args args) {          \
    GemmW4A8WarpSplitK<CODES, TOKENS, ROW_TILES, WARPS_K>::run(args);                                                         \
  }
// Of either X, where rows of w are one group.
#define GEMM_SPLIT_K(NAME, CODES, TOKENS, ROW_BLOCKS, WARPGROUPS_K, MIN_BLOCKS)                                                \
  extern "C" __global__ void __launch_bounds__((GemmW4A8SplitK<CODES, TOKENS, ROW_BLOCKS, WARPGROUPS_K>::THREADS), MIN_BLOCKS)  \
      NAME##_split_k_##TOKENS##x##ROW_BLOCKS##x##WARPGROUPS_K(const __grid_constant__ GemmW4A8Sm90Args args) {                 \
    GemmW4A8SplitK<CODES, TOKENS, ROW_BLOCKS, WARPGROUPS_K>::run(args);                                                         \
  }
