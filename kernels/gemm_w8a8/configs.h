/* The configurations of gemm_w8a8: the .cu files make a kernel of each line, and build/configs.rs a Rust constant of each list. */
#pragma once

/* Tiles of bm rows of x by bn rows of w for mma.sync, a ring of `stages` slices of bk columns, warps_m x warps_n warps. */
#define GEMM_W8A8_SM80(X) /* bm, bn, bk, warps_m, warps_n, stages, min_blocks_per_sm */ \
  X(16, 32, 256, 1, 2, 6, 3)                                                            \
  X(64, 32, 128, 2, 2, 6, 2)                                                            \
  X(64, 64, 128, 2, 2, 4, 2)                                                            \
  X(128, 128, 64, 2, 2, 4, 2)                                                           \
  X(128, 256, 64, 2, 4, 4, 1)

/* Those there are for uint8 x: for few rows, and one that holds all groups of outputs; each takes long to compile. */
#define GEMM_W8A8_SM80_U8(X) /* as GEMM_W8A8_SM80 */ \
  X(16, 32, 256, 1, 2, 6, 3)                         \
  X(128, 256, 64, 2, 4, 4, 1)

/* Those there are for LLM.int8(). */
#define GEMM_W8A8_SM80_LLM_INT8(X) /* as GEMM_W8A8_SM80 */ \
  X(16, 32, 256, 1, 2, 6, 3)                               \
  X(64, 64, 128, 2, 2, 4, 2)                               \
  X(128, 128, 64, 2, 2, 4, 2)

/* Tiles of 128 rows of x by bn rows of w for wgmma, walked over by one block a multiprocessor; with `pingpong` the two warpgroups
 * have every other tile each instead of half of each.
 */
#define GEMM_W8A8_SM90_PERSISTENT(X) /* bn, stages, bool pingpong */ \
  X(64, 8, 0)                                                        \
  X(128, 6, 1)                                                       \
  X(192, 5, 0)                                                       \
  X(256, 4, 0)

/* Tiles of 64 * row_blocks rows of w by `tokens` rows of x for wgmma, k split over a cluster; in shared memory of half a
 * multiprocessor where that makes more blocks at once, or of a whole one for more bytes under way.
 */
#define GEMM_W8A8_SM90_SPLIT_K(X) /* tokens, row_blocks, stages, min_blocks_per_sm */ \
  X(8, 1, 8, 2)                                                                       \
  X(8, 2, 6, 2)                                                                       \
  X(16, 1, 8, 2)                                                                      \
  X(16, 2, 6, 2)                                                                      \
  X(32, 1, 8, 2)                                                                      \
  X(32, 2, 5, 2)                                                                      \
  X(64, 1, 6, 2)                                                                      \
  X(64, 2, 4, 2)                                                                      \
  X(64, 2, 9, 1)                                                                      \
  X(128, 1, 9, 1)                                                                     \
  X(128, 2, 3, 2)                                                                     \
  X(128, 2, 7, 1)

/* Those there are for LLM.int8(): each takes long to compile. */
#define GEMM_W8A8_SM90_LLM_INT8_PERSISTENT(X) /* as GEMM_W8A8_SM90_PERSISTENT */ \
  X(64, 8, 0)                                                                    \
  X(128, 6, 1)

/* Those there are for LLM.int8(). */
#define GEMM_W8A8_SM90_LLM_INT8_SPLIT_K(X) /* as GEMM_W8A8_SM90_SPLIT_K */ \
  X(16, 1, 8, 2)                                                           \
  X(64, 1, 6, 2)
