/* Arguments of gemm_w4a8/sm90, beside abi.h: in a file of its own for the same reason as abi_linear.h. */
#ifndef LOWBIT_ABI_W4A8_H
#define LOWBIT_ABI_W4A8_H

#include "abi_linear.h"

typedef struct GemmW4A8Sm90Args {
  TensorMap x;            /* [m, k], uint8 in kernels of that name; boxes of 128 columns and as many rows as the kernel's tile, swizzled */
  LinearOut y;
  const uint8_t* x_rows;  /* the same x, rows of exactly k bytes */
  const uint8_t* w;       /* [row_blocks, k_blocks] blocks of 64 x 128 (docs/formats.md) */
  const float* x_scales;  /* [m] */
  const float* w_scales;  /* [n rounded up to 64] where there is one group; else null, and the blocks have them */
  const int32_t* x_zeros; /* [m], zero points of x, added to x_zero; null: none */
  int32_t x_zero;         /* zero point of x, as it is read: of uint8 plus 128 */
  uint32_t k;
  uint32_t x_unsigned;    /* x is uint8 */
  uint32_t row_blocks;    /* ceil(n / 64) */
  uint32_t k_blocks;      /* ceil(k / 128) */
  uint32_t block_bytes;   /* codes, then the scales of the block's parts */
  uint32_t parts;         /* groups of a block: 1, 2 or 4 */
  uint32_t group_blocks;  /* blocks of a group; k_blocks where there is one */
  uint32_t stages;        /* of the ring in shared memory, */
  uint32_t stage_bytes;   /* and bytes of each */
} GemmW4A8Sm90Args;

#endif
