/* Argument struct of gemm_any/, and what else both sides know of its kernels. */
#pragma once

#include "common/abi.h"

#define GEMM_ANY_WARPS 8 /* of a block, a column of y each, */
#define GEMM_ANY_ROWS 8  /* of so many rows */

typedef struct GemmAnyArgs {
  LinearOut y;
  const void* x;                /* [m, k], int8 or 16-bit floats of the kernel's name */
  const void* w;                /* [n, k], codes as uint8, or the type of x when dense */
  const float* x_scales;        /* [m], int8 x only, as */
  const int32_t* x_zero_points; /* [m], zero points of x, added to x_zero_point; null: none */
  const float* w_scales;        /* [n, groups], not dense */
  const float* w_zero_points;   /* [n, groups], not dense */
  int32_t x_zero_point;
  uint32_t x_flip;              /* 0x80: x is uint8, codes plus 128; else 0 */
  uint32_t k;
  uint32_t group;
  float codebook[16];           /* gemm_any_codebook: what codes stand for */
  const uint32_t* outliers;     /* as in GemmW8A8Args */
  const void* x_floats;
} GemmAnyArgs;
