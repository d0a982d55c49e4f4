// W4A16 and W8A16 linear layer on the tensor cores of sm_90a, fed by TMA.
//
// Computes: as gemm_w4a16/sm80.cu, y[m, n] = sum over groups of scale * (sum over k of x[m, k] * (code[n, k] - zero)),
//           with the operands swapped: w is what tensor cores hold in registers, by 64 rows; x, as columns, comes from
//           shared memory in tiles of 8 to 256 tokens.
// Layout:   w in blocks of 64 x 128 with its scales and zero points beside the codes (docs/formats.md), so that a block is
//           one copy; x row-major behind a tensor map.
// Dtypes:   x f16 or bf16, w 4- or 8-bit codes or FP8 (e4m3), f32 sums.
// Numerics: deterministic: what is added, and in which order, depends on the launch alone. Rounding of weights: none in
//           sm90_warp_split_k.cuh and sm90_split_k.cuh, once to the type of x in sm90_persistent.cuh.
// Limits:   k a multiple of 8, groups of a multiple of 32 or all of k, integral zero points up to 2^BITS.

#include "gemm_w4a16/sm90_kernels.cuh"

#define GEMM_W4A16_OF_ALL(KERNEL, ...)       \
  KERNEL(w4, f16, Uint4, __VA_ARGS__)        \
  KERNEL(w8, f16, Uint8, __VA_ARGS__)        \
  KERNEL(w4, bf16, Uint4, __VA_ARGS__)       \
  KERNEL(w8, bf16, Uint8, __VA_ARGS__)
#define GEMM_W4A16_WARP_SPLIT_K_OF_ALL(...) GEMM_W4A16_OF_ALL(GEMM_W4A16_WARP_SPLIT_K, __VA_ARGS__)
#define GEMM_W4A16_SPLIT_K_OF_ALL(...) GEMM_W4A16_OF_ALL(GEMM_W4A16_SPLIT_K, __VA_ARGS__)
#define GEMM_W4A16_PERSISTENT_OF_ALL(...) GEMM_W4A16_OF_ALL(GEMM_W4A16_PERSISTENT, __VA_ARGS__)
GEMM_W4A16_SM90_WARP_SPLIT_K(GEMM_W4A16_WARP_SPLIT_K_OF_ALL)
GEMM_W4A16_SM90_SPLIT_K(GEMM_W4A16_SPLIT_K_OF_ALL)
GEMM_W4A16_SM90_PERSISTENT(GEMM_W4A16_PERSISTENT_OF_ALL)
