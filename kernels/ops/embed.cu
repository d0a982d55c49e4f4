// Rows picked by index: the embedding of token ids, and the rows whose logits are wanted.

#include "common/dtype.cuh"
#include "common/overlap.cuh"
#include "ops/abi.h"

// Computes out[r, :] = table[ids[r], :] in f32. Grid: one block a row. Exact.
template <typename T>
__device__ void copy_row(float* out, const T* row, uint32_t width) {
  if (width % 8 == 0) {
    for (uint32_t c = 8 * threadIdx.x; c < width; c += 8 * blockDim.x) {
      float v[8];
      load8(row + c, v);
      reinterpret_cast<float4*>(out + c)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(out + c)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  } else {
    for (uint32_t c = threadIdx.x; c < width; c += blockDim.x) out[c] = to_float(row[c]);
  }
}

template <typename T>
__device__ void embed(const EmbedArgs& args) {
  const size_t width = args.width;
  const T* table = static_cast<const T*>(args.table);
  copy_row(args.out + blockIdx.x * width, table + args.ids[blockIdx.x] * width, args.width);
}

extern "C" __global__ void embed_f32(const __grid_constant__ EmbedArgs args) {
  overlap();
  embed<float>(args);
}
extern "C" __global__ void embed_f16(const __grid_constant__ EmbedArgs args) {
  overlap();
  embed<f16>(args);
}
extern "C" __global__ void embed_bf16(const __grid_constant__ EmbedArgs args) {
  overlap();
  embed<bf16>(args);
}

// Computes out[r, :] = x[rows[r], :]. Grid: one block a row. Exact.
extern "C" __global__ void gather_rows(const __grid_constant__ GatherRowsArgs args) {
  overlap();
  const size_t width = args.width;
  copy_row(args.out + blockIdx.x * width, args.x + args.rows[blockIdx.x] * width, args.width);
}
