/* Argument struct of gemm_dense/. */
#pragma once

#include "common/abi.h"

typedef struct GemmDenseArgs {
  LinearOut y;
  const void* x; /* [m, k], 16-bit floats of the kernel's name */
  const void* w; /* [n, k], the same type */
  uint32_t k;    /* a multiple of 8 */
} GemmDenseArgs;
