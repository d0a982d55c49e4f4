// The way out of an op that feeds a linear layer: act-order gather, then 16-bit floats or int8 codes.
//
// Numerics: values arrive as f32, each the result of the op's own roundings, and are rounded once more to the
// activation dtype or quantized. Codes are bit for bit those of the CPU for the same f32 values (docs/numerics.md):
//   dynamic: s = amax / 127, or 1 where that is 0; q = clamp(rne(x / s), -127, 127)
//   asymmetric: s = (max - min) / 255 of the range with 0, or 1 where that is 0; z = clamp(rne(-128 - min / s), -128, 127);
//            q = clamp(rne(x / s) + z, -128, 127)
//   static:  q = clamp(rne(x / s) + z, -128, 127)
//   outliers: dynamic of the values below a threshold; the others apart, code 0
//   a row that holds a NaN or an infinity has codes 0 and scale NaN
// with the divisions correctly rounded.
#pragma once

#include <type_traits>

#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/requantize.cuh"
#include "ops/abi.h"

// `Row` in what follows has `float at(uint32_t c)`, the value of the op's column c, and `void at8(uint32_t c, float (&v)[8])`,
// columns c to c + 7 for c and k multiples of 8.

// Writes columns [begin, end) of row `row` as T, all threads of the block together.
template <typename T, typename Row>
__device__ void emit_floats(const EmitArgs& out, uint32_t row, const Row& values, uint32_t begin, uint32_t end) {
  T* floats = static_cast<T*>(out.floats) + static_cast<size_t>(row) * out.k;
  if (out.k % 8 == 0 && out.order == nullptr) {
    for (uint32_t c = begin + 8 * threadIdx.x; c < end; c += 8 * blockDim.x) {
      float v[8];
      values.at8(c, v);
      store8(floats + c, v);
    }
  } else {
    for (uint32_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
      floats[c] = from_float<T>(values.at(out.order == nullptr ? c : out.order[c]));
    }
  }
}

// As above for the part of the row that block (x, y) of a grid (rows, parts of a row) owns.
template <typename T, typename Row>
__device__ void emit_floats_part(const EmitArgs& out, const Row& values) {
  const uint32_t columns = 8 * blockDim.x, begin = blockIdx.y * columns;
  emit_floats<T>(out, blockIdx.x, values, begin, min(begin + columns, out.k));
}

// The finite values of a row from the threshold on, which LLM.int8() keeps as T beside the codes. With void there are none.
template <typename T>
class Outliers {
 public:
  __device__ __forceinline__ Outliers(const EmitArgs& out, uint32_t row)
      : threshold_(out.threshold), words_((out.k + 31) / 32), k_(out.k) {
    floats_ = static_cast<T*>(out.floats) + static_cast<size_t>(row) * k_;
    bits_ = out.outliers + static_cast<size_t>(row) * words_;
  }

  __device__ __forceinline__ bool has(float v) const { return fabsf(v) >= threshold_ && isfinite(v); }
  __device__ __forceinline__ void keep(uint32_t c, float v) const { floats_[c] = from_float<T>(v); }

  // Marks columns c to c + 7 by the bits of `mask`, and zeros what is behind the last column.
  __device__ __forceinline__ void mark8(uint32_t c, uint32_t mask) const {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(bits_);
    bytes[c / 8] = static_cast<uint8_t>(mask);
    for (uint32_t i = k_ / 8; c + 8 == k_ && i < 4 * words_; ++i) bytes[i] = 0;
  }

  // Marks column c, all lanes of a warp together, on 32 columns from a multiple of 32 on.
  __device__ __forceinline__ void mark(uint32_t c, bool outlier) const {
    const uint32_t vote = __ballot_sync(0xffffffff, outlier);
    if (c % 32 == 0) bits_[c / 32] = vote;
  }

  // Columns to go through for `mark`: whole warps.
  __device__ __forceinline__ uint32_t end() const { return 32 * words_; }

 private:
  float threshold_;
  uint32_t words_, k_;
  T* floats_;
  uint32_t* bits_;
};
template <>
class Outliers<void> {
 public:
  __device__ __forceinline__ Outliers(const EmitArgs& out, uint32_t) : k_(out.k) {}
  __device__ __forceinline__ bool has(float) const { return false; }
  __device__ __forceinline__ void keep(uint32_t, float) const {}
  __device__ __forceinline__ void mark8(uint32_t, uint32_t) const {}
  __device__ __forceinline__ void mark(uint32_t, bool) const {}
  __device__ __forceinline__ uint32_t end() const { return k_; }

 private:
  uint32_t k_;
};

// What a row's scale depends on, gathered value by value.
struct RowRange {
  float amax = 0.0f;  // NaN once there was one
  float low = 0.0f, high = 0.0f;
  bool asymmetric;

  __device__ __forceinline__ explicit RowRange(const EmitArgs& out) : asymmetric(out.mode == LOWBIT_EMIT_ASYMMETRIC) {}

  __device__ __forceinline__ void see(float v) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(amax) : "f"(amax), "f"(fabsf(v)));
  }
  // Where `asymmetric`, also.
  __device__ __forceinline__ void see_sides(float v) { low = fminf(low, v), high = fmaxf(high, v); }
};

// Codes of one row.
class RowCoder {
 public:
  // All threads of the block together, each with the range of what it has seen: synchronizes. Writes the row's scale.
  __device__ __forceinline__ RowCoder(const EmitArgs& out, uint32_t row, RowRange range)
      : finite_(true), scale_(out.static_scale), lowest_(-128.0f), zero_(out.static_zero_point), coder_(1.0f, 0) {
    // As bits absolute values order like the values, and what is not finite is above all that is.
    const uint32_t amax_bits = block_reduce(__float_as_uint(range.amax), 0u, Max());
    finite_ = amax_bits < 0x7f800000u;
    if (out.mode == LOWBIT_EMIT_DYNAMIC || out.mode == LOWBIT_EMIT_OUTLIERS) {
      scale_ = __fdiv_rn(__uint_as_float(amax_bits), 127.0f);
      if (scale_ == 0.0f) scale_ = 1.0f;
      zero_ = 0, lowest_ = -127.0f;
    } else if (range.asymmetric) {
      const float low = -block_reduce(-range.low, 0.0f, Max()), high = block_reduce(range.high, 0.0f, Max());
      scale_ = __fdiv_rn(__fsub_rn(high, low), 255.0f);
      if (scale_ == 0.0f) scale_ = 1.0f;
      finite_ = finite_ && isfinite(scale_);
      const float code = rintf(__fsub_rn(-128.0f, __fdiv_rn(low, scale_)));
      zero_ = finite_ ? static_cast<int32_t>(fminf(fmaxf(code, -128.0f), 127.0f)) : 0;
    }
    if (threadIdx.x == 0) {
      out.scales[row] = finite_ ? scale_ : __uint_as_float(0x7fc00000u);
      if (range.asymmetric) out.zero_points[row] = zero_;
    }
    coder_ = StaticCoder(scale_, zero_);
    ordinary_ = StaticCoder::takes(scale_);
    reaches_all_ = lowest_ == -127.0f;
  }

  // In the low byte; the others hold anything.
  __device__ __forceinline__ uint32_t code(float v) const {
    if (!finite_) return 0;
    return ordinary_ ? coder_.code(v)
                     : static_cast<uint8_t>(quantize_code(v, scale_, static_cast<float>(zero_), lowest_));
  }

  // Codes of columns c to c + 7; outliers have code 0 and are kept, unless the row as a whole is lost.
  template <typename T>
  __device__ __forceinline__ uint2 code8(const float (&v)[8], uint32_t flip, const Outliers<T>& outliers, uint32_t c) const {
    if (std::is_void<T>::value && finite_ && ordinary_) {
      const uint2 codes = reaches_all_ ? coder_.codes8<false>(v) : coder_.codes8<true>(v);
      return make_uint2(codes.x ^ flip * 0x01010101u, codes.y ^ flip * 0x01010101u);
    }
    uint32_t words[2] = {0, 0}, mask = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool outlier = is_kept(v[i], outliers, c + i);
      mask |= static_cast<uint32_t>(outlier) << i;
      words[i / 4] |= (outlier ? 0 : code(v[i]) & 0xff) << (8 * (i % 4));
    }
    outliers.mark8(c, mask);
    return make_uint2(words[0] ^ flip * 0x01010101u, words[1] ^ flip * 0x01010101u);
  }

  // Whether the value of column c is an outlier, and then keeps it.
  template <typename T>
  __device__ __forceinline__ bool is_kept(float v, const Outliers<T>& outliers, uint32_t c) const {
    const bool outlier = finite_ && outliers.has(v);
    if (outlier) outliers.keep(c, v);
    return outlier;
  }

 private:
  bool finite_, ordinary_;
  bool reaches_all_;  // no value of the row is outside what codes reach
  float scale_, lowest_;
  int32_t zero_;
  StaticCoder coder_;  // as exact as quantize_code, where it works
};

// Where act-order takes columns c to c + 7 of a row that is held from, 16 bits each.
__device__ __forceinline__ uint4 order8(const EmitArgs& out, uint32_t c) {
  const uint4 low = reinterpret_cast<const uint4*>(out.order + c)[0], high = reinterpret_cast<const uint4*>(out.order + c)[1];
  return make_uint4(low.x | low.y << 16, low.z | low.w << 16, high.x | high.y << 16, high.z | high.w << 16);
}

// The same of all columns that a thread writes: asked for at once, as far as there are registers.
template <int CHUNKS>
class HeldOrder {
 public:
  __device__ __forceinline__ explicit HeldOrder(const EmitArgs& out) {
#pragma unroll
    for (int i = 0; i < EARLY; ++i) {
      const uint32_t c = 8 * (threadIdx.x + i * blockDim.x);
      if (out.order != nullptr && c < out.k) columns_[i] = order8(out, c);
    }
  }
  __device__ __forceinline__ uint4 columns(const EmitArgs& out, int chunk) const {
    return chunk < EARLY ? columns_[chunk] : order8(out, 8 * (threadIdx.x + chunk * blockDim.x));
  }

 private:
  static constexpr int EARLY = CHUNKS <= 2 ? CHUNKS : 1;
  uint4 columns_[EARLY];
};

// A row in registers, CHUNKS times eight columns in each thread of the block.
template <int CHUNKS>
struct HeldRow {
  float v[CHUNKS][8];

  static __device__ __forceinline__ uint32_t column(int chunk) { return 8 * (threadIdx.x + chunk * blockDim.x); }

  template <typename Row>
  __device__ __forceinline__ HeldRow(const Row& values, uint32_t k) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = 0.0f;
      if (column(i) < k) values.at8(column(i), v[i]);
    }
  }

  // Sum of squares of the row, the same bits for every number of threads: eight columns after each other, 32 such by a
  // tree, and those together by another. All threads of the block together: synchronizes.
  __device__ __forceinline__ float square_sum() const {
    __shared__ float partial[CHUNKS * 32];
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(v[i][j], v[i][j], sum);
      sum = warp_reduce(sum, Sum());
      if (lane == 0) partial[(threadIdx.x + i * blockDim.x) / 32] = sum;
    }
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t p = lane; p < CHUNKS * blockDim.x / 32; p += 32) sum += partial[p];
    return warp_reduce(sum, Sum());
  }

  template <typename T = void>
  __device__ __forceinline__ void emit_codes(const EmitArgs& out, uint32_t row) const {
    const Outliers<T> outliers(out, row);
    RowRange range(out);
#pragma unroll
    for (int i = 0; i < 8 * CHUNKS; ++i) {
      if (!outliers.has(v[i / 8][i % 8])) range.see(v[i / 8][i % 8]);
    }
    if (range.asymmetric) {
#pragma unroll
      for (int i = 0; i < 8 * CHUNKS; ++i) range.see_sides(v[i / 8][i % 8]);
    }
    const RowCoder coder(out, row, range);
    int8_t* codes = out.codes + static_cast<size_t>(row) * out.k;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (column(i) < out.k) *reinterpret_cast<uint2*>(codes + column(i)) = coder.code8(v[i], out.flip, outliers, column(i));
    }
  }

  // A gather goes through dynamic shared memory, k of T; all threads of the block together.
  template <typename T>
  __device__ __forceinline__ void emit_floats(const EmitArgs& out, uint32_t row, const HeldOrder<CHUNKS>& order) const {
    extern __shared__ __align__(16) float staged[];
    T* floats = static_cast<T*>(out.floats) + static_cast<size_t>(row) * out.k;
    const uint16_t* values = reinterpret_cast<const uint16_t*>(staged);
    T* to = out.order == nullptr ? floats : reinterpret_cast<T*>(staged);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (column(i) < out.k) store8(to + column(i), v[i]);
    }
    if (out.order == nullptr) return;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (column(i) >= out.k) continue;
      const uint4 from = order.columns(out, i);
      const auto two = [&](uint32_t pair) { return values[pair & 0xffff] | static_cast<uint32_t>(values[pair >> 16]) << 16; };
      *reinterpret_cast<uint4*>(floats + column(i)) = make_uint4(two(from.x), two(from.y), two(from.z), two(from.w));
    }
  }
};

// The host, which knows it too, leaves out the shared memory of rows that are held.
constexpr uint32_t MOST_CHUNKS = LOWBIT_EMIT_MOST_CHUNKS;

// Chunks of eight columns for each thread of the block where a row is held in registers: 1, 2 or MOST_CHUNKS; 0
// where it is not, as where codes are gathered.
__device__ __forceinline__ uint32_t held_chunks(const EmitArgs& out) {
  const bool gathers_codes = out.order != nullptr && out.mode != LOWBIT_EMIT_FLOATS;
  if (out.k % 8 != 0 || gathers_codes || out.k > MOST_CHUNKS * 8 * blockDim.x) return 0;
  return out.k <= 8 * blockDim.x ? 1 : out.k <= 16 * blockDim.x ? 2 : MOST_CHUNKS;
}

// Writes row `row` as codes and a scale, all threads of the block together; mode OUTLIERS with the type T that outliers
// are kept in. A row that is not held in registers and fits dynamic shared memory (`out.staged`) waits there between
// finding the largest and quantizing; else it is computed twice.
template <typename T = void, typename Row>
__device__ void emit_codes(const EmitArgs& out, uint32_t row, const Row& values) {
  switch (held_chunks(out)) {
    case 1: return HeldRow<1>(values, out.k).template emit_codes<T>(out, row);
    case 2: return HeldRow<2>(values, out.k).template emit_codes<T>(out, row);
    case MOST_CHUNKS: return HeldRow<MOST_CHUNKS>(values, out.k).template emit_codes<T>(out, row);
    default: break;
  }
  extern __shared__ __align__(16) float staged[];  // [k]
  const uint32_t k = out.k;
  const bool by_eight = k % 8 == 0, is_staged = out.staged != 0;
  const Outliers<T> outliers(out, row);
  RowRange range(out);
  const auto see = [&](float v) {
    if (outliers.has(v)) return;
    range.see(v);
    if (range.asymmetric) range.see_sides(v);
  };
  if (by_eight) {
    for (uint32_t c = 8 * threadIdx.x; c < k; c += 8 * blockDim.x) {
      float v[8];
      values.at8(c, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) see(v[i]);
      if (is_staged) {
        reinterpret_cast<float4*>(staged + c)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(staged + c)[1] = make_float4(v[4], v[5], v[6], v[7]);
      }
    }
  } else {
    for (uint32_t c = threadIdx.x; c < k; c += blockDim.x) {
      const float v = values.at(c);
      see(v);
      if (is_staged) staged[c] = v;
    }
  }
  const RowCoder coder(out, row, range);  // synchronizes: all columns are staged

  uint8_t* codes = reinterpret_cast<uint8_t*>(out.codes) + static_cast<size_t>(row) * k;
  if (by_eight && out.order == nullptr) {
    for (uint32_t c = 8 * threadIdx.x; c < k; c += 8 * blockDim.x) {
      float v[8];
      if (is_staged) {
        load8(staged + c, v);
      } else {
        values.at8(c, v);
      }
      *reinterpret_cast<uint2*>(codes + c) = coder.code8(v, out.flip, outliers, c);
    }
  } else {
    for (uint32_t c = threadIdx.x; c < outliers.end(); c += blockDim.x) {
      bool outlier = false;
      if (c < k) {
        const uint32_t from = out.order == nullptr ? c : out.order[c];
        const float v = is_staged ? staged[from] : values.at(from);
        outlier = coder.is_kept(v, outliers, c);
        codes[c] = static_cast<uint8_t>((outlier ? 0 : coder.code(v)) ^ out.flip);
      }
      outliers.mark(c, outlier);
    }
  }
}
