// From exact int32 sums to outputs: the float operations of W8A8, the same on every device (docs/numerics.md).
#pragma once

#include "common/linear_fused.cuh"

// Zero point of a row of x: of GemmW8A8Args or GemmW4A8Args.
template <typename Args>
__device__ __forceinline__ int32_t zero_of_row(const Args& args, uint32_t row) {
  return args.x_zero_point + (args.x_zero_points == nullptr ? 0 : args.x_zero_points[row]);
}

// y = (float(acc - x_zero_point * sum(w)) * x_scale) * w_scale, each operation rounded once.
__device__ __forceinline__ float dequantize_w8a8(int32_t acc, int32_t correction, float x_scale, float w_scale) {
  return __fmul_rn(__fmul_rn(__int2float_rn(acc - correction), x_scale), w_scale);
}
