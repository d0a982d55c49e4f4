/* The configurations of gemm_w4a8: the .cu files make kernels of each line, and build/configs.rs a Rust constant of each list. Those
 * of sm_90 are the same for weights of 4 and of 2 bits and for groups with factors.
 */
#pragma once

/* Tiles of bm rows of x by bn rows of w for mma.sync, a ring of `stages` slices of 128 columns, warps_m x warps_n warps. */
#define GEMM_W4A8_SM80(X) /* bm, bn, warps_m, warps_n, stages, min_blocks_per_sm */ \
  X(16, 64, 1, 4, 6, 2)                                                             \
  X(64, 64, 2, 2, 4, 2)                                                             \
  X(128, 128, 2, 4, 3, 1)

/* Tiles of 16 * row_tiles rows of w by `tokens` rows of x for mma.sync, k split over warps_k warps for each sixteen rows; blocks walk
 * over tiles.
 */
#define GEMM_W4A8_SM90_WARP_SPLIT_K(X) /* tokens, row_tiles, warps_k, min_blocks_per_sm */ \
  X(8, 1, 8, 2)                                                                            \
  X(8, 2, 8, 1)                                                                            \
  X(16, 2, 8, 1)                                                                           \
  X(16, 4, 4, 1)

/* Tiles of 64 * row_blocks rows of w by `tokens` rows of x for wgmma, over which blocks walk. */
#define GEMM_W4A8_SM90_PERSISTENT(X) /* tokens, row_blocks, min_blocks_per_sm */ \
  X(16, 1, 3)                                                                    \
  X(32, 1, 3)                                                                    \
  X(64, 1, 2)                                                                    \
  X(128, 2, 1)                                                                   \
  X(128, 3, 1)

/* Those there are only where rows of w are one group: registers do not hold their sums in groups. */
#define GEMM_W4A8_SM90_PERSISTENT_ONE_GROUP(X) /* as GEMM_W4A8_SM90_PERSISTENT */ \
  X(256, 2, 1)

/* Those there are for uint8 x: for up to 64 rows, and for more. */
#define GEMM_W4A8_SM90_U8(X) /* as GEMM_W4A8_SM90_PERSISTENT */ \
  X(64, 1, 2)                                                   \
  X(128, 3, 1)

/* Tiles of 64 * row_blocks rows of w, each of which is one group, by `tokens` rows of x for wgmma, k split over a cluster and over
 * warpgroups_k warpgroups of a block.
 */
#define GEMM_W4A8_SM90_SPLIT_K(X) /* tokens, row_blocks, warpgroups_k, min_blocks_per_sm */ \
  X(16, 1, 2, 2)                                                                            \
  X(32, 1, 2, 2)                                                                            \
  X(64, 1, 2, 2)                                                                            \
  X(128, 1, 2, 1)
