// W4A8 linear layer on the int8 tensor cores of sm_90a.
//
// Computes: as gemm_w4a8/sm80.cu: a[g] = sum over k in group g of (x[m, k] - x_zero[m]) * w[n, k], exact in int32, then one
//           group: y = (float(a) * x_scale[m]) * w_scale[n]; several: y = fma(float(a[g]), w_scale[g, n], y) from 0 in
//           ascending order, then y * x_scale[m]. Then bias and what common/linear_fused.cuh does.
// Layout:   the operands swapped: w, four bits of two's complement in blocks of 64 x 128 with their scales (docs/formats.md),
//           is what tensor cores hold in registers; x, row-major, is its columns. Few rows (sm90_few.cuh) multiply by mma.sync,
//           more (sm90_tile.cuh, sm90_split.cuh) by wgmma, fed by the copy engine.
// Numerics: the bits of the CPU, whatever the tile.
// Limits:   k a multiple of 16, code minus zero point within -8 to 7, groups of all of k, 32, 64 or a multiple of 128,
//           |x - x_zero| * 128 * group under 2^31 (the host refuses others).

#include "gemm_w4a8/sm90_kernels.cuh"

#define GEMM_W4A8_SM90_FEW(...) GEMM_SM90_FEW(gemm_w4a8_sm90, Signed4, __VA_ARGS__)
#define GEMM_W4A8_SM90(...) GEMM_SM90_TILE(gemm_w4a8_sm90, Signed4, int8_t, __VA_ARGS__)
// Of rows that are one group.
#define GEMM_W4A8_SM90_ROW(...) GEMM_SM90_TILE(gemm_w4a8_sm90, Signed4Row, int8_t, __VA_ARGS__)
#define GEMM_W4A8_SM90_SPLIT(...) GEMM_SM90_SPLIT(gemm_w4a8_sm90, Signed4Row, __VA_ARGS__)
// uint8 x, in fewer configurations.
#define GEMM_W4A8_SM90_U8(...) GEMM_SM90_TILE(gemm_w4a8_u8_sm90, Signed4, uint8_t, __VA_ARGS__)

// The configurations; src/device/cuda/choose_w4a8.rs has the same tables (a test compares them) and the choice.
GEMM_W4A8_SM90_FEW(8, 1, 8, 2)
GEMM_W4A8_SM90_FEW(8, 2, 8, 1)
GEMM_W4A8_SM90_FEW(16, 2, 8, 1)
GEMM_W4A8_SM90_FEW(16, 4, 4, 1)
GEMM_W4A8_SM90(16, 1, 3)
GEMM_W4A8_SM90(32, 1, 3)
GEMM_W4A8_SM90(64, 1, 2)
GEMM_W4A8_SM90(128, 2, 1)
GEMM_W4A8_SM90(128, 3, 1)
GEMM_W4A8_SM90_ROW(256, 2, 1)
GEMM_W4A8_SM90_SPLIT(16, 1, 2, 2)
GEMM_W4A8_SM90_SPLIT(32, 1, 2, 2)
GEMM_W4A8_SM90_SPLIT(64, 1, 2, 2)
GEMM_W4A8_SM90_SPLIT(128, 1, 2, 1)
GEMM_W4A8_SM90_U8(64, 1, 2)
GEMM_W4A8_SM90_U8(128, 3, 1)
