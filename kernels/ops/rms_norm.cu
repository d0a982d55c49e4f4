// RMSNorm of the residual stream, emitted as a linear layer's input.

#include "common/emit.cuh"

struct NormedRow {
  const float* x;
  const float* weight;
  float inverse;  // 1 / sqrt(mean(x^2) + eps)

  __device__ float at(uint32_t c) const { return __fmul_rn(__fmul_rn(x[c], inverse), weight[c]); }

  __device__ void at8(uint32_t c, float (&v)[8]) const {
    float w[8];
    load8(x + c, v);
    load8(weight + c, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], inverse), w[i]);
  }
};

// 1 / sqrt(mean(x^2) + eps) from the sum of squares.
__device__ __forceinline__ float inverse_rms(float sum, const RmsNormArgs& args) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(args.out.k)), args.eps)));
}

struct PlainRow {
  const float* x;

  __device__ void at8(uint32_t c, float (&v)[8]) const { load8(x + c, v); }
};

template <int CHUNKS>
__device__ __forceinline__ HeldRow<CHUNKS> rms_norm_held(const RmsNormArgs& args) {
  HeldRow<CHUNKS> row(PlainRow{args.x + static_cast<size_t>(blockIdx.x) * args.out.k}, args.out.k);
  const float inverse = inverse_rms(row.square_sum(), args);
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (row.column(i) >= args.out.k) continue;
    float w[8];
    load8(args.weight + row.column(i), w);
#pragma unroll
    for (int j = 0; j < 8; ++j) row.v[i][j] = __fmul_rn(__fmul_rn(row.v[i][j], inverse), w[j]);
  }
  return row;
}

// Of a row that does not fit registers.
__device__ NormedRow rms_norm(const RmsNormArgs& args) {
  const uint32_t k = args.out.k;
  const float* x = args.x + static_cast<size_t>(blockIdx.x) * k;
  float sum = 0.0f;
  for (uint32_t c = threadIdx.x; c < k; c += blockDim.x) sum = fmaf(x[c], x[c], sum);
  return {x, args.weight, inverse_rms(block_reduce(sum, 0.0f, Sum()), args)};
}

// Computes   out = emit(x / sqrt(mean(x^2) + eps) * weight) per row: `_T` emits floats, `_int8` codes,
//            `_outliers_T` codes beside outliers.
// Shapes     x [m, k] f32, weight [k] f32, out as EmitArgs.
// Grid       one block a row, held in registers where it fits, else read again for each pass, from cache.
// Numerics   the sum of squares in f32 in a fixed order; then two rounded multiplies, as the CPU's.
template <typename Held, typename Other>
__device__ __forceinline__ void rms_norm_row(const RmsNormArgs& args, Held held, Other other) {
  switch (held_chunks(args.out)) {
    case 1: return held(rms_norm_held<1>(args));
    case 2: return held(rms_norm_held<2>(args));
    case MOST_CHUNKS: return held(rms_norm_held<MOST_CHUNKS>(args));
    default: return other(rms_norm(args));
  }
}

template <typename T>
__device__ __forceinline__ void rms_norm_floats(const RmsNormArgs& args) {
  const EmitArgs& out = args.out;
  rms_norm_row(
      args, [&](const auto& row) { row.template emit_floats<T>(out, blockIdx.x); },
      [&](const NormedRow& row) { emit_floats<T>(out, blockIdx.x, row, 0, out.k); });
}

template <typename T>
__device__ __forceinline__ void rms_norm_codes(const RmsNormArgs& args) {
  rms_norm_row(
      args, [&](const auto& row) { row.template emit_codes<T>(args.out, blockIdx.x); },
      [&](const NormedRow& row) { emit_codes<T>(args.out, blockIdx.x, row); });
}

#define RMS_NORM(NAME, THREADS, FUNCTION)                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_##NAME(const __grid_constant__ RmsNormArgs args) { \
    FUNCTION(args);                                                                                                 \
  }

RMS_NORM(f16, 1024, rms_norm_floats<f16>)
RMS_NORM(bf16, 1024, rms_norm_floats<bf16>)
RMS_NORM(int8, 1024, rms_norm_codes<void>)
// Half the threads, for the registers that outliers take.
RMS_NORM(outliers_f16, 512, rms_norm_codes<f16>)
RMS_NORM(outliers_bf16, 512, rms_norm_codes<bf16>)
