// LLM.int8() on sm_90a: the kernels of gemm_w8a8/sm90_few.cuh and sm90_many.cuh that add the products of outliers in the same
// launch (gemm_w8a8/outliers_sm90.cuh), behind the scaled sums and before the bias.

#include "gemm_w8a8/sm90_few.cuh"
#include "gemm_w8a8/sm90_many.cuh"

// The configurations; src/device/cuda/choose_sm90.rs has the same table (a test compares them) and the choice.
#define GEMM_LLM_INT8_MANY(BN, STAGES, TURNS)                                                          \
  extern "C" __global__ void __launch_bounds__((GemmW8A8Many<BN, STAGES, TURNS != 0, true>::THREADS), 1) \
      gemm_llm_int8_many_##BN##x##STAGES##_##TURNS(const __grid_constant__ GemmW8A8Sm90Args args) {    \
    GemmW8A8Many<BN, STAGES, TURNS != 0, true>::run(args);                                             \
  }
#define GEMM_LLM_INT8_FEW(TOKENS, GROUPS, STAGES, RESIDENT)                                                   \
  extern "C" __global__ void __launch_bounds__((GemmW8A8Few<TOKENS, GROUPS, STAGES, true>::THREADS), RESIDENT) \
      gemm_llm_int8_few_##TOKENS##x##GROUPS##x##STAGES(const __grid_constant__ GemmW8A8Sm90Args args) {        \
    GemmW8A8Few<TOKENS, GROUPS, STAGES, true>::run(args);                                                     \
  }

GEMM_LLM_INT8_MANY(64, 8, 0)
GEMM_LLM_INT8_MANY(128, 6, 1)
GEMM_LLM_INT8_FEW(16, 1, 8, 2)
GEMM_LLM_INT8_FEW(64, 1, 6, 2)
