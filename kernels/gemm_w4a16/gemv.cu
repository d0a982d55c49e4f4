// The kernels of gemm_w4a16/gemv.cuh for integer codes and codebooks.

#include "gemm_w4a16/gemv.cuh"

#define GEMV_W4A16_OF_ALL(...)                 \
  GEMV_W4A16(w4, f16, Uint4, __VA_ARGS__)      \
  GEMV_W4A16(w8, f16, Uint8, __VA_ARGS__)      \
  GEMV_W4A16(c4, f16, Codebook4, __VA_ARGS__)  \
  GEMV_W4A16(w4, bf16, Uint4, __VA_ARGS__)     \
  GEMV_W4A16(w8, bf16, Uint8, __VA_ARGS__)     \
  GEMV_W4A16(c4, bf16, Codebook4, __VA_ARGS__)
GEMM_W4A16_GEMV(GEMV_W4A16_OF_ALL)
