// LLM.int8(): the kernels of gemm_w8a8/sm80.cuh that add the products of outliers in the same launch (sm80_outliers.cuh).

#include "gemm_w8a8/configs.h"
#include "gemm_w8a8/sm80.cuh"

#define GEMM_LLM_INT8(T, BM, BN, BK, WARPS_M, WARPS_N, STAGES, MIN_BLOCKS)                  \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, MIN_BLOCKS)          \
      gemm_llm_int8_##BM##x##BN##x##BK##_##T(const __grid_constant__ GemmW8A8Args args) {   \
    GemmW8A8<BM, BN, BK, WARPS_M, WARPS_N, STAGES, false, T>::run(args);                    \
  }
#define GEMM_LLM_INT8_OF_F16(...) GEMM_LLM_INT8(f16, __VA_ARGS__)
#define GEMM_LLM_INT8_OF_BF16(...) GEMM_LLM_INT8(bf16, __VA_ARGS__)
GEMM_W8A8_SM80_LLM_INT8(GEMM_LLM_INT8_OF_F16)
GEMM_W8A8_SM80_LLM_INT8(GEMM_LLM_INT8_OF_BF16)
