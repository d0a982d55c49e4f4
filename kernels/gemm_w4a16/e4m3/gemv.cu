// FP8 weights (e4m3fn) times 16-bit activations: the kernels of gemm_w4a16/gemv.cuh for such codes.

#include "gemm_w4a16/gemv.cuh"

#define GEMV_E4M3A16_OF_ALL(...)             \
  GEMV_W4A16(e4m3, f16, E4m3, __VA_ARGS__)   \
  GEMV_W4A16(e4m3, bf16, E4m3, __VA_ARGS__)
GEMM_W4A16_GEMV(GEMV_E4M3A16_OF_ALL)
