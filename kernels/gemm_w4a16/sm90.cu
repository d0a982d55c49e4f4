// W4A16 and W8A16 linear layer on the tensor cores of sm_90a, fed by TMA.
//
// Computes: as gemm_w4a16/sm80.cu, y[m, n] = sum over groups of scale * (sum over k of x[m, k] * (code[n, k] - zero)),
//           with the operands swapped: w is what tensor cores hold in registers, by 64 rows; x, as columns, comes from
//           shared memory in tiles of 8 to 256 tokens.
// Layout:   w in blocks of 64 x 128 with its scales and zero points beside the codes (docs/formats.md), so that a block is
//           one copy; x row-major behind a tensor map.
// Dtypes:   x f16 or bf16, w 4- or 8-bit codes, f32 sums.
// Numerics: deterministic: what is added, and in which order, depends on the launch alone. Rounding of weights: none in
//           sm90_warp_split_k.cuh and sm90_split_k.cuh, once to the type of x in sm90_persistent.cuh.
// Limits:   k a multiple of 8, groups of a multiple of 32 or all of k, integral zero points up to 2^BITS.

#include "gemm_w4a16/configs.h"
#include "gemm_w4a16/sm90_split_k.cuh"
#include "gemm_w4a16/sm90_persistent.cuh"
#include "gemm_w4a16/sm90_warp_split_k.cuh"

#define GEMM_W4A16_WARP_SPLIT_K(T, BITS, TOKENS, ROW_BLOCKS, WARPS_K, DEPTH)                                                     \
  extern "C" __global__ void __launch_bounds__((GemmW4A16WarpSplitK<T, BITS, TOKENS, ROW_BLOCKS, WARPS_K, DEPTH>::THREADS), 1)        \
      gemm_w##BITS##a16_warp_split_k_##TOKENS##x##ROW_BLOCKS##x##WARPS_K##_##T(const __grid_constant__ GemmW4A16Sm90Args args) { \
    GemmW4A16WarpSplitK<T, BITS, TOKENS, ROW_BLOCKS, WARPS_K, DEPTH>::run(args);                                                      \
  }
#define GEMM_W4A16_WARP_SPLIT_K_OF_ALL(...)     \
  GEMM_W4A16_WARP_SPLIT_K(f16, 4, __VA_ARGS__)  \
  GEMM_W4A16_WARP_SPLIT_K(f16, 8, __VA_ARGS__)  \
  GEMM_W4A16_WARP_SPLIT_K(bf16, 4, __VA_ARGS__) \
  GEMM_W4A16_WARP_SPLIT_K(bf16, 8, __VA_ARGS__)
GEMM_W4A16_SM90_WARP_SPLIT_K(GEMM_W4A16_WARP_SPLIT_K_OF_ALL)
#define GEMM_W4A16_SPLIT_K(T, BITS, TOKENS, ROW_BLOCKS, BLOCKS_PER_WARP, MIN_BLOCKS)                                              \
  extern "C" __global__ void __launch_bounds__((GemmW4A16SplitK<T, BITS, TOKENS, ROW_BLOCKS, BLOCKS_PER_WARP>::THREADS), MIN_BLOCKS) \
      gemm_w##BITS##a16_split_k_##TOKENS##x##ROW_BLOCKS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {                   \
    GemmW4A16SplitK<T, BITS, TOKENS, ROW_BLOCKS, BLOCKS_PER_WARP>::run(args);                                                        \
  }
#define GEMM_W4A16_SPLIT_K_OF_ALL(...)     \
  GEMM_W4A16_SPLIT_K(f16, 4, __VA_ARGS__)  \
  GEMM_W4A16_SPLIT_K(f16, 8, __VA_ARGS__)  \
  GEMM_W4A16_SPLIT_K(bf16, 4, __VA_ARGS__) \
  GEMM_W4A16_SPLIT_K(bf16, 8, __VA_ARGS__)
GEMM_W4A16_SM90_SPLIT_K(GEMM_W4A16_SPLIT_K_OF_ALL)
#define GEMM_W4A16_PERSISTENT(T, BITS, TOKENS, ROW_BLOCKS)                                                         \
  extern "C" __global__ void __launch_bounds__((GemmW4A16Persistent<T, BITS, TOKENS, ROW_BLOCKS>::THREADS), 1)           \
      gemm_w##BITS##a16_persistent_##TOKENS##x##ROW_BLOCKS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) { \
    GemmW4A16Persistent<T, BITS, TOKENS, ROW_BLOCKS>::run(args);                                                         \
  }
#define GEMM_W4A16_PERSISTENT_OF_ALL(...)     \
  GEMM_W4A16_PERSISTENT(f16, 4, __VA_ARGS__)  \
  GEMM_W4A16_PERSISTENT(f16, 8, __VA_ARGS__)  \
  GEMM_W4A16_PERSISTENT(bf16, 4, __VA_ARGS__) \
  GEMM_W4A16_PERSISTENT(bf16, 8, __VA_ARGS__)
GEMM_W4A16_SM90_PERSISTENT(GEMM_W4A16_PERSISTENT_OF_ALL)
