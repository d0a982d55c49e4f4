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

// Writes row `row` as codes and a scale, all threads of the block together. Where the row fits dynamic shared memory
// (`out.staged`), its values wait there between finding the largest and quantizing; else they are computed twice.
template <typename Row>
__device__ void emit_codes(const EmitArgs& out, uint32_t row, const Row& values) {
  extern __shared__ __align__(16) float staged[];  // [k]
  const uint32_t k = out.k;
  const bool by_eight = k % 8 == 0, is_staged = out.staged != 0;

  // Absolute values as bits: they order like the values, and whatever is not finite is above all that is.
  uint32_t amax_bits = 0;
  if (by_eight) {
    for (uint32_t c = 8 * threadIdx.x; c < k; c += 8 * blockDim.x) {
      float v[8];
      values.at8(c, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) amax_bits = max(amax_bits, __float_as_uint(fabsf(v[i])));
      if (is_staged) {
        reinterpret_cast<float4*>(staged + c)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(staged + c)[1] = make_float4(v[4], v[5], v[6], v[7]);
      }
    }
  } else {
    for (uint32_t c = threadIdx.x; c < k; c += blockDim.x) {
      const float v = values.at(c);
      amax_bits = max(amax_bits, __float_as_uint(fabsf(v)));
      if (is_staged) staged[c] = v;
    }
  }
  amax_bits = block_reduce(amax_bits, 0u, Max());  // synchronizes: all columns are staged
  const bool finite = amax_bits < 0x7f800000u;

  float scale = out.static_scale, zero = static_cast<float>(out.static_zero), lowest = -128.0f;
  if (out.mode == LOWBIT_EMIT_DYNAMIC) {
    scale = __fdiv_rn(__uint_as_float(amax_bits), 127.0f);
    if (scale == 0.0f) scale = 1.0f;
    zero = 0.0f, lowest = -127.0f;
  }
  if (threadIdx.x == 0) out.scales[row] = finite ? scale : __uint_as_float(0x7fc00000u);

  int8_t* codes = out.codes + static_cast<size_t>(row) * k;
  if (by_eight && out.order == nullptr) {
    for (uint32_t c = 8 * threadIdx.x; c < k; c += 8 * blockDim.x) {
      float v[8];
      if (is_staged) {
        load8(staged + c, v);
      } else {
        values.at8(c, v);
      }
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t code = finite ? static_cast<uint8_t>(quantize_code(v[i], scale, zero, lowest)) : 0;
        words[i / 4] |= code << (8 * (i % 4));
      }
      *reinterpret_cast<uint2*>(codes + c) = make_uint2(words[0], words[1]);
    }
  } else {
    for (uint32_t c = threadIdx.x; c < k; c += blockDim.x) {
      const uint32_t from = out.order == nullptr ? c : out.order[c];
      const float v = is_staged ? staged[from] : values.at(from);
      codes[c] = finite ? quantize_code(v, scale, zero, lowest) : 0;
    }
  }
}
