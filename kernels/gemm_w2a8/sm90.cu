// W2A8 linear layer on the int8 tensor cores of sm_90a: ternary weights (BitNet b1.58) and others of -2 to 1.
//
// Computes: y = (float(a) * x_scale[m]) * w_scale[n], a = sum over k of (x[m, k] - x_zero[m]) * w[n, k], exact in int32. Then bias
//           and what common/linear_fused.cuh does.
// Layout:   as gemm_w4a8/sm90.cu with two bits of two's complement, which become 64 times the weight as an int8.
// Numerics: the bits of the CPU, whatever the tile.
// Limits:   one scale an output, k a multiple of 16, |x - x_zero| * 128 * k under 2^31 (the host refuses others).

#include "gemm_w4a8/sm90_kernels.cuh"

#define GEMM_W2A8_SM90_FEW(...) GEMM_SM90_FEW(gemm_w2a8_sm90, Signed2, __VA_ARGS__)
#define GEMM_W2A8_SM90(...) GEMM_SM90_TILE(gemm_w2a8_sm90, Signed2, int8_t, __VA_ARGS__)
#define GEMM_W2A8_SM90_SPLIT(...) GEMM_SM90_SPLIT(gemm_w2a8_sm90, Signed2, __VA_ARGS__)
// uint8 x, in fewer configurations.
#define GEMM_W2A8_SM90_U8(...) GEMM_SM90_TILE(gemm_w2a8_u8_sm90, Signed2, uint8_t, __VA_ARGS__)

// The configurations of W4A8.
GEMM_W2A8_SM90_FEW(8, 1, 8, 2)
GEMM_W2A8_SM90_FEW(8, 2, 8, 1)
GEMM_W2A8_SM90_FEW(16, 2, 8, 1)
GEMM_W2A8_SM90_FEW(16, 4, 4, 1)
GEMM_W2A8_SM90(16, 1, 3)
GEMM_W2A8_SM90(32, 1, 3)
GEMM_W2A8_SM90(64, 1, 2)
GEMM_W2A8_SM90(128, 2, 1)
GEMM_W2A8_SM90(128, 3, 1)
GEMM_W2A8_SM90(256, 2, 1)
GEMM_W2A8_SM90_SPLIT(16, 1, 2, 2)
GEMM_W2A8_SM90_SPLIT(32, 1, 2, 2)
GEMM_W2A8_SM90_SPLIT(64, 1, 2, 2)
GEMM_W2A8_SM90_SPLIT(128, 1, 2, 1)
GEMM_W2A8_SM90_U8(64, 1, 2)
GEMM_W2A8_SM90_U8(128, 3, 1)
