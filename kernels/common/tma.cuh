// Copies from device to shared memory by TMA (sm_90): one thread starts them, an mbarrier counts their bytes.
#pragma once

#include "common/abi.h"
#include "common/mbarrier.cuh"

// How long L2 should keep what a copy reads: cache policies as createpolicy encodes them.
constexpr uint64_t L2_EVICT_NORMAL = 0x1000000000000000ull;
constexpr uint64_t L2_EVICT_FIRST = 0x12f0000000000000ull;
constexpr uint64_t L2_EVICT_LAST = 0x14f0000000000000ull;

// The box of the tensor `map` whose first element is (column, row), with what lies outside as zeros.
__device__ __forceinline__ void copy_box(uint32_t shared, const TensorMap& map, uint32_t column, uint32_t row,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(shared), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// `bytes` (a multiple of 16) in a row.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared), "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
