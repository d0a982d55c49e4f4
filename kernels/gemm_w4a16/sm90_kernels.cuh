// How kernels of gemm_w4a16 on sm_90a are made of a configuration and what codes stand for.
#pragma once

#include "gemm_w4a16/configs.h"
#include "gemm_w4a16/sm90_split_k.cuh"
#include "gemm_w4a16/sm90_persistent.cuh"
#include "gemm_w4a16/sm90_warp_split_k.cuh"

#define GEMM_W4A16_WARP_SPLIT_K(NAME, T, CODES, TOKENS, ROW_BLOCKS, WARPS_K, DEPTH)                                               \
  extern "C" __global__ void __launch_bounds__((GemmW4A16WarpSplitK<T, CODES, TOKENS, ROW_BLOCKS, WARPS_K, DEPTH>::THREADS), 1)  \
      gemm_##NAME##a16_warp_split_k_##TOKENS##x##ROW_BLOCKS##x##WARPS_K##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {  \
    GemmW4A16WarpSplitK<T, CODES, TOKENS, ROW_BLOCKS, WARPS_K, DEPTH>::run(args);                                                \
  }
#define GEMM_W4A16_SPLIT_K(NAME, T, CODES, TOKENS, ROW_BLOCKS, BLOCKS_PER_WARP, MIN_BLOCKS)                                             \
  extern "C" __global__ void __launch_bounds__((GemmW4A16SplitK<T, CODES, TOKENS, ROW_BLOCKS, BLOCKS_PER_WARP>::THREADS), MIN_BLOCKS)  \
      gemm_##NAME##a16_split_k_##TOKENS##x##ROW_BLOCKS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {                         \
    GemmW4A16SplitK<T, CODES, TOKENS, ROW_BLOCKS, BLOCKS_PER_WARP>::run(args);                                                         \
  }
#define GEMM_W4A16_PERSISTENT(NAME, T, CODES, TOKENS, ROW_BLOCKS)                                                   \
  extern "C" __global__ void __launch_bounds__((GemmW4A16Persistent<T, CODES, TOKENS, ROW_BLOCKS>::THREADS), 1)    \
      gemm_##NAME##a16_persistent_##TOKENS##x##ROW_BLOCKS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {  \
    GemmW4A16Persistent<T, CODES, TOKENS, ROW_BLOCKS>::run(args);                                                  \
  }
