/* Argument structs of gemm_w4a8/, and what else both sides know of its kernels. */
#pragma once

#include "common/abi.h"

/* sm_90, warp_split_k: sums that each warp keeps in a round, of groups or of blocks where those are larger. */
#define GEMM_W4A8_SM90_WARP_SUMS 4
/* sm_90, persistent: shared memory behind the ring of each warpgroup, to turn its tile over sixteen tokens at a time (floats between
 * tokens, bytes), and of each token of the tile for its scale and zero point.
 */
#define GEMM_W4A8_SM90_TRANSPOSE_PITCH 68
#define GEMM_W4A8_SM90_TRANSPOSE_BYTES (16 * GEMM_W4A8_SM90_TRANSPOSE_PITCH * 4)
#define GEMM_W4A8_SM90_TOKEN_BYTES 8
/* sm_90, split_k: words between tokens of the sums that take the ring's place, beyond the tile's rows. */
#define GEMM_W4A8_SM90_SUM_PADDING 4

typedef struct GemmW4A8Args {
  LinearOut y;
  const int8_t* x;               /* [m, k] */
  const uint8_t* w;              /* fragment order for int8 (docs/formats.md) */
  const float* x_scales;         /* [m] */
  const int32_t* x_zero_points;  /* [m], zero points of x, added to x_zero_point; null: none */
  const float* w_scales;         /* [groups, n_pad] */
  const uint16_t* w_zero_points; /* [groups, n_pad]; null: w_zero_point everywhere */
  const int32_t* w_sums;         /* [groups, n_pad], sums of (code - zero); null where no row has a zero point */
  int32_t x_zero_point;
  uint32_t x_flip;               /* 0x80808080: x is uint8, codes plus 128; else 0 */
  uint32_t w_zero_point;
  uint32_t k;                    /* a multiple of 16 */
  uint32_t n_pad;                /* n rounded up to 16 */
  uint32_t group;                /* a multiple of 32, or at least k */
} GemmW4A8Args;

typedef struct GemmW4A8Sm90Args {
  TensorMap x;                  /* [m, k], uint8 in kernels of that name; boxes of 128 columns and the tile's rows, swizzled */
  LinearOut y;
  const uint8_t* x_rows;        /* the same x, rows of exactly k bytes */
  const uint8_t* w;             /* [row_blocks, k_blocks] blocks of 64 x 128 (docs/formats.md) */
  const float* x_scales;        /* [m] */
  const float* w_scales;        /* [n rounded up to 64] where there is one group; else null, and the blocks have them */
  const int32_t* x_zero_points; /* [m], zero points of x, added to x_zero_point; null: none */
  int32_t x_zero_point;         /* zero point of x, as it is read: of uint8 plus 128 */
  uint32_t k;
  uint32_t x_unsigned;          /* x is uint8 */
  uint32_t row_blocks;          /* ceil(n / 64) */
  uint32_t k_blocks;            /* ceil(k / 128) */
  uint32_t block_bytes;         /* codes, then the scales of the block's groups */
  uint32_t groups_per_block;    /* 1, 2 or 4 */
  uint32_t group_blocks;        /* blocks of a group; k_blocks where there is one */
  uint32_t stages;              /* of the ring in shared memory, */
  uint32_t stage_bytes;         /* and bytes of each */
} GemmW4A8Sm90Args;
