// RMSNorm inside attention and MLP (BitNet), of activations, emitted as the input of the layer behind it.

#include "common/activation.cuh"
#include "common/overlap.cuh"
#include "ops/norm.cuh"

// A row of activations, or of relu(gate)^2 * up.
template <typename T>
struct InnerRow {
  const T* x;
  const T* up;  // null where there is no gate

  __device__ __forceinline__ explicit InnerRow(const SubNormArgs& args)
      : x(static_cast<const T*>(args.x) + static_cast<size_t>(blockIdx.x) * args.out.k * (args.gated != 0 ? 2 : 1)),
        up(args.gated != 0 ? x + args.out.k : nullptr) {}

  static __device__ __forceinline__ float gate(float g, float u) { return __fmul_rn(__fmul_rn(relu(g), relu(g)), u); }

  __device__ float at(uint32_t c) const { return up == nullptr ? to_float(x[c]) : gate(to_float(x[c]), to_float(up[c])); }

  __device__ void at8(uint32_t c, float (&v)[8]) const {
    load8(x + c, v);
    if (up == nullptr) return;
    float u[8];
    load8(up + c, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = gate(v[i], u[i]);
  }
};

// Computes   out = emit(v / sqrt(mean(v^2) + eps) * weight) per row, v = x or relu(gate)^2 * up: `_T` emits floats, `_int8_T`
//            codes, `_outliers_T` codes beside outliers.
// Shapes     x [m, k] T, or gated [m, 2 * k] with gate in the first k columns; weight [k] f32, out as EmitArgs.
// Grid       as rms_norm.
// Numerics   f32 until it is emitted: squares of f16 activations do not overflow. common/norm.cuh.
#define SUB_NORM(NAME, BOUNDS, EMIT)                                                                               \
  extern "C" __global__ void __launch_bounds__ BOUNDS sub_norm_##NAME(const __grid_constant__ SubNormArgs args) { \
    overlap();                                                                                                    \
    EMIT(args);                                                                                                    \
  }
#define SUB_NORM_TYPE(T)                                           \
  SUB_NORM(T, (1024), (norm_floats<T, InnerRow<T>>))               \
  SUB_NORM(int8_##T, (1024), (norm_codes<void, InnerRow<T>>))      \
  SUB_NORM(outliers_##T, (512, 1), (norm_codes<T, InnerRow<T>>))

SUB_NORM_TYPE(f16)
SUB_NORM_TYPE(bf16)
