// LLM.int8(): the kernels of gemm_w8a8/sm80.cuh that add the products of outliers in the same launch (outliers.cuh).

#include "gemm_w8a8/sm80.cuh"

// The configurations; src/device/cuda/choose.rs has the same table (a test compares them) and the choice.
#define GEMM_LLM_INT8(T, BM, BN, BK, WARPS_M, WARPS_N, STAGES, BLOCKS)                 \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS)         \
      gemm_llm_int8_##BM##x##BN##x##BK##_##T(const __grid_constant__ GemmW8A8Args args) { \
    GemmW8A8<BM, BN, BK, WARPS_M, WARPS_N, STAGES, false, T>::run(args);               \
  }
#define GEMM_LLM_INT8_TYPES(...)   \
  GEMM_LLM_INT8(f16, __VA_ARGS__)  \
  GEMM_LLM_INT8(bf16, __VA_ARGS__)
GEMM_LLM_INT8_TYPES(16, 32, 256, 1, 2, 6, 3)
GEMM_LLM_INT8_TYPES(64, 64, 128, 2, 2, 4, 2)
GEMM_LLM_INT8_TYPES(128, 128, 64, 2, 2, 4, 2)
