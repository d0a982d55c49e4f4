// W4A8 linear layer on the int8 tensor cores of sm_90a, of groups whose scales are whole multiples of one scale a row
// (progressive group quantization, Lin et al. 2024, arXiv 2405.04532): the speed of one scale a row with the accuracy of groups.
//
// Computes: y = (float(a) * x_scale[m]) * w_scale[n], a = sum over k of
//           (x[m, k] - x_zero_point[m]) * factor[n, g] * (code[n, k] - zero[n, g]), exact in int32. Then bias and
//           what common/linear_fused.cuh does.
// Layout:   as gemm_w4a8/sm90.cu with unsigned codes; behind those of a block of 64 x 128 factors and their products with
//           zero points, a byte each.
// Numerics: the bits of the CPU, whatever the tile.
// Limits:   factor * (code - zero) within int8, zero points 0 to 15, groups of a multiple of 128, k a multiple of 16,
//           |x - x_zero_point| * 128 * k under 2^31 (the host refuses others).

#include "gemm_w4a8/sm90_kernels.cuh"

#define W4A8_FACTORED_WARP_SPLIT_K(...) GEMM_WARP_SPLIT_K(gemm_w4a8_factored_sm90, Factored4, __VA_ARGS__)
#define W4A8_FACTORED_PERSISTENT(...) GEMM_PERSISTENT(gemm_w4a8_factored_sm90, Factored4, int8_t, __VA_ARGS__)
#define W4A8_FACTORED_PERSISTENT_U8(...) GEMM_PERSISTENT(gemm_w4a8_factored_u8_sm90, Factored4, uint8_t, __VA_ARGS__)
#define W4A8_FACTORED_SPLIT_K(...) GEMM_SPLIT_K(gemm_w4a8_factored_sm90, Factored4, __VA_ARGS__)
GEMM_W4A8_SM90_WARP_SPLIT_K(W4A8_FACTORED_WARP_SPLIT_K)
GEMM_W4A8_SM90_PERSISTENT(W4A8_FACTORED_PERSISTENT)
GEMM_W4A8_SM90_PERSISTENT_ONE_GROUP(W4A8_FACTORED_PERSISTENT)
GEMM_W4A8_SM90_U8(W4A8_FACTORED_PERSISTENT_U8)
GEMM_W4A8_SM90_SPLIT_K(W4A8_FACTORED_SPLIT_K)
