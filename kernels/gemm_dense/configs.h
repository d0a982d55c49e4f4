/* The configurations of gemm_dense: sm80.cu makes kernels of each line, and build/configs.rs a Rust constant of each list. */
#pragma once

/* Tiles of bm rows of x by bn rows of w for mma.sync, a ring of `stages` slices of 64 columns, warps_m x warps_n warps. */
#define GEMM_DENSE_SM80(X) /* bm, bn, warps_m, warps_n, stages, min_blocks_per_sm */ \
  X(16, 64, 1, 4, 6, 3)                                                              \
  X(64, 64, 2, 2, 4, 2)                                                              \
  X(128, 128, 2, 4, 3, 1)
