// Keys and values into their slots of the paged cache.

#include "attention/abi.h"
#include "common/dtype.cuh"
#include "common/overlap.cuh"

// Computes   cache[slot_mapping[r]] = the keys and values of row r; slot UINT32_MAX writes nowhere.
// Layout     cache rows are [num_kv_heads, head_dim], consecutive by slot; head_dim a multiple of 8.
// Grid       one block a row, 16 bytes a thread. Exact: the cache has the activation dtype, of 2 bytes.
extern "C" __global__ void kv_write(const __grid_constant__ KvWriteArgs args) {
  overlap();
  const uint32_t slot = args.slot_mapping[blockIdx.x];
  if (slot == UINT32_MAX) return;
  const uint32_t vectors = args.num_kv_heads * args.head_dim / 8;
  const uint32_t q_vectors = args.num_heads * args.head_dim / 8;
  const uint4* k = static_cast<const uint4*>(args.qkv) + static_cast<size_t>(blockIdx.x) * (q_vectors + 2 * vectors) + q_vectors;
  uint4* k_cache = static_cast<uint4*>(args.k_cache) + static_cast<size_t>(slot) * vectors;
  uint4* v_cache = static_cast<uint4*>(args.v_cache) + static_cast<size_t>(slot) * vectors;
  for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    k_cache[i] = k[i];
    v_cache[i] = k[vectors + i];
  }
}
