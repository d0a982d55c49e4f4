// W4A8 linear layer on the int8 tensor cores of sm_90a.
//
// Computes: as gemm_w4a8/sm80.cu: a[g] = sum over k in group g of (x[m, k] - x_zero_point[m]) * w[n, k], exact in int32, then one
//           group: y = (float(a) * x_scale[m]) * w_scale[n]; several: y = fma(float(a[g]), w_scale[g, n], y) from 0 in
//           ascending order, then y * x_scale[m]. Then bias and what common/linear_fused.cuh does.
// Layout:   the operands swapped: w, four bits of two's complement in blocks of 64 x 128 with their scales (docs/formats.md),
//           is what tensor cores hold in registers; x, row-major, is its columns. Few rows
//           (sm90_warp_split_k.cuh) multiply by mma.sync, more (sm90_persistent.cuh, sm90_split_k.cuh) by wgmma, fed by TMA.
// Numerics: the bits of the CPU, whatever the tile.
// Limits:   k a multiple of 16, code minus zero point within -8 to 7, groups of all of k, 32, 64 or a multiple of 128,
//           |x - x_zero_point| * 128 * group under 2^31 (the host refuses others).

#include "gemm_w4a8/sm90_kernels.cuh"

#define W4A8_WARP_SPLIT_K(...) GEMM_WARP_SPLIT_K(gemm_w4a8_sm90, Signed4, __VA_ARGS__)
#define W4A8_PERSISTENT(...) GEMM_PERSISTENT(gemm_w4a8_sm90, Signed4, int8_t, __VA_ARGS__)
#define W4A8_PERSISTENT_ONE_GROUP(...) GEMM_PERSISTENT(gemm_w4a8_sm90, Signed4Row, int8_t, __VA_ARGS__)
#define W4A8_PERSISTENT_U8(...) GEMM_PERSISTENT(gemm_w4a8_u8_sm90, Signed4, uint8_t, __VA_ARGS__)
#define W4A8_SPLIT_K(...) GEMM_SPLIT_K(gemm_w4a8_sm90, Signed4Row, __VA_ARGS__)
GEMM_W4A8_SM90_WARP_SPLIT_K(W4A8_WARP_SPLIT_K)
GEMM_W4A8_SM90_PERSISTENT(W4A8_PERSISTENT)
GEMM_W4A8_SM90_PERSISTENT_ONE_GROUP(W4A8_PERSISTENT_ONE_GROUP)
GEMM_W4A8_SM90_U8(W4A8_PERSISTENT_U8)
GEMM_W4A8_SM90_SPLIT_K(W4A8_SPLIT_K)
