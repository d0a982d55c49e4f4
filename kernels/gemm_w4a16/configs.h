/* The configurations of gemm_w4a16: the .cu files make kernels of each line, and build/configs.rs a Rust constant of each list. */
#pragma once

/* Rows of w (by 16) and of x (by 8) that a warp of gemv.cu has: four tiles of w share what is read of x, one makes more blocks. */
#define GEMM_W4A16_GEMV(X) /* token_tiles, row_tiles */ \
  X(1, 1)                                               \
  X(1, 4)

/* Tiles of bm rows of x by bn rows of w for mma.sync, shared out among blocks along k (stream-K), a ring of `stages` slices of 64
 * columns, warps_m x warps_n warps.
 */
#define GEMM_W4A16_SM80_STREAM_K(X) /* bm, bn, warps_m, warps_n, stages, min_blocks_per_sm */ \
  X(16, 128, 1, 4, 6, 3)                                                                      \
  X(32, 128, 1, 4, 6, 3)                                                                      \
  X(64, 128, 1, 4, 4, 2)                                                                      \
  X(128, 256, 2, 4, 3, 1)

/* Tiles of 64 * row_blocks rows of w by `tokens` rows of x for mma.sync, k split over a cluster and over warps_k warps, each of
 * which has `depth` blocks of w under way; blocks walk over tiles.
 */
#define GEMM_W4A16_SM90_WARP_SPLIT_K(X) /* tokens, row_blocks, warps_k, depth */ \
  X(8, 1, 8, 2)                                                                  \
  X(8, 2, 4, 2)                                                                  \
  X(8, 1, 12, 2)                                                                 \
  X(8, 1, 16, 2)                                                                 \
  X(8, 1, 4, 2)                                                                  \
  X(16, 1, 8, 2)                                                                 \
  X(16, 2, 4, 2)                                                                 \
  X(16, 4, 2, 2)                                                                 \
  X(16, 1, 12, 2)

/* Tiles of 64 * row_blocks rows of w by `tokens` rows of x for mma.sync (16 tokens) or wgmma, k split over a cluster; each warp has
 * sixteen rows of blocks_per_warp of the blocks of w.
 */
#define GEMM_W4A16_SM90_SPLIT_K(X) /* tokens, row_blocks, blocks_per_warp, min_blocks_per_sm */ \
  X(16, 4, 2, 2)                                                                                \
  X(32, 2, 1, 2)                                                                                \
  X(64, 2, 1, 1)                                                                                \
  X(64, 4, 1, 1)                                                                                \
  X(128, 2, 1, 1)

/* Tiles of 64 * row_blocks rows of w by `tokens` rows of x for wgmma, walked over by one block a multiprocessor. */
#define GEMM_W4A16_SM90_PERSISTENT(X) /* tokens, row_blocks */ \
  X(128, 2)                                                    \
  X(128, 4)                                                    \
  X(256, 2)
