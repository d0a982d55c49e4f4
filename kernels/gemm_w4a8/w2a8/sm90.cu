// W2A8 linear layer on the int8 tensor cores of sm_90a: ternary weights (BitNet b1.58) and others of -2 to 1.
//
// Computes: y = (float(a) * x_scale[m]) * w_scale[n], a = sum over k of (x[m, k] - x_zero_point[m]) * w[n, k], exact in int32.
//           Then bias and what common/linear_fused.cuh does.
// Layout:   as gemm_w4a8/sm90.cu with two bits of two's complement, which become 64 times the weight as an int8.
// Numerics: the bits of the CPU, whatever the tile.
// Limits:   one scale an output, k a multiple of 16, |x - x_zero_point| * 128 * k under 2^31 (the host refuses others).

#include "gemm_w4a8/sm90_kernels.cuh"

#define W2A8_WARP_SPLIT_K(...) GEMM_WARP_SPLIT_K(gemm_w2a8_sm90, Signed2, __VA_ARGS__)
#define W2A8_PERSISTENT(...) GEMM_PERSISTENT(gemm_w2a8_sm90, Signed2, int8_t, __VA_ARGS__)
#define W2A8_PERSISTENT_U8(...) GEMM_PERSISTENT(gemm_w2a8_u8_sm90, Signed2, uint8_t, __VA_ARGS__)
#define W2A8_SPLIT_K(...) GEMM_SPLIT_K(gemm_w2a8_sm90, Signed2, __VA_ARGS__)
GEMM_W4A8_SM90_WARP_SPLIT_K(W2A8_WARP_SPLIT_K)
GEMM_W4A8_SM90_PERSISTENT(W2A8_PERSISTENT)
GEMM_W4A8_SM90_PERSISTENT_ONE_GROUP(W2A8_PERSISTENT)
GEMM_W4A8_SM90_U8(W2A8_PERSISTENT_U8)
GEMM_W4A8_SM90_SPLIT_K(W2A8_SPLIT_K)
