// The gated activation of the MLP, emitted as the down projection's input.

#include "common/activation.cuh"
#include "common/overlap.cuh"
#include "ops/emit.cuh"

template <typename T>
struct GatedRow {
  const T* gate;
  const T* up;

  __device__ float at(uint32_t c) const { return swiglu(to_float(gate[c]), to_float(up[c])); }

  __device__ void at8(uint32_t c, float (&v)[8]) const {
    float u[8];
    load8(gate + c, v);
    load8(up + c, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = swiglu(v[i], u[i]);
  }
};

// Computes   out = emit(silu(gate) * up) per row, silu(g) = g / (1 + exp(-g)): `_T` emits floats, `_int8_T` codes, `_outliers_T` codes beside outliers.
// Shapes     gate_up [m, 2 * k]: gate in the first k columns; out as EmitArgs.
// Grid       floats: (rows, parts of 8 columns a thread); codes: one block a row.
// Numerics   f32 until it is emitted: a product that feeds int8 is never rounded to 16 bits. The CPU's bits.
template <typename T>
__device__ GatedRow<T> silu_mul(const SiluMulArgs& args) {
  const T* gate = static_cast<const T*>(args.gate_up) + static_cast<size_t>(blockIdx.x) * 2 * args.out.k;
  return {gate, gate + args.out.k};
}

extern "C" __global__ void silu_mul_f16(const __grid_constant__ SiluMulArgs args) {
  overlap();
  emit_floats_part<f16>(args.out, silu_mul<f16>(args));
}
extern "C" __global__ void silu_mul_bf16(const __grid_constant__ SiluMulArgs args) {
  overlap();
  emit_floats_part<bf16>(args.out, silu_mul<bf16>(args));
}
extern "C" __global__ void __launch_bounds__(1024) silu_mul_int8_f16(const __grid_constant__ SiluMulArgs args) {
  overlap();
  emit_codes(args.out, blockIdx.x, silu_mul<f16>(args));
}
extern "C" __global__ void __launch_bounds__(1024) silu_mul_int8_bf16(const __grid_constant__ SiluMulArgs args) {
  overlap();
  emit_codes(args.out, blockIdx.x, silu_mul<bf16>(args));
}
extern "C" __global__ void __launch_bounds__(512, 1) silu_mul_outliers_f16(const __grid_constant__ SiluMulArgs args) {
  overlap();
  emit_codes<f16>(args.out, blockIdx.x, silu_mul<f16>(args));
}
extern "C" __global__ void __launch_bounds__(512, 1) silu_mul_outliers_bf16(const __grid_constant__ SiluMulArgs args) {
  overlap();
  emit_codes<bf16>(args.out, blockIdx.x, silu_mul<bf16>(args));
}
