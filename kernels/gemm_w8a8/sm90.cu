// W8A8 linear layer on int8 tensor cores of sm_90a (wgmma), fed by TMA.
//
// Computes: y[m, n] = epilogue(sum_k (x[m, k] - x_zero_point[m]) * w[n, k]), s8 or u8 x s8 -> s32, then epilogue.cuh, then
//           bias and what common/linear_fused.cuh does.
// Layout:   w in blocks of 64 rows x 128 bytes of k, swizzled (docs/formats.md); x row-major behind a tensor map.
// Numerics: exact in int32 whatever the tile and the split; the epilogue fixes every float operation.
// Limits:   k a multiple of 16, |x - x_zero_point| * |w| * k under 2^31.

#include "gemm_w8a8/configs.h"
#include "gemm_w8a8/sm90_split_k.cuh"
#include "gemm_w8a8/sm90_persistent.cuh"

#define GEMM_W8A8_PERSISTENT(BN, STAGES, PINGPONG)                                                       \
  extern "C" __global__ void __launch_bounds__((GemmW8A8Persistent<BN, STAGES, PINGPONG != 0>::THREADS), 1)    \
      gemm_w8a8_persistent_##BN##x##STAGES##_##PINGPONG(const __grid_constant__ GemmW8A8Sm90Args args) { \
    GemmW8A8Persistent<BN, STAGES, PINGPONG != 0>::run(args);                                                  \
  }
#define GEMM_W8A8_SPLIT_K(TOKENS, ROW_BLOCKS, STAGES, MIN_BLOCKS)                                              \
  extern "C" __global__ void __launch_bounds__((GemmW8A8SplitK<TOKENS, ROW_BLOCKS, STAGES>::THREADS), MIN_BLOCKS) \
      gemm_w8a8_split_k_##TOKENS##x##ROW_BLOCKS##x##STAGES(const __grid_constant__ GemmW8A8Sm90Args args) {    \
    GemmW8A8SplitK<TOKENS, ROW_BLOCKS, STAGES>::run(args);                                                        \
  }
GEMM_W8A8_SM90_PERSISTENT(GEMM_W8A8_PERSISTENT)
GEMM_W8A8_SM90_SPLIT_K(GEMM_W8A8_SPLIT_K)
