// The kernels of gemm_w8a8/sm80.cuh.

#include "gemm_w8a8/configs.h"
#include "gemm_w8a8/sm80.cuh"

#define GEMM_W8A8_OF(NAME, U8, BM, BN, BK, WARPS_M, WARPS_N, STAGES, MIN_BLOCKS)      \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, MIN_BLOCKS)    \
      NAME##_##BM##x##BN##x##BK(const __grid_constant__ GemmW8A8Args args) {          \
    GemmW8A8<BM, BN, BK, WARPS_M, WARPS_N, STAGES, U8>::run(args);                    \
  }
#define GEMM_W8A8_OF_INT8(...) GEMM_W8A8_OF(gemm_w8a8, false, __VA_ARGS__)
#define GEMM_W8A8_OF_UINT8(...) GEMM_W8A8_OF(gemm_w8a8_u8, true, __VA_ARGS__)
GEMM_W8A8_SM80(GEMM_W8A8_OF_INT8)
GEMM_W8A8_SM80_U8(GEMM_W8A8_OF_UINT8)
