// What prefill and decode share: sixteen query rows of one warp against tiles of keys and values in shared memory,
// with the softmax taken as the keys go by. Source: Dao et al., FlashAttention, arXiv 2205.14135 and 2307.08691.
//
// A tile is KEYS rows of D + 8 elements: the eight shift each row by 16 bytes, so that the eight rows of a matrix load
// lie in different banks. Columns from head_dim up to D are zeros and change nothing. `lane = 4 * g + t` as in
// common/mma.cuh: a lane holds scores of query rows g and g + 8.
#pragma once

#include <math_constants.h>

#include "attention/abi.h"
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

// As load_matrix_x4, each matrix transposed: lane 4g+t receives column g of rows 2t and 2t+1.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {  // within 2 ulp; exp2(-inf) is 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements between rows of a tile of head dimension D, and bytes of a tile of keys.
template <int D>
constexpr uint32_t TILE_STRIDE = D + 8;
template <int D, int KEYS>
constexpr uint32_t TILE_BYTES = KEYS * TILE_STRIDE<D> * 2;

// One sequence's part of the paged cache, for one KV head.
template <typename T>
struct PagedKv {
  const T* k;  // of this KV head
  const T* v;
  const uint32_t* blocks;  // this sequence's row of the block table
  uint32_t block_size;
  uint32_t block_magic;  // ceil(2^32 / block_size): keys / block_size without a division
  size_t token_stride;   // elements between tokens
  uint32_t head_dim;
  uint32_t end;  // keys

  __device__ PagedKv(const AttentionArgs& args, uint32_t sequence, uint32_t kv_head, uint32_t end)
      : k(static_cast<const T*>(args.k_cache) + kv_head * args.head_dim),
        v(static_cast<const T*>(args.v_cache) + kv_head * args.head_dim),
        blocks(args.block_tables + static_cast<size_t>(sequence) * args.header[1]),
        block_size(args.block_size),
        block_magic(args.block_magic),
        token_stride(static_cast<size_t>(args.num_kv_heads) * args.head_dim),
        head_dim(args.head_dim),
        end(end) {}

  // Begins copying keys [key, key + KEYS) and their values to two tiles, THREADS threads together; zeros after the end.
  template <int D, int KEYS, int THREADS>
  __device__ void load(uint32_t k_tile, uint32_t v_tile, uint32_t key, uint32_t thread) const {
    constexpr uint32_t VECTORS = D / 8;  // 16-byte pieces of a row
    constexpr uint32_t ROWS = THREADS / VECTORS;  // rows that the threads copy at a time
    static_assert(THREADS % VECTORS == 0 && KEYS % ROWS == 0);
    const uint32_t column = thread % VECTORS * 8;
#pragma unroll
    for (uint32_t i = 0; i < KEYS / ROWS; ++i) {
      const uint32_t row = i * ROWS + thread / VECTORS;
      const bool valid = key + row < end && column < head_dim;
      size_t offset = 0;
      if (valid) {
        const uint32_t block = __umulhi(key + row, block_magic);
        const uint32_t slot = blocks[block] * block_size + (key + row - block * block_size);
        offset = slot * token_stride + column;
      }
      const uint32_t at = (row * TILE_STRIDE<D> + column) * 2;
      copy_async16(k_tile + at, k + offset, valid);
      copy_async16(v_tile + at, v + offset, valid);
    }
  }
};

// Query rows g and g + 8 of a warp as the A operand of mma, taken from registers, or where the head is too wide for
// them from global memory (by then L1) at each use. A null row reads as zeros.
template <typename T, int D>
class QueryRows {
 public:
  static constexpr bool IN_REGISTERS = D <= 128;

  __device__ QueryRows(const T* low, const T* high, uint32_t head_dim) : low_(low), high_(high), head_dim_(head_dim) {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) read(held_[step], step);
    }
  }

  __device__ __forceinline__ void fragment(uint32_t (&a)[4], int step) const {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held_[step][i];
    } else {
      read(a, step);
    }
  }

 private:
  __device__ __forceinline__ void read(uint32_t (&a)[4], int step) const {
    const uint32_t column = 16 * step + threadIdx.x % 4 * 2;
    a[0] = pair(low_, column), a[1] = pair(high_, column);
    a[2] = pair(low_, column + 8), a[3] = pair(high_, column + 8);
  }

  __device__ __forceinline__ uint32_t pair(const T* row, uint32_t column) const {
    if (row == nullptr || column >= head_dim_) return 0;
    return *reinterpret_cast<const uint32_t*>(row + column);
  }

  const T* low_;
  const T* high_;
  uint32_t head_dim_;
  uint32_t held_[IN_REGISTERS ? D / 16 : 1][4];
};

// Keys that a query row sees: [first, last).
struct Visible {
  uint32_t first, last;
  __device__ __forceinline__ bool sees(uint32_t key) const { return key >= first && key < last; }
};

// Running softmax-weighted sum of values for sixteen query rows: index 0 is row g, index 1 row g + 8.
template <typename T, int D>
struct WarpAttention {
  float out[D / 8][4];  // sum of 2^(score - max) * value, fragments as mma's d
  float max[2];         // largest score so far, in powers of two
  float sum[2];         // of 2^(score - max), over this lane's keys only until `finish`

  __device__ WarpAttention() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
    max[0] = max[1] = -CUDART_INF_F;
    sum[0] = sum[1] = 0.0f;
  }

  // Takes KEYS keys from `key` on, whose tiles are at these shared addresses. `masked`: some row may not see some key.
  template <int KEYS>
  __device__ void take(const QueryRows<T, D>& q, uint32_t k_tile, uint32_t v_tile, uint32_t key, const Visible (&rows)[2],
                       bool masked, float scale_log2) {
    const uint32_t lane = threadIdx.x % WARP_SIZE;
    constexpr uint32_t STRIDE = TILE_STRIDE<D>;

    float score[KEYS / 8][4] = {};
    const uint32_t k_at = k_tile + ((lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[4];
      q.fragment(a, step);
#pragma unroll
      for (int tile = 0; tile < KEYS / 16; ++tile) {
        uint32_t b[4];
        load_matrix_x4(b, k_at + (tile * 16 * STRIDE + step * 16) * 2);
        mma_16bit<T>(score[2 * tile], a, b[0], b[1]);
        mma_16bit<T>(score[2 * tile + 1], a, b[2], b[3]);
      }
    }

    float tile_max[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        score[n][j] *= scale_log2;
        if (masked && !rows[j / 2].sees(key + 8 * n + lane % 4 * 2 + j % 2)) score[n][j] = -CUDART_INF_F;
        tile_max[j / 2] = fmaxf(tile_max[j / 2], score[n][j]);
      }

    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float now = fmaxf(max[r], warp_reduce<4>(tile_max[r], Max()));
      base[r] = now == -CUDART_INF_F ? 0.0f : now;  // a row that has seen no key yet
      const float rescale = exp2_approx(max[r] - base[r]);
      max[r] = now;
      sum[r] *= rescale;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        out[i][2 * r] *= rescale;
        out[i][2 * r + 1] *= rescale;
      }
    }

    const uint32_t v_at = v_tile + (lane % 16 * STRIDE + lane / 16 * 8) * 2;
#pragma unroll
    for (int tile = 0; tile < KEYS / 16; ++tile) {
#pragma unroll
      for (int n = 2 * tile; n < 2 * tile + 2; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          score[n][j] = exp2_approx(score[n][j] - base[j / 2]);
          sum[j / 2] += score[n][j];
        }
      const float(&p)[4] = score[2 * tile];
      const float(&next)[4] = score[2 * tile + 1];
      const uint32_t a[4] = {pack2<T>(p[0], p[1]), pack2<T>(p[2], p[3]), pack2<T>(next[0], next[1]),
                             pack2<T>(next[2], next[3])};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, v_at + (tile * 16 * STRIDE + step * 16) * 2);
        mma_16bit<T>(out[2 * step], a, b[0], b[1]);
        mma_16bit<T>(out[2 * step + 1], a, b[2], b[3]);
      }
    }
  }

  // Completes `sum` over the four lanes that share a row.
  __device__ void finish() {
    sum[0] = warp_reduce<4>(sum[0], Sum());
    sum[1] = warp_reduce<4>(sum[1], Sum());
  }
};
