// Linear layers of any shape and grouping, without speed: what the tensor-core kernels do not take (rows that do not
// start on 16 bytes, groups that are no multiple of 32, fractional zero points).
//
// Computes: what gemm_w8a8, gemm_w4a8, gemm_w4a16 (FP8 too) and gemm_dense compute, from canonical weights.
// Layout:   everything row-major: x [m, k], codes (one to a byte) or floats [n, k], scales and zeros [n, groups].
// Grid:     one warp a column n of y; blockIdx.y takes ROWS rows.
// Numerics: int8 exactly as the CPU: integer sums of a group, then one chain of float operations in group order.
//           Floats: each lane sums every 32nd column in f32, lanes are added in a fixed order. Deterministic.

#include "common/linear_fused.cuh"
#include "gemm_any/abi.h"

constexpr int WARPS = GEMM_ANY_WARPS, ROWS = GEMM_ANY_ROWS;

template <typename Sum>
__device__ __forceinline__ Sum warp_sum(Sum value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
  return value;
}

// `weight(column)` is the f32 weight of this warp's row.
template <typename T, typename Weight>
__device__ __forceinline__ void any_floats(const GemmAnyArgs& args, uint32_t n, Weight weight) {
  const uint32_t lane = threadIdx.x % 32, first = blockIdx.y * ROWS;
  const T* x = static_cast<const T*>(args.x);
  float sum[ROWS] = {};
  for (uint32_t column = lane; column < args.k; column += 32) {
    const float w = weight(column);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (first + i < args.y.m) {
        sum[i] = fmaf(to_float(x[static_cast<size_t>(first + i) * args.k + column]), w, sum[i]);
      }
    }
  }
  const LinearWriter writer(args.y);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float y = warp_sum(sum[i]);
    if (lane == 0) writer.store1(first + i, n, y);
  }
}

template <typename T>
__device__ __forceinline__ void any_quant(const GemmAnyArgs& args) {
  const uint32_t n = blockIdx.x * WARPS + threadIdx.x / 32;
  if (n >= args.y.n) return;
  const size_t groups = (args.k + args.group - 1) / args.group;
  const uint8_t* codes = static_cast<const uint8_t*>(args.w) + static_cast<size_t>(n) * args.k;
  const float *scales = args.w_scales + n * groups, *zeros = args.w_zero_points + n * groups;
  any_floats<T>(args, n, [&](uint32_t column) {
    const uint32_t group = column / args.group;
    return scales[group] * (static_cast<float>(codes[column]) - zeros[group]);
  });
}

template <typename T>
__device__ __forceinline__ void any_codebook(const GemmAnyArgs& args) {
  const uint32_t n = blockIdx.x * WARPS + threadIdx.x / 32;
  if (n >= args.y.n) return;
  const size_t groups = (args.k + args.group - 1) / args.group;
  const uint8_t* codes = static_cast<const uint8_t*>(args.w) + static_cast<size_t>(n) * args.k;
  const float* scales = args.w_scales + n * groups;
  any_floats<T>(args, n, [&](uint32_t column) { return scales[column / args.group] * args.codebook[codes[column]]; });
}

template <typename T>
__device__ __forceinline__ void any_e4m3(const GemmAnyArgs& args) {
  const uint32_t n = blockIdx.x * WARPS + threadIdx.x / 32;
  if (n >= args.y.n) return;
  const size_t groups = (args.k + args.group - 1) / args.group;
  const uint8_t* codes = static_cast<const uint8_t*>(args.w) + static_cast<size_t>(n) * args.k;
  const float* scales = args.w_scales + n * groups;
  any_floats<T>(args, n, [&](uint32_t column) {
    // As f32 whose exponent has the lower four bits of an e4m3's, the number is 2^-120 times what it stands for.
    const uint32_t code = codes[column];
    return scales[column / args.group] * (__uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f);
  });
}

template <typename T>
__device__ __forceinline__ void any_dense(const GemmAnyArgs& args) {
  const uint32_t n = blockIdx.x * WARPS + threadIdx.x / 32;
  if (n >= args.y.n) return;
  const T* w = static_cast<const T*>(args.w) + static_cast<size_t>(n) * args.k;
  any_floats<T>(args, n, [&](uint32_t column) { return to_float(w[column]); });
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_quant_f16(const __grid_constant__ GemmAnyArgs args) {
  any_quant<f16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_quant_bf16(const __grid_constant__ GemmAnyArgs args) {
  any_quant<bf16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_codebook_f16(const __grid_constant__ GemmAnyArgs args) {
  any_codebook<f16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_codebook_bf16(const __grid_constant__ GemmAnyArgs args) {
  any_codebook<bf16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_e4m3_f16(const __grid_constant__ GemmAnyArgs args) {
  any_e4m3<f16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_e4m3_bf16(const __grid_constant__ GemmAnyArgs args) {
  any_e4m3<bf16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_dense_f16(const __grid_constant__ GemmAnyArgs args) {
  any_dense<f16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_dense_bf16(const __grid_constant__ GemmAnyArgs args) {
  any_dense<bf16>(args);
}

// Output n of one row, all lanes together: scaled, before the bias. Mode FIXED: the bits of the exact sum.
__device__ __forceinline__ float any_int8(const GemmAnyArgs& args, const uint8_t* x, float x_scale, int32_t x_zero_point,
                                          uint32_t n) {
  const uint32_t lane = threadIdx.x % 32;
  const size_t groups = (args.k + args.group - 1) / args.group;
  const uint8_t* codes = static_cast<const uint8_t*>(args.w) + static_cast<size_t>(n) * args.k;
  const float *scales = args.w_scales + n * groups, *zeros = args.w_zero_points + n * groups;
  float y = 0.0f;
  for (uint32_t group = 0; group < groups; ++group) {
    const int32_t zero = static_cast<int32_t>(zeros[group]);
    const uint32_t end = min(args.k, (group + 1) * args.group);
    int32_t sum = 0;
    for (uint32_t column = group * args.group + lane; column < end; column += 32) {
      sum += (static_cast<int8_t>(x[column] ^ args.x_flip) - x_zero_point) * (codes[column] - zero);
    }
    sum = warp_sum(sum);
    if (args.y.mode == LOWBIT_OUT_FIXED) return __int_as_float(sum);
    const float exact = __int2float_rn(sum);
    y = groups == 1 ? __fmul_rn(__fmul_rn(exact, x_scale), scales[0]) : __fmaf_rn(exact, scales[group], y);
  }
  return groups > 1 ? __fmul_rn(y, x_scale) : y;
}

// SWIGLU: rows of w are gate, then up. Mode GROUPS is not for this kernel, whose blocks own too few columns.
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_int8(const __grid_constant__ GemmAnyArgs args) {
  const uint32_t n = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool gated = args.y.activation == LOWBIT_ACTIVATION_SWIGLU;
  const uint32_t outputs = gated ? args.y.n / 2 : args.y.n;
  if (n >= outputs) return;
  const FusedWriter writer(args.y, args.x_scales);
  for (uint32_t row = blockIdx.y * ROWS; row < min(args.y.m, (blockIdx.y + 1) * ROWS); ++row) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + static_cast<size_t>(row) * args.k;
    const float x_scale = args.x_scales[row];
    const int32_t x_zero_point = args.x_zero_point + (args.x_zero_points == nullptr ? 0 : args.x_zero_points[row]);
    const float y = any_int8(args, x, x_scale, x_zero_point, n);
    if (gated) {
      const float up = any_int8(args, x, x_scale, x_zero_point, n + outputs);
      if (lane == 0) writer.store1(row, n, y, up, n, n + outputs);
    } else if (lane == 0) {
      writer.store1(row, n, y);
    }
  }
}

// LLM.int8(): one group, then each outlier's product in ascending order (gemm_w8a8/sm80_outliers.cuh).
template <typename T>
__device__ __forceinline__ void any_llm_int8(const GemmAnyArgs& args) {
  const uint32_t n = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (n >= args.y.n) return;
  const uint32_t words = (args.k + 31) / 32;
  const uint8_t* codes = static_cast<const uint8_t*>(args.w) + static_cast<size_t>(n) * args.k;
  const float scale = args.w_scales[n], zero = args.w_zero_points[n];
  const LinearWriter writer(args.y);
  for (uint32_t row = blockIdx.y * ROWS; row < min(args.y.m, (blockIdx.y + 1) * ROWS); ++row) {
    const size_t first = static_cast<size_t>(row) * args.k;
    const T* floats = static_cast<const T*>(args.x_floats) + first;
    float y = any_int8(args, static_cast<const uint8_t*>(args.x) + first, args.x_scales[row], 0, n);
    for (uint32_t word = 0; word < words; ++word) {
      for (uint32_t bits = args.outliers[static_cast<size_t>(row) * words + word]; bits != 0; bits &= bits - 1) {
        const uint32_t c = 32 * word + __ffs(bits) - 1;
        const float weight = __fmul_rn(__fsub_rn(static_cast<float>(codes[c]), zero), scale);
        y = __fmaf_rn(to_float(floats[c]), weight, y);
      }
    }
    if (lane == 0) writer.store1(row, n, y);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_llm_int8_f16(const __grid_constant__ GemmAnyArgs args) {
  any_llm_int8<f16>(args);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_any_llm_int8_bf16(const __grid_constant__ GemmAnyArgs args) {
  any_llm_int8<bf16>(args);
}
