/* Argument structs of gemm_w4a16/, and what else both sides know of its kernels. */
#pragma once

#include "common/abi.h"

#define GEMM_W4A16_GEMV_WARPS 8 /* of a block */

#define GEMM_W4A16_SM80_SLICE 64        /* columns of k in a stage */
#define GEMM_W4A16_SM80_UNROUNDED_BM 32 /* largest tile whose scales go on sums, where no weight is rounded */
#define GEMM_W4A16_SM80_TABLE_BYTES 192 /* shared memory of a warp for scales and zero points of 16 rows of w */

/* sm_90: shared memory of a warp to turn 16 rows of w by 8 tokens over (floats between tokens, bytes). */
#define GEMM_W4A16_SM90_TRANSPOSE_PITCH 20
#define GEMM_W4A16_SM90_TRANSPOSE_BYTES (8 * GEMM_W4A16_SM90_TRANSPOSE_PITCH * 4)
#define GEMM_W4A16_SM90_WARP_SPLIT_K_MAX_STAGES 32 /* of x */

typedef struct GemmW4A16Args {
  LinearOut y;
  const void* x;                 /* [m, k], 16-bit floats of the kernel's name */
  const uint8_t* w;              /* fragment order for 16-bit floats (docs/formats.md) */
  const float* w_scales;         /* [groups, n_pad] */
  const uint16_t* w_zero_points; /* [groups, n_pad]; null: w_zero_point everywhere */
  uint32_t w_zero_point;
  uint32_t k;                    /* a multiple of 8 */
  uint32_t n_pad;                /* n rounded up to 16 */
  uint32_t group;                /* a multiple of 32, or at least k */
  uint32_t codebook[8];          /* kernels named c4: low bytes of sixteen values of the type of x, then their high bytes */
} GemmW4A16Args;

typedef struct GemmW4A16Sm80Args {
  GemmW4A16Args layer;
  float* partials;         /* a slot of the size of a tile for each block and each stream-K tile */
  uint32_t* counters;      /* one for each stream-K tile, 0 before and after */
  uint32_t stream_k_tiles; /* how many tiles, the last ones, blocks share along k (gemm_w4a16/sm80_stream_k.cuh) */
  uint32_t low_scales;     /* bool: some scale is no float of the type of x */
} GemmW4A16Sm80Args;

typedef struct GemmW4A16Sm90Args {
  TensorMap x;              /* [m, 2 k] bytes of 16-bit floats, boxes of 128 and as many rows as the kernel's tile, swizzled */
  LinearOut y;
  const uint8_t* w;         /* [row_blocks, k_blocks] blocks of 64 x 128 (docs/formats.md) */
  uint32_t block_bytes;     /* codes, then the parameters of the block's groups */
  uint32_t row_blocks;      /* ceil(n / 64) */
  uint32_t k_blocks;        /* ceil(k / 128) */
  uint32_t groups;          /* of a block: 1, 2 or 4 */
  uint32_t low_scales;      /* bool: a second part of each scale */
  uint32_t has_zero_points; /* bool: for each group; else w_zero_point everywhere */
  uint32_t w_zero_point;
  uint32_t k;               /* a multiple of 8 */
  const void* x_rows;       /* what the tensor map describes */
} GemmW4A16Sm90Args;
