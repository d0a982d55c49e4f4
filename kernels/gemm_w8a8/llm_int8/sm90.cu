// LLM.int8() on sm_90a: the kernels of gemm_w8a8/sm90_split_k.cuh and sm90_persistent.cuh that add the products of outliers in
// the same launch (gemm_w8a8/sm90_outliers.cuh), behind the scaled sums and before the bias.

#include "gemm_w8a8/configs.h"
#include "gemm_w8a8/sm90_split_k.cuh"
#include "gemm_w8a8/sm90_persistent.cuh"

#define GEMM_LLM_INT8_PERSISTENT(BN, STAGES, PINGPONG)                                                         \
  extern "C" __global__ void __launch_bounds__((GemmW8A8Persistent<BN, STAGES, PINGPONG != 0, true>::THREADS), 1)    \
      gemm_llm_int8_persistent_##BN##x##STAGES##_##PINGPONG(const __grid_constant__ GemmW8A8Sm90Args args) {   \
    GemmW8A8Persistent<BN, STAGES, PINGPONG != 0, true>::run(args);                                                  \
  }
#define GEMM_LLM_INT8_SPLIT_K(TOKENS, ROW_BLOCKS, STAGES, MIN_BLOCKS)                                                \
  extern "C" __global__ void __launch_bounds__((GemmW8A8SplitK<TOKENS, ROW_BLOCKS, STAGES, true>::THREADS), MIN_BLOCKS) \
      gemm_llm_int8_split_k_##TOKENS##x##ROW_BLOCKS##x##STAGES(const __grid_constant__ GemmW8A8Sm90Args args) {      \
    GemmW8A8SplitK<TOKENS, ROW_BLOCKS, STAGES, true>::run(args);                                                        \
  }
GEMM_W8A8_SM90_LLM_INT8_PERSISTENT(GEMM_LLM_INT8_PERSISTENT)
GEMM_W8A8_SM90_LLM_INT8_SPLIT_K(GEMM_LLM_INT8_SPLIT_K)
