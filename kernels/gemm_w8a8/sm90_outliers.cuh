// The outliers of LLM.int8() in the epilogue of gemm_w8a8 on sm_90: each row's own, in 16 bit, times dequantized weights.
//
// A warp works for itself. It lists the columns that are outliers of any of its rows, in ascending order and some at a time,
// fetches their values and these columns of w, and adds the products to its outputs. A row skips columns that are outliers of
// other rows alone, so no result depends on the batch.
// Numerics: y = fma(x[c], float(w[n, c]) * w_scale[n], y) for c ascending, after the scaled int8 part; the CPU's bits.
// Overlap: the first columns, which are usually all, are fetched before the products, while the ring fills. What they
//          are fetched from is on its way to this block's ring at that time, so that memory is read once.
#pragma once

#include "common/dtype.cuh"
#include "common/load.cuh"
#include "gemm_w8a8/abi.h"

// Of a warp's outputs: ROWS rows of x, at most 32, by COLS rows of w. BATCH columns are fetched at a time.
template <int ROWS, int COLS, int BATCH>
class WarpOutliers {
  struct Column {
    float x[ROWS];  // 0 where it is no outlier of the row
    float w[COLS];
  };

 public:
  static constexpr uint32_t BYTES = BATCH * sizeof(Column);  // of shared memory for each warp
  static_assert(ROWS % 4 == 0 && BYTES % 16 == 0 && ROWS <= 32 && COLS % 64 == 0, "a lane holds a row");

  // `row`: in lane r the warp's row r of x; ascending, from y.m on where there is none. `col`: first row of w, a multiple of 64.
  // `memory` is this warp's alone from `begin` until `each` is through.
  __device__ __forceinline__ WarpOutliers(const GemmW8A8Sm90Args& args, uint32_t row, uint32_t col, uint8_t* memory)
      : args_(args), row_(row), col_(col), words_((args.k + 31) / 32), columns_(reinterpret_cast<Column*>(memory)) {}

  // Fetches the first columns. What makes x is through.
  __device__ __forceinline__ void begin() {
    rows_ = __popc(__ballot_sync(ALL, has_row()));
    if (rows_ != 0) fetch();
  }

  // f(x, w) for each column of any row, ascending: its values of ROWS rows and its COLS dequantized weights.
  template <typename F>
  __device__ __forceinline__ void each(F f) {
    while (true) {
#pragma unroll 1
      for (uint32_t u = 0; u < count_; ++u) f(columns_[u].x, columns_[u].w);
      if (count_ < BATCH) break;
      fetch();
    }
    __syncwarp();
  }

 private:
  static constexpr uint32_t ALL = 0xffffffff;
  static constexpr uint32_t SPAN = 4;  // words of bits that a lane looks at together

  static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ bool has_row() const { return lane() < ROWS && row_ < args_.y.m; }

  // The next SPAN words of each lane: columns that are outliers of any row. Some rows are asked for at a time; where there are
  // fewer, the last again, which adds nothing.
  __device__ __forceinline__ void look() {
    constexpr uint32_t TOGETHER = ROWS == 16 ? 8 : 4;  // as there are registers for beside 32 rows' outputs
    const uint32_t word = next_ + SPAN * lane();
    next_ += 32 * SPAN;
#pragma unroll 1
    for (uint32_t r = 0; r < rows_; r += TOGETHER) {
      uint32_t bits[TOGETHER][SPAN];
#pragma unroll
      for (uint32_t j = 0; j < TOGETHER; ++j) {
        const uint32_t* p = args_.outliers + static_cast<size_t>(__shfl_sync(ALL, row_, min(r + j, rows_ - 1))) * words_ + word;
#pragma unroll
        for (uint32_t i = 0; i < SPAN; ++i) bits[j][i] = load_if(p + i, word + i < words_);
      }
#pragma unroll
      for (uint32_t j = 0; j < TOGETHER; ++j) {
#pragma unroll
        for (uint32_t i = 0; i < SPAN; ++i) any_[i] |= bits[j][i];
      }
    }
  }

  // Moves columns from what was looked at to the end of `list`, up to BATCH in all.
  __device__ __forceinline__ void take(uint32_t* list) {
    uint32_t found = 0;
#pragma unroll
    for (uint32_t i = 0; i < SPAN; ++i) found += __popc(any_[i]);
    if (!__any_sync(ALL, found != 0)) return;
    uint32_t end = found;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const uint32_t before = __shfl_up_sync(ALL, end, distance);
      if (lane() >= distance) end += before;
    }
    uint32_t at = count_ + end - found;
#pragma unroll
    for (uint32_t i = 0; i < SPAN; ++i) {
      const uint32_t word = next_ - 32 * SPAN + SPAN * lane() + i;
      for (; any_[i] != 0 && at < BATCH; any_[i] &= any_[i] - 1) list[at++] = 32 * word + __ffs(any_[i]) - 1;
    }
    count_ = min(static_cast<uint32_t>(BATCH), count_ + __shfl_sync(ALL, end, 31));
  }

  // The next columns; fewer than BATCH are the last.
  __device__ __forceinline__ void fetch() {
    __syncwarp();  // all have read what was there
    uint32_t* list = reinterpret_cast<uint32_t*>(columns_);
    count_ = 0;
    while (true) {
      take(list);
      if (count_ == BATCH || next_ >= words_) break;
      look();
    }
    if (count_ == 0) return;
    __syncwarp();
    uint32_t listed[BATCH];
#pragma unroll
    for (uint32_t u = 0; u < BATCH; ++u) listed[u] = u < count_ ? list[u] : 0;
    __syncwarp();

    // All is asked for before anything is used. A lane without a row reads the last.
    const uint32_t slices = (args_.k + 127) / 128;
    const int8_t* w = args_.w + static_cast<size_t>(col_ / 64) * slices * BLOCK_BYTES + lane() * 128;
    const size_t row = min(row_, args_.y.m - 1);
    const uint16_t* floats = static_cast<const uint16_t*>(args_.x_floats) + row * args_.k;
    const uint32_t* bits = args_.outliers + row * words_;
    uint32_t marks[BATCH], values[BATCH];
    int32_t weights[BATCH][EACH];
#pragma unroll
    for (uint32_t u = 0; u < BATCH; ++u) {
      const uint32_t c = listed[u];
      marks[u] = bits[c / 32], values[u] = floats[c];
      const uint32_t place = c / 128 * BLOCK_BYTES + ((c / 16 ^ lane()) % 8) * 16 + c % 16;
#pragma unroll
      for (uint32_t j = 0; j < EACH; ++j) {
        const bool inside = u < count_ && col_ + 32 * j + lane() < args_.y.n;
        weights[u][j] = load_if(w + place + j / 2 * slices * BLOCK_BYTES + j % 2 * 32 * 128, inside);
      }
    }
    float scales[EACH];
#pragma unroll
    for (uint32_t j = 0; j < EACH; ++j) scales[j] = args_.w_scales[col_ + 32 * j + lane()];
#pragma unroll
    for (uint32_t u = 0; u < BATCH; ++u) {
      const float x = args_.floats_f16 != 0 ? to_float(__ushort_as_half(values[u])) : __uint_as_float(values[u] << 16);
      if (lane() < ROWS) columns_[u].x[lane()] = has_row() && (marks[u] >> (listed[u] % 32) & 1) != 0 ? x : 0.0f;
#pragma unroll
      for (uint32_t j = 0; j < EACH; ++j) {
        columns_[u].w[32 * j + lane()] = __fmul_rn(static_cast<float>(weights[u][j]), scales[j]);
      }
    }
    __syncwarp();
  }

  static constexpr uint32_t BLOCK_BYTES = 64 * 128;  // of w's layout
  static constexpr uint32_t EACH = COLS / 32;        // rows of w for a lane

  const GemmW8A8Sm90Args& args_;
  const uint32_t row_, col_, words_;  // words of a row's bits
  Column* const columns_;
  uint32_t rows_ = 0;        // rows of x that there are
  uint32_t next_ = 0;        // first word not looked at
  uint32_t any_[SPAN] = {};  // columns looked at and not fetched
  uint32_t count_ = 0;       // columns that wait in shared memory
};

// W8A8 without outliers.
struct NoOutliers {
  static constexpr uint32_t BYTES = 0;
  __device__ __forceinline__ NoOutliers(const GemmW8A8Sm90Args&, uint32_t, uint32_t, uint8_t*) {}
};
