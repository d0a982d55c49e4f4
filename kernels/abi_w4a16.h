/* Arguments of gemm_w4a16/sm80, beside abi.h: in a file of its own for the same reason as abi_linear.h. */
#ifndef LOWBIT_ABI_W4A16_H
#define LOWBIT_ABI_W4A16_H

#include "abi_linear.h"

typedef struct GemmW4A16Sm80Args {
  GemmW4A16Args layer;
  float* partials;     /* a slot of the size of a tile for each block and each tile that is cut */
  uint32_t* counters;  /* one for each tile that is cut, 0 before and after */
  uint32_t cut_tiles;  /* how many tiles, the last ones, are cut along k (gemm_w4a16/sm80_work.cuh) */
  uint32_t low_scales; /* bool: some scale is no float of the type of x */
} GemmW4A16Sm80Args;

#endif
