// The last step of a linear layer without an epilogue, or of 16-bit activations: bias, SwiGLU where a weight is made for it,
// rounding to the destination's type, store or add.
#pragma once

#include "common/abi.h"
#include "common/activation.cuh"
#include "common/dtype.cuh"

// True where LinearWriter is enough; else common/linear_fused.cuh.
__device__ __forceinline__ bool is_plain(const LinearOut& y) {
  return y.mode <= LOWBIT_OUT_BF16 && y.activation == LOWBIT_ACTIVATION_NONE;
}

// Writes y[row, col] and y[row, col + 1] where they lie inside [m, n]. Every float operation is rounded on its own
// (no fused multiply-add may form), which is what makes int8 layers equal on all devices.
class LinearWriter {
 public:
  __device__ __forceinline__ explicit LinearWriter(const LinearOut& y)
      : y_(y), pairs_(y.stride % 2 == 0 && reinterpret_cast<uintptr_t>(y.out) % 8 == 0) {}

  // Sixteen bytes of a row lie on sixteen bytes where they do in row 0.
  __device__ __forceinline__ bool takes_16_bytes() const {
    return y_.stride % 8 == 0 && reinterpret_cast<uintptr_t>(y_.out) % 16 == 0;
  }

  __device__ __forceinline__ void store2(uint32_t row, uint32_t col, float y0, float y1) const {
    if (row >= y_.m || col >= y_.n) return;
    const bool both = col + 1 < y_.n;
    if (y_.bias != nullptr) {
      y0 = __fadd_rn(y0, y_.bias[col]);
      if (both) y1 = __fadd_rn(y1, y_.bias[col + 1]);
    }
    put2(static_cast<size_t>(row) * y_.stride + col, both, y0, y1);
  }

  // SwiGLU, of a weight whose rows are 8 of gate and 8 of up in turn: an output is made of rows `gate_col` and `gate_col` + 8.
  __device__ __forceinline__ bool is_gated() const { return y_.activation == LOWBIT_ACTIVATION_SWIGLU; }
  __device__ __forceinline__ float gated(uint32_t gate_col, float gate, float up) const {
    if (y_.bias != nullptr && gate_col < y_.n) {
      gate = __fadd_rn(gate, y_.bias[gate_col]), up = __fadd_rn(up, y_.bias[gate_col + 8]);
    }
    return swiglu(gate, up);
  }
  __device__ __forceinline__ void store_gated2(uint32_t row, uint32_t out_col, float y0, float y1) const {
    if (row < y_.m && out_col < y_.n / 2) put2(static_cast<size_t>(row) * y_.stride + out_col, true, y0, y1);
  }

  __device__ __forceinline__ void store1(uint32_t row, uint32_t col, float y) const {
    if (row >= y_.m || col >= y_.n) return;
    if (y_.bias != nullptr) y = __fadd_rn(y, y_.bias[col]);
    const size_t at = static_cast<size_t>(row) * y_.stride + col;
    if (y_.mode == LOWBIT_OUT_F16) {
      static_cast<f16*>(y_.out)[at] = from_float<f16>(y);
    } else if (y_.mode == LOWBIT_OUT_BF16) {
      static_cast<bf16*>(y_.out)[at] = from_float<bf16>(y);
    } else {
      float* out = static_cast<float*>(y_.out) + at;
      *out = y_.mode == LOWBIT_OUT_F32_ADD ? __fadd_rn(*out, y) : y;
    }
  }

 private:
  // `both`: there is a second one.
  __device__ __forceinline__ void put2(size_t at, bool both, float y0, float y1) const {
    if (y_.mode == LOWBIT_OUT_F16) {
      store_16bit<f16>(at, both, y0, y1);
    } else if (y_.mode == LOWBIT_OUT_BF16) {
      store_16bit<bf16>(at, both, y0, y1);
    } else {
      float* out = static_cast<float*>(y_.out) + at;
      const bool add = y_.mode == LOWBIT_OUT_F32_ADD;
      if (both && pairs_) {
        float2* out2 = reinterpret_cast<float2*>(out);
        const float2 old = add ? *out2 : make_float2(0.0f, 0.0f);
        *out2 = add ? make_float2(__fadd_rn(old.x, y0), __fadd_rn(old.y, y1)) : make_float2(y0, y1);
        return;
      }
      out[0] = add ? __fadd_rn(out[0], y0) : y0;
      if (both) out[1] = add ? __fadd_rn(out[1], y1) : y1;
    }
  }

  template <typename T>
  __device__ __forceinline__ void store_16bit(size_t at, bool both, float y0, float y1) const {
    T* out = static_cast<T*>(y_.out) + at;
    if (both && pairs_) {
      *reinterpret_cast<uint32_t*>(out) = pack2<T>(y0, y1);
      return;
    }
    out[0] = from_float<T>(y0);
    if (both) out[1] = from_float<T>(y1);
  }

  const LinearOut& y_;
  const bool pairs_;  // two columns can be stored at once, `col` being even
};

// Columns `col` to `col + 7` of a row inside y, without an epilogue.
__device__ __forceinline__ void store_plain8(const LinearWriter& writer, const LinearOut& out, uint32_t row,
                                             uint32_t col, const float (&y)[8]) {
  const bool is_16bit = out.mode == LOWBIT_OUT_F16 || out.mode == LOWBIT_OUT_BF16;
  if (is_16bit && out.bias == nullptr && col + 8 <= out.n && writer.takes_16_bytes()) {
    const size_t at = static_cast<size_t>(row) * out.stride + col;
    if (out.mode == LOWBIT_OUT_F16) {
      store8(static_cast<f16*>(out.out) + at, y);
    } else {
      store8(static_cast<bf16*>(out.out) + at, y);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) writer.store2(row, col + i, y[i], y[i + 1]);
}
