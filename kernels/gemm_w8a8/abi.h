/* Argument structs of gemm_w8a8/, and what else both sides know of its kernels. */
#pragma once

#include "common/abi.h"

#define GEMM_W8A8_SM90_BM 128 /* rows of x in a tile of the persistent kernels */
/* Shared memory of their epilogue: what a warp has to bring outputs into whole lines, for LLM.int8() outliers too, and, for each
 * warpgroup, of each column of the tile.
 */
#define GEMM_W8A8_SM90_LINE_BYTES 2048
#define GEMM_LLM_INT8_SM90_LINE_BYTES 2560
#define GEMM_W8A8_SM90_COLUMN_BYTES 12
#define GEMM_LLM_INT8_SM90_COLUMNS 8 /* of outliers, that a warp of the split_k kernels fetches at a time */

typedef struct GemmW8A8Args {
  LinearOut y;
  const int8_t* x;              /* [m, k]; uint8 in kernels of that name */
  const int8_t* w;              /* [n, k], code minus zero point */
  const float* x_scales;        /* [m] */
  const int32_t* x_zero_points; /* [m], zero points of x, added to x_zero_point; null: none */
  const float* w_scales;        /* [n] */
  const int32_t* w_sums;        /* [n], sums of w's rows; null where no row has a zero point */
  int32_t x_zero_point;         /* zero point of x, as it is read: of uint8 plus 128 */
  uint32_t k;                   /* a multiple of 16 */
  const uint32_t* outliers;     /* kernels named llm_int8: [m, ceil(k / 32)], as EmitArgs has it */
  const void* x_floats;         /* the same: [m, k] values of outliers, 16-bit floats of the kernel's name */
} GemmW8A8Args;

typedef struct GemmW8A8Sm90Args {
  TensorMap x;                  /* [m, k]; boxes of 128 columns and as many rows as the kernel's tile, 128-byte swizzle */
  LinearOut y;
  const int8_t* w;              /* [ceil(n / 64), ceil(k / 128), 64, 128] swizzled (docs/formats.md), code minus zero point */
  const float* x_scales;        /* [m] */
  const float* w_scales;        /* [n rounded up to 256] */
  const int32_t* w_sums;        /* [n rounded up to 256], sums of w's rows; null where no row has a zero point */
  const int32_t* x_zero_points; /* [m], zero points of x, added to x_zero_point; null: none */
  int32_t x_zero_point;         /* zero point of x, as it is read: of uint8 plus 128 */
  uint32_t k;                   /* a multiple of 16 */
  uint32_t x_unsigned;          /* 1: x is uint8, codes plus 128 */
  uint32_t floats_f16;          /* kernels named llm_int8: 1: x_floats are f16, else bf16 */
  const uint32_t* outliers;     /* the same: [m, ceil(k / 32)], as EmitArgs has it */
  const void* x_floats;         /* the same: [m, k] values of outliers */
} GemmW8A8Sm90Args;
