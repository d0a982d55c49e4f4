// The kernels of gemm_w4a16/sm80.cuh for integer codes and codebooks.

#include "gemm_w4a16/sm80.cuh"

#define GEMM_W4A16_OF_ALL(...)                    \
  GEMM_W4A16_OF(w4, f16, Uint4, __VA_ARGS__)      \
  GEMM_W4A16_OF(w8, f16, Uint8, __VA_ARGS__)      \
  GEMM_W4A16_OF(c4, f16, Codebook4, __VA_ARGS__)  \
  GEMM_W4A16_OF(w4, bf16, Uint4, __VA_ARGS__)     \
  GEMM_W4A16_OF(w8, bf16, Uint8, __VA_ARGS__)     \
  GEMM_W4A16_OF(c4, bf16, Codebook4, __VA_ARGS__)
GEMM_W4A16_SM80_STREAM_K(GEMM_W4A16_OF_ALL)
