// The last step of a linear layer with an epilogue: bias, activation, then floats or 8-bit codes. What one output needs is
// in terms of its row and column alone, whatever fragments a kernel keeps its sums in.
#pragma once

#include "common/activation.cuh"
#include "common/linear_out.cuh"
#include "common/reduce.cuh"
#include "common/requantize.cuh"

// Columns are rows of w; with SWIGLU those of 16 neighbours are 8 of gate and 8 of up, and make 8 outputs. Values given
// are scaled sums, before the bias; in mode FIXED the bits of exact sums, zero points taken away.
class FusedWriter {
 public:
  __device__ __forceinline__ FusedWriter(const LinearOut& y, const float* x_scales)
      : y_(y), x_scales_(x_scales), coder_(y.scale, y.zero_point) {
    outputs_ = y.activation == LOWBIT_ACTIVATION_SWIGLU ? y.n / 2 : y.n;
    const uint32_t size = y.mode >= LOWBIT_OUT_STATIC ? 1 : y.mode >= LOWBIT_OUT_F16 ? 2 : 4;
    aligned_ = y.stride % 8 == 0 && reinterpret_cast<uintptr_t>(y.out) % min(8 * size, 16u) == 0;
  }

  // Eight columns from `col`, a multiple of 8; not for SWIGLU.
  __device__ __forceinline__ void store8(uint32_t row, uint32_t col, float (&y)[8]) const {
    if (row >= y_.m || col >= y_.n) return;
    finish8(col, y);
    write8(row, col, y);
  }

  // SWIGLU: eight outputs of gate columns from `col`, a multiple of 16, and up columns from `col` + 8.
  __device__ __forceinline__ void store8(uint32_t row, uint32_t col, float (&gate)[8], float (&up)[8]) const {
    if (row >= y_.m || col >= y_.n) return;
    finish8(col, gate, up);
    write8(row, col / 2, gate);
  }

  // GROUPS: as store8 by 16 neighbouring lanes, each with its eight outputs of the same 128, `col` theirs; all lanes of
  // the warp are here. `inside` tells which lanes have a row and columns.
  __device__ __forceinline__ void store_group(uint32_t row, uint32_t out_col, bool inside, float (&y)[8]) const {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!inside || out_col + i >= outputs_) y[i] = 0.0f;
      amax = max(amax, __float_as_uint(fabsf(y[i])));
    }
    amax = warp_reduce<16>(amax, Max());
    if (!inside) return;
    const bool finite = amax < 0x7f800000u;
    float scale = __fdiv_rn(__uint_as_float(amax), 127.0f);
    if (scale == 0.0f) scale = 1.0f;
    if (out_col % LOWBIT_GROUP_OUTPUTS == 0) {
      const size_t groups = (outputs_ + LOWBIT_GROUP_OUTPUTS - 1) / LOWBIT_GROUP_OUTPUTS;
      y_.scales[row * groups + out_col / LOWBIT_GROUP_OUTPUTS] = finite ? scale : __uint_as_float(0x7fc00000u);
    }
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t code = finite ? static_cast<uint8_t>(quantize_code(y[i], scale, 0.0f, -127.0f)) : 0;
      words[i / 4] |= code << (8 * (i % 4));
    }
    write_codes(row, out_col, words);
  }

  // One column; not for SWIGLU, nor for mode GROUPS.
  __device__ __forceinline__ void store1(uint32_t row, uint32_t col, float y) const {
    if (row >= y_.m || col >= y_.n) return;
    if (y_.mode == LOWBIT_OUT_FIXED) return write1(row, col, __int_as_float(fixed(col, y)));
    if (y_.bias != nullptr) y = __fadd_rn(y, y_.bias[col]);
    write1(row, col, activate(y, y_.activation));
  }

  // SWIGLU: output `out_col`, of two columns of w that bear these biases.
  __device__ __forceinline__ void store1(uint32_t row, uint32_t out_col, float gate, float up, uint32_t gate_col,
                                         uint32_t up_col) const {
    if (row >= y_.m || out_col >= outputs_) return;
    if (y_.bias != nullptr) gate = __fadd_rn(gate, y_.bias[gate_col]), up = __fadd_rn(up, y_.bias[up_col]);
    write1(row, out_col, swiglu(gate, up));
  }

  // Values of store8 before they are written: bias and activation; FIXED: the code as bits.
  __device__ __forceinline__ void finish8(uint32_t col, float (&y)[8]) const {
    if (y_.mode == LOWBIT_OUT_FIXED) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = __int_as_float(col + i < y_.n ? fixed(col + i, y[i]) : 0);
      return;
    }
    add_bias(col, y);
    if (y_.activation == LOWBIT_ACTIVATION_NONE) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = activate(y[i], y_.activation);
  }
  __device__ __forceinline__ void finish8(uint32_t col, float (&gate)[8], float (&up)[8]) const {
    add_bias(col, gate);
    add_bias(col + 8, up);
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = swiglu(gate[i], up[i]);
  }

 private:
  __device__ __forceinline__ int32_t fixed(uint32_t col, float bits) const {
    const int32_t lowest = y_.activation == LOWBIT_ACTIVATION_RELU ? y_.zero_point : -128;
    const int32_t sum = __float_as_int(bits) + y_.fixed[col];
    return fixed_code(sum, y_.fixed[y_.n + col], y_.fixed[2 * y_.n + col], y_.zero_point, lowest);
  }

  __device__ __forceinline__ void add_bias(uint32_t col, float (&y)[8]) const {
    if (y_.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (col + i < y_.n) y[i] = __fadd_rn(y[i], y_.bias[col + i]);
    }
  }

  // Scale of a row of codes, by whoever writes its first output.
  __device__ __forceinline__ void write_scale(uint32_t row) const {
    y_.scales[row] = isfinite(x_scales_[row]) ? y_.scale : __uint_as_float(0x7fc00000u);
  }

  __device__ __forceinline__ void write_codes(uint32_t row, uint32_t col, const uint32_t (&words)[2]) const {
    const uint32_t flip = y_.flip * 0x01010101u;
    uint8_t* out = static_cast<uint8_t*>(y_.out) + static_cast<size_t>(row) * y_.stride + col;
    if (aligned_ && col + 8 <= outputs_) {
      *reinterpret_cast<uint2*>(out) = make_uint2(words[0] ^ flip, words[1] ^ flip);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (col + i < outputs_) out[i] = static_cast<uint8_t>((words[i / 4] ^ flip) >> (8 * (i % 4)));
    }
  }

  template <typename T>
  __device__ __forceinline__ void write_16bit(uint32_t row, uint32_t col, const float (&y)[8]) const {
    T* out = static_cast<T*>(y_.out) + static_cast<size_t>(row) * y_.stride + col;
    if (aligned_ && col + 8 <= outputs_) return ::store8(out, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (col + i < outputs_) out[i] = from_float<T>(y[i]);
    }
  }

  __device__ __forceinline__ void write8(uint32_t row, uint32_t col, const float (&y)[8]) const {
    switch (y_.mode) {
      case LOWBIT_OUT_F16: return write_16bit<f16>(row, col, y);
      case LOWBIT_OUT_BF16: return write_16bit<bf16>(row, col, y);
      case LOWBIT_OUT_F32:
      case LOWBIT_OUT_F32_ADD: {
        float* out = static_cast<float*>(y_.out) + static_cast<size_t>(row) * y_.stride + col;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (col + i < outputs_) out[i] = y_.mode == LOWBIT_OUT_F32 ? y[i] : __fadd_rn(out[i], y[i]);
        }
        return;
      }
      default: break;
    }
    const bool is_fixed = y_.mode == LOWBIT_OUT_FIXED;
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t code = is_fixed ? __float_as_uint(y[i]) : coder_.code(y[i]);
      words[i / 4] |= (code & 0xff) << (8 * (i % 4));
    }
    write_codes(row, col, words);
    if (col == 0) write_scale(row);
  }

  __device__ __forceinline__ void write1(uint32_t row, uint32_t col, float y) const {
    const size_t at = static_cast<size_t>(row) * y_.stride + col;
    float* floats = static_cast<float*>(y_.out) + at;
    switch (y_.mode) {
      case LOWBIT_OUT_F16: static_cast<f16*>(y_.out)[at] = from_float<f16>(y); return;
      case LOWBIT_OUT_BF16: static_cast<bf16*>(y_.out)[at] = from_float<bf16>(y); return;
      case LOWBIT_OUT_F32: *floats = y; return;
      case LOWBIT_OUT_F32_ADD: *floats = __fadd_rn(*floats, y); return;
      default: break;
    }
    const uint32_t code = y_.mode == LOWBIT_OUT_FIXED ? __float_as_uint(y) : coder_.code(y);
    static_cast<uint8_t*>(y_.out)[at] = static_cast<uint8_t>(code ^ y_.flip);
    if (col == 0) write_scale(row);
  }

  const LinearOut& y_;
  const float* x_scales_;
  const StaticCoder coder_;
  uint32_t outputs_;
  bool aligned_;  // eight outputs, `col` a multiple of 8, can be stored at once (sixteen bytes at most)
};

// Finishes ROWS x COLS values that wait in shared memory, rows `pitch` apart, all THREADS threads together. `row_of` gives
// the row of y of each of the ROWS.
template <int THREADS, int ROWS, int COLS, typename RowOf>
__device__ __forceinline__ void finish_tile(const FusedWriter& writer, const LinearOut& y, const float* tile,
                                            uint32_t pitch, uint32_t thread, uint32_t first_col, RowOf row_of) {
  const uint32_t wide = y.activation == LOWBIT_ACTIVATION_SWIGLU ? 16 : 8;  // columns that make eight outputs
  const uint32_t chunks = COLS / wide;
#pragma unroll 1
  for (uint32_t i = thread; i < ROWS * chunks; i += THREADS) {
    const uint32_t from = i / chunks, chunk = i % chunks;
    const uint32_t row = row_of(from), col = first_col + chunk * wide;
    const float* values = tile + from * pitch + chunk * wide;
    float v[8];
    load8(values, v);
    if (wide == 16) {
      float up[8];
      load8(values + 8, up);
      if (y.mode == LOWBIT_OUT_GROUPS) {
        writer.finish8(col, v, up);
        writer.store_group(row, col / 2, row < y.m && col < y.n, v);
      } else {
        writer.store8(row, col, v, up);
      }
    } else if (y.mode == LOWBIT_OUT_GROUPS) {
      writer.finish8(col, v);
      writer.store_group(row, col, row < y.m && col < y.n, v);
    } else {
      writer.store8(row, col, v);
    }
  }
}

// f(Int<I>()), for I from 0 up to N.
template <int I>
struct Int {
  static constexpr int VALUE = I;
};
template <int N, int I = 0, typename F>
__device__ __forceinline__ void static_for(F f) {
  if constexpr (I < N) {
    f(Int<I>());
    static_for<N, I + 1>(f);
  }
}

// The same from fragments of mma.sync: `value(i, j, e)` is element e of the warp's fragment of rows 16 i and columns 8 j.
// Sixteen rows of every warp at a time pass through `shared`, which all warps have done reading.
template <int WARPS_M, int WARPS_N, int WM, int WN>
struct FusedTile {
  static constexpr int ROWS = 16 * WARPS_M, COLS = WARPS_N * WN, PITCH = COLS + 8;
  static constexpr int BYTES = 4 * ROWS * PITCH;

  template <typename Value>
  static __device__ __forceinline__ void finish(const LinearOut& y, const float* x_scales, float* shared,
                                                uint32_t first_row, uint32_t first_col, Value value) {
    const uint32_t warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;
    float* mine = shared + (warp_m * 16 + threadIdx.x % 32 / 4) * PITCH + warp_n * WN + threadIdx.x % 4 * 2;
#pragma unroll 1
    for (uint32_t pass = 0; pass < WM / 16; ++pass) {
      static_for<WM / 16>([&](auto index) {
        constexpr int I = decltype(index)::VALUE;
        if (I != pass) return;
        // Keeps the compiler from making one of these, with fragments in memory that it could index.
        asm volatile("// rows of fragment %0" ::"n"(I));
#pragma unroll
        for (int j = 0; j < WN / 8; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float2* to = reinterpret_cast<float2*>(mine + h * 8 * PITCH + j * 8);
            *to = make_float2(value(I, j, 2 * h), value(I, j, 2 * h + 1));
          }
        }
      });
      __syncthreads();
      const FusedWriter writer(y, x_scales);
      const auto row_of = [&](uint32_t from) { return first_row + from / 16 * WM + pass * 16 + from % 16; };
      finish_tile<32 * WARPS_M * WARPS_N, ROWS, COLS>(writer, y, shared, PITCH, threadIdx.x, first_col, row_of);
      __syncthreads();
    }
  }
};
