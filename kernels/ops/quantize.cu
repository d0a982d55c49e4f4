// Quantizes or gathers activations that no producer could: the attention output, mostly.

#include "common/overlap.cuh"
#include "ops/emit.cuh"

template <typename T>
struct PlainRow {
  const T* x;

  __device__ float at(uint32_t c) const { return to_float(x[c]); }
  __device__ void at8(uint32_t c, float (&v)[8]) const { load8(x + c, v); }
};

// Computes out = emit(x) per row: `_T` emits floats (gathered), `_int8_T` codes, `_outliers_T` codes beside outliers. Shapes: x [m, k], out as EmitArgs. Grid:
// as silu_mul. Exact (common/emit.cuh).
template <typename T>
__device__ PlainRow<T> quantize(const QuantizeArgs& args) {
  return {static_cast<const T*>(args.x) + static_cast<size_t>(blockIdx.x) * args.out.k};
}

extern "C" __global__ void quantize_f16(const __grid_constant__ QuantizeArgs args) {
  overlap();
  emit_floats_part<f16>(args.out, quantize<f16>(args));
}
extern "C" __global__ void quantize_bf16(const __grid_constant__ QuantizeArgs args) {
  overlap();
  emit_floats_part<bf16>(args.out, quantize<bf16>(args));
}
extern "C" __global__ void __launch_bounds__(1024) quantize_int8_f16(const __grid_constant__ QuantizeArgs args) {
  overlap();
  emit_codes(args.out, blockIdx.x, quantize<f16>(args));
}
extern "C" __global__ void __launch_bounds__(1024) quantize_int8_bf16(const __grid_constant__ QuantizeArgs args) {
  overlap();
  emit_codes(args.out, blockIdx.x, quantize<bf16>(args));
}
extern "C" __global__ void __launch_bounds__(512) quantize_outliers_f16(const __grid_constant__ QuantizeArgs args) {
  overlap();
  emit_codes<f16>(args.out, blockIdx.x, quantize<f16>(args));
}
extern "C" __global__ void __launch_bounds__(512) quantize_outliers_bf16(const __grid_constant__ QuantizeArgs args) {
  overlap();
  emit_codes<bf16>(args.out, blockIdx.x, quantize<bf16>(args));
}
