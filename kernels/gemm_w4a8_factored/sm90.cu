// W4A8 linear layer on the int8 tensor cores of sm_90a, of groups whose scales are whole multiples of one scale a row
// (progressive group quantization, Lin et al. 2024, arXiv 2405.04532): the speed of one scale a row with the accuracy of groups.
//
// Computes: y = (float(a) * x_scale[m]) * w_scale[n], a = sum over k of (x[m, k] - x_zero[m]) * factor[n, g] * (code[n, k] - zero[n, g]),
//           exact in int32. Then bias and what common/linear_fused.cuh does.
// Layout:   as gemm_w4a8/sm90.cu with unsigned codes; behind those of a block of 64 x 128 factors and their products with
//           zero points, a byte each.
// Numerics: the bits of the CPU, whatever the tile.
// Limits:   factor * (code - zero) within int8, zero points 0 to 15, groups of a multiple of 128, k a multiple of 16,
//           |x - x_zero| * 128 * k under 2^31 (the host refuses others).

#include "gemm_w4a8/sm90_kernels.cuh"

#define GEMM_W4A8_FACTORED_SM90_FEW(...) GEMM_SM90_FEW(gemm_w4a8_factored_sm90, Factored4, __VA_ARGS__)
#define GEMM_W4A8_FACTORED_SM90(...) GEMM_SM90_TILE(gemm_w4a8_factored_sm90, Factored4, int8_t, __VA_ARGS__)
#define GEMM_W4A8_FACTORED_SM90_SPLIT(...) GEMM_SM90_SPLIT(gemm_w4a8_factored_sm90, Factored4, __VA_ARGS__)
// uint8 x, in fewer configurations.
#define GEMM_W4A8_FACTORED_SM90_U8(...) GEMM_SM90_TILE(gemm_w4a8_factored_u8_sm90, Factored4, uint8_t, __VA_ARGS__)

// The configurations of gemm_w4a8/sm90.cu.
GEMM_W4A8_FACTORED_SM90_FEW(8, 1, 8, 2)
GEMM_W4A8_FACTORED_SM90_FEW(8, 2, 8, 1)
GEMM_W4A8_FACTORED_SM90_FEW(16, 2, 8, 1)
GEMM_W4A8_FACTORED_SM90_FEW(16, 4, 4, 1)
GEMM_W4A8_FACTORED_SM90(16, 1, 3)
GEMM_W4A8_FACTORED_SM90(32, 1, 3)
GEMM_W4A8_FACTORED_SM90(64, 1, 2)
GEMM_W4A8_FACTORED_SM90(128, 2, 1)
GEMM_W4A8_FACTORED_SM90(128, 3, 1)
GEMM_W4A8_FACTORED_SM90(256, 2, 1)
GEMM_W4A8_FACTORED_SM90_SPLIT(16, 1, 2, 2)
GEMM_W4A8_FACTORED_SM90_SPLIT(32, 1, 2, 2)
GEMM_W4A8_FACTORED_SM90_SPLIT(64, 1, 2, 2)
GEMM_W4A8_FACTORED_SM90_SPLIT(128, 1, 2, 1)
GEMM_W4A8_FACTORED_SM90_U8(64, 1, 2)
GEMM_W4A8_FACTORED_SM90_U8(128, 3, 1)
