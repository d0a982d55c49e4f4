// The way out of an op that feeds a linear layer: act-order gather, then 16-bit floats or int8 codes.
//
// Numerics: values arrive as f32, each the result of the op's own roundings, and are rounded once more to the
// activation dtype or quantized. Codes are bit for bit those of the CPU for the same f32 values (docs/numerics.md):
//   dynamic: s = amax / 127, or 1 where that is 0; q = clamp(rne(x / s), -127, 127)
//   static:  q = clamp(rne(x / s) + z, -128, 127)
//   a row that holds a NaN or an infinity has codes 0 and scale NaN
// with the divisions correctly rounded.
#pragma once

#include "abi.h"
#include "common/dtype.cuh"
#include "common/reduce.cuh"

// clamp(rne(x / scale) + zero, lowest, 127). The sum is taken in f32, where it is exact or far out of range.
__device__ __forceinline__ int8_t quantize_code(float x, float scale, float zero, float lowest) {
  const float q = __fadd_rn(rintf(__fdiv_rn(x, scale)), zero);
  return static_cast<int8_t>(fminf(fmaxf(q, lowest), 127.0f));
}

// Columns per thread that stay in registers between finding the largest value and quantizing: 1024 threads hold 16384.
constexpr int HELD = 2;

// Writes columns [begin, end) of row `row` of the output, all threads of the block together: the whole row where codes
// are asked for, since their scale is the row's. `Row` has `float at(uint32_t c)`, the value of the op's column c, and
// `void at8(uint32_t c, float (&v)[8])`, columns c to c + 7 for c and k multiples of 8; they are called up to twice for
// a column.
template <typename T, typename Row>
__device__ void emit_row(const EmitArgs& out, uint32_t row, const Row& values, uint32_t begin, uint32_t end) {
  const uint32_t k = out.k, first = begin + 8 * threadIdx.x, step = 8 * blockDim.x;
  const size_t start = static_cast<size_t>(row) * k;
  const bool by_eight = k % 8 == 0, in_order = out.order == nullptr;

  if (out.mode == LOWBIT_EMIT_FLOATS) {
    T* floats = static_cast<T*>(out.floats) + start;
    if (by_eight && in_order) {
      for (uint32_t c = first; c < end; c += step) {
        float v[8];
        values.at8(c, v);
        store8(floats + c, v);
      }
    } else {
      for (uint32_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
        floats[c] = from_float<T>(values.at(in_order ? c : out.order[c]));
      }
    }
    return;
  }

  // Absolute values as bits: they order like the values, and whatever is not finite is above all that is.
  uint32_t amax_bits = 0;
  float held[HELD][8];
  if (by_eight) {
    auto include = [&](const float(&v)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) amax_bits = max(amax_bits, __float_as_uint(fabsf(v[i])));
    };
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      if (first + h * step < end) {
        values.at8(first + h * step, held[h]);
        include(held[h]);
      }
    }
    for (uint32_t c = first + HELD * step; c < end; c += step) {
      float v[8];
      values.at8(c, v);
      include(v);
    }
  } else {
    for (uint32_t c = threadIdx.x; c < k; c += blockDim.x) {
      amax_bits = max(amax_bits, __float_as_uint(fabsf(values.at(c))));
    }
  }
  amax_bits = block_reduce(amax_bits, 0u, Max());
  const bool finite = amax_bits < 0x7f800000u;

  float scale = out.static_scale, zero = static_cast<float>(out.static_zero), lowest = -128.0f;
  if (out.mode == LOWBIT_EMIT_DYNAMIC) {
    scale = __fdiv_rn(__uint_as_float(amax_bits), 127.0f);
    if (scale == 0.0f) scale = 1.0f;
    zero = 0.0f, lowest = -127.0f;
  }
  if (threadIdx.x == 0) out.scales[row] = finite ? scale : __uint_as_float(0x7fc00000u);

  int8_t* codes = out.codes + start;
  if (by_eight && in_order) {
    auto write = [&](uint32_t c, const float(&v)[8]) {
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t code = finite ? static_cast<uint8_t>(quantize_code(v[i], scale, zero, lowest)) : 0;
        words[i / 4] |= code << (8 * (i % 4));
      }
      *reinterpret_cast<uint2*>(codes + c) = make_uint2(words[0], words[1]);
    };
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      if (first + h * step < end) write(first + h * step, held[h]);
    }
    for (uint32_t c = first + HELD * step; c < end; c += step) {
      float v[8];
      values.at8(c, v);
      write(c, v);
    }
  } else {
    for (uint32_t c = threadIdx.x; c < k; c += blockDim.x) {
      const float v = values.at(in_order ? c : out.order[c]);
      codes[c] = finite ? quantize_code(v, scale, zero, lowest) : 0;
    }
  }
}

// As above for the part of the row that block (x, y) of a grid (rows, parts of a row) owns.
template <typename T, typename Row>
__device__ void emit_part(const EmitArgs& out, const Row& values) {
  const uint32_t columns = 8 * blockDim.x, begin = blockIdx.y * columns;
  const uint32_t end = gridDim.y == 1 ? out.k : min(begin + columns, out.k);
  emit_row<T>(out, blockIdx.x, values, begin, end);
}
