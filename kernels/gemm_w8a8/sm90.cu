// W8A8 linear layer on int8 tensor cores of sm_90a (wgmma), fed by the copy engine.
//
// Computes: y[m, n] = epilogue(sum_k (x[m, k] - x_zero[m]) * w[n, k]), s8 or u8 x s8 -> s32, then epilogue.cuh, then
//           bias and what common/linear_fused.cuh does.
// Layout:   w in blocks of 64 rows x 128 bytes of k, swizzled (docs/formats.md); x row-major behind a tensor map.
// Numerics: exact in int32 whatever the tile and the split; the epilogue fixes every float operation.
// Limits:   k a multiple of 16, |x - x_zero| * |w| * k under 2^31.

#include "gemm_w8a8/sm90_few.cuh"
#include "gemm_w8a8/sm90_many.cuh"

// The configurations; src/device/cuda/choose_sm90.rs has the same table (a test compares them) and the choice.
#define GEMM_W8A8_MANY(BN, STAGES, TURNS)                                                        \
  extern "C" __global__ void __launch_bounds__((GemmW8A8Many<BN, STAGES, TURNS != 0>::THREADS), 1) \
      gemm_w8a8_many_##BN##x##STAGES##_##TURNS(const __grid_constant__ GemmW8A8Sm90Args args) {  \
    GemmW8A8Many<BN, STAGES, TURNS != 0>::run(args);                                             \
  }
#define GEMM_W8A8_FEW(TOKENS, GROUPS, STAGES, RESIDENT)                                                 \
  extern "C" __global__ void __launch_bounds__((GemmW8A8Few<TOKENS, GROUPS, STAGES>::THREADS), RESIDENT) \
      gemm_w8a8_few_##TOKENS##x##GROUPS##x##STAGES(const __grid_constant__ GemmW8A8Sm90Args args) {      \
    GemmW8A8Few<TOKENS, GROUPS, STAGES>::run(args);                                                     \
  }

GEMM_W8A8_MANY(64, 8, 0)
GEMM_W8A8_MANY(128, 6, 1)
GEMM_W8A8_MANY(192, 5, 0)
GEMM_W8A8_MANY(256, 4, 0)
GEMM_W8A8_FEW(8, 1, 8, 2)
GEMM_W8A8_FEW(8, 2, 6, 2)
GEMM_W8A8_FEW(16, 1, 8, 2)
GEMM_W8A8_FEW(16, 2, 6, 2)
GEMM_W8A8_FEW(32, 1, 8, 2)
GEMM_W8A8_FEW(32, 2, 5, 2)
GEMM_W8A8_FEW(64, 1, 6, 2)
GEMM_W8A8_FEW(64, 2, 4, 2)
GEMM_W8A8_FEW(64, 2, 9, 1)
GEMM_W8A8_FEW(128, 1, 9, 1)
GEMM_W8A8_FEW(128, 2, 3, 2)
GEMM_W8A8_FEW(128, 2, 7, 1)
