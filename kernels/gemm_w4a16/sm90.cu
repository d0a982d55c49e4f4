// W4A16 and W8A16 linear layer on the tensor cores of sm_90a, fed by the copy engine.
//
// Computes: as gemm_w4a16/sm80.cu, y[m, n] = sum over groups of scale * (sum over k of x[m, k] * (code[n, k] - zero)),
//           with the operands swapped: w is what tensor cores hold in registers, by 64 rows; x, as columns, comes from
//           shared memory in tiles of 8 to 256 tokens.
// Layout:   w in blocks of 64 x 128 with its scales and zero points beside the codes (docs/formats.md), so that a block is
//           one copy; x row-major behind a tensor map.
// Dtypes:   x f16 or bf16, w 4- or 8-bit codes, f32 sums.
// Numerics: deterministic: what is added, and in which order, depends on the launch alone. Rounding of weights: none in
//           sm90_warps.cuh and sm90_few.cuh, once to the type of x in sm90_many.cuh.
// Limits:   k a multiple of 8, groups of a multiple of 32 or all of k, integral zero points up to 2^BITS.

#include "gemm_w4a16/sm90_few.cuh"
#include "gemm_w4a16/sm90_many.cuh"
#include "gemm_w4a16/sm90_warps.cuh"

#define GEMM_W4A16_WARPS(T, BITS, TOKENS, GROUPS, PARTS, DEPTH)                                                             \
  extern "C" __global__ void __launch_bounds__((GemmW4A16Warps<T, BITS, TOKENS, GROUPS, PARTS, DEPTH>::THREADS), 1)      \
      gemm_w##BITS##a16_warps_##TOKENS##x##GROUPS##x##PARTS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {      \
    GemmW4A16Warps<T, BITS, TOKENS, GROUPS, PARTS, DEPTH>::run(args);                                                    \
  }
#define GEMM_W4A16_FEW(T, BITS, TOKENS, GROUPS, SHARE, RESIDENT)                                                        \
  extern "C" __global__ void __launch_bounds__((GemmW4A16Few<T, BITS, TOKENS, GROUPS, SHARE>::THREADS), RESIDENT)       \
      gemm_w##BITS##a16_few_##TOKENS##x##GROUPS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {                 \
    GemmW4A16Few<T, BITS, TOKENS, GROUPS, SHARE>::run(args);                                                            \
  }
#define GEMM_W4A16_MANY(T, BITS, TOKENS, GROUPS)                                                               \
  extern "C" __global__ void __launch_bounds__((GemmW4A16Many<T, BITS, TOKENS, GROUPS>::THREADS), 1)           \
      gemm_w##BITS##a16_many_##TOKENS##x##GROUPS##_##T(const __grid_constant__ GemmW4A16Sm90Args args) {    \
    GemmW4A16Many<T, BITS, TOKENS, GROUPS>::run(args);                                                         \
  }
#ifndef LOWBIT_W4A16_CONFIGURATIONS
// The configurations; src/device/cuda/choose_w4a16.rs has the same table (a test compares them) and the choice.
#define GEMM_W4A16_WARPS_TYPES(TOKENS, GROUPS, PARTS, DEPTH)  \
  GEMM_W4A16_WARPS(f16, 4, TOKENS, GROUPS, PARTS, DEPTH)      \
  GEMM_W4A16_WARPS(f16, 8, TOKENS, GROUPS, PARTS, DEPTH)      \
  GEMM_W4A16_WARPS(bf16, 4, TOKENS, GROUPS, PARTS, DEPTH)     \
  GEMM_W4A16_WARPS(bf16, 8, TOKENS, GROUPS, PARTS, DEPTH)
#define GEMM_W4A16_FEW_TYPES(TOKENS, GROUPS, SHARE, RESIDENT)  \
  GEMM_W4A16_FEW(f16, 4, TOKENS, GROUPS, SHARE, RESIDENT)      \
  GEMM_W4A16_FEW(f16, 8, TOKENS, GROUPS, SHARE, RESIDENT)      \
  GEMM_W4A16_FEW(bf16, 4, TOKENS, GROUPS, SHARE, RESIDENT)     \
  GEMM_W4A16_FEW(bf16, 8, TOKENS, GROUPS, SHARE, RESIDENT)
#define GEMM_W4A16_MANY_TYPES(TOKENS, GROUPS)  \
  GEMM_W4A16_MANY(f16, 4, TOKENS, GROUPS)      \
  GEMM_W4A16_MANY(f16, 8, TOKENS, GROUPS)      \
  GEMM_W4A16_MANY(bf16, 4, TOKENS, GROUPS)     \
  GEMM_W4A16_MANY(bf16, 8, TOKENS, GROUPS)
GEMM_W4A16_WARPS_TYPES(8, 1, 8, 2)
GEMM_W4A16_WARPS_TYPES(8, 2, 4, 2)
GEMM_W4A16_WARPS_TYPES(8, 1, 12, 2)
GEMM_W4A16_WARPS_TYPES(8, 1, 16, 2)
GEMM_W4A16_WARPS_TYPES(8, 1, 4, 2)
GEMM_W4A16_WARPS_TYPES(16, 1, 8, 2)
GEMM_W4A16_WARPS_TYPES(16, 2, 4, 2)
GEMM_W4A16_WARPS_TYPES(16, 4, 2, 2)
GEMM_W4A16_WARPS_TYPES(16, 1, 12, 2)
GEMM_W4A16_FEW_TYPES(16, 4, 2, 2)
GEMM_W4A16_FEW_TYPES(32, 2, 1, 2)
GEMM_W4A16_FEW_TYPES(64, 2, 1, 1)
GEMM_W4A16_FEW_TYPES(64, 4, 1, 1)
GEMM_W4A16_FEW_TYPES(128, 2, 1, 1)
GEMM_W4A16_MANY_TYPES(128, 2)
GEMM_W4A16_MANY_TYPES(128, 4)
GEMM_W4A16_MANY_TYPES(256, 2)
#endif
