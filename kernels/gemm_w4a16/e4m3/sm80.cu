// FP8 weights (e4m3fn) times 16-bit activations: the kernels of gemm_w4a16/sm80.cuh for such codes, which become 16-bit floats in
// registers. No FP8 tensor cores are needed.

#include "gemm_w4a16/sm80.cuh"

#define GEMM_E4M3A16_OF_ALL(...)                \
  GEMM_W4A16_OF(e4m3, f16, E4m3, __VA_ARGS__)   \
  GEMM_W4A16_OF(e4m3, bf16, E4m3, __VA_ARGS__)
GEMM_W4A16_SM80_STREAM_K(GEMM_E4M3A16_OF_ALL)
