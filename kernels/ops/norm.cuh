// A row divided by its root mean square and emitted as a linear layer's input: what rms_norm and sub_norm share.
//
// The sum of squares is in f32 in a fixed order; then come two rounded multiplies, as the CPU's. A block has one row, in registers
// where it fits, else it is computed again for each pass.
#pragma once

#include "ops/emit.cuh"

// A Row is this block's row of the op whose arguments it is made of: a value by `at`, eight from a multiple of eight by `at8`.
template <typename Row>
struct NormedRow {
  Row row;
  const float* weight;
  float inverse;  // 1 / sqrt(mean(x^2) + eps)

  __device__ float at(uint32_t c) const { return __fmul_rn(__fmul_rn(row.at(c), inverse), weight[c]); }

  __device__ void at8(uint32_t c, float (&v)[8]) const {
    float w[8];
    row.at8(c, v);
    load8(weight + c, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], inverse), w[i]);
  }
};

// 1 / sqrt(mean(x^2) + eps) from the sum of squares.
__device__ __forceinline__ float inverse_rms(float sum, uint32_t k, float eps) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(k)), eps)));
}

// Args: RmsNormArgs or SubNormArgs.
template <int CHUNKS, typename Row, typename Args>
__device__ __forceinline__ HeldRow<CHUNKS> norm_held(const Args& args) {
  HeldRow<CHUNKS> row(Row(args), args.out.k);
  const float inverse = inverse_rms(row.square_sum(), args.out.k, args.eps);
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
template <typename Row, typename Args>
__device__ NormedRow<Row> norm_computed(const Args& args) {
  const Row x(args);
  float sum = 0.0f;
  for (uint32_t c = threadIdx.x; c < args.out.k; c += blockDim.x) {
    const float v = x.at(c);
    sum = fmaf(v, v, sum);
  }
  return {x, args.weight, inverse_rms(block_reduce(sum, 0.0f, Sum()), args.out.k, args.eps)};
}

template <int CHUNKS, typename T, typename Row, typename Args>
__device__ __forceinline__ void norm_floats_held(const Args& args) {
  const HeldOrder<CHUNKS> order(args.out);  // on its way while the row is reduced
  norm_held<CHUNKS, Row>(args).template emit_floats<T>(args.out, blockIdx.x, order);
}

// This block's row as floats of T.
template <typename T, typename Row, typename Args>
__device__ __forceinline__ void norm_floats(const Args& args) {
  switch (held_chunks(args.out)) {
    case 1: return norm_floats_held<1, T, Row>(args);
    case 2: return norm_floats_held<2, T, Row>(args);
    case MOST_CHUNKS: return norm_floats_held<MOST_CHUNKS, T, Row>(args);
    default: return emit_floats<T>(args.out, blockIdx.x, norm_computed<Row>(args), 0, args.out.k);
  }
}

// As codes, with T beside outliers of T.
template <typename T, typename Row, typename Args>
__device__ __forceinline__ void norm_codes(const Args& args) {
  switch (held_chunks(args.out)) {
    case 1: return norm_held<1, Row>(args).template emit_codes<T>(args.out, blockIdx.x);
    case 2: return norm_held<2, Row>(args).template emit_codes<T>(args.out, blockIdx.x);
    case MOST_CHUNKS: return norm_held<MOST_CHUNKS, Row>(args).template emit_codes<T>(args.out, blockIdx.x);
    default: return emit_codes<T>(args.out, blockIdx.x, norm_computed<Row>(args));
  }
}
