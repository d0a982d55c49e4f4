// RMSNorm of the residual stream, emitted as a linear layer's input.

#include "common/overlap.cuh"
#include "ops/norm.cuh"

struct ResidualRow {
  const float* x;

  __device__ __forceinline__ explicit ResidualRow(const RmsNormArgs& args)
      : x(args.x + static_cast<size_t>(blockIdx.x) * args.out.k) {}
  __device__ float at(uint32_t c) const { return x[c]; }
  __device__ void at8(uint32_t c, float (&v)[8]) const { load8(x + c, v); }
};

// Computes   out = emit(x / sqrt(mean(x^2) + eps) * weight) per row: `_T` emits floats, `_int8` codes,
//            `_outliers_T` codes beside outliers.
// Shapes     x [m, k] f32, weight [k] f32, out as EmitArgs.
// Grid       one block a row, held in registers where it fits, else read again for each pass, from cache.
// Numerics   common/norm.cuh.
#define RMS_NORM(NAME, THREADS, EMIT)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_##NAME(const __grid_constant__ RmsNormArgs args) { \
    overlap();                                                                                                      \
    EMIT(args);                                                                                                     \
  }

RMS_NORM(f16, 1024, (norm_floats<f16, ResidualRow>))
RMS_NORM(bf16, 1024, (norm_floats<bf16, ResidualRow>))
RMS_NORM(int8, 1024, (norm_codes<void, ResidualRow>))
// Half the threads, for the registers that outliers take.
RMS_NORM(outliers_f16, 512, (norm_codes<f16, ResidualRow>))
RMS_NORM(outliers_bf16, 512, (norm_codes<bf16, ResidualRow>))
