// Barriers in shared memory that count arrivals and the bytes of asynchronous copies (sm_90).
#pragma once

#include <stdint.h>

#include "common/async_copy.cuh"

// A barrier of 8 bytes at a shared address. `count` arrivals and all expected bytes end a phase.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the barriers this thread has set up visible to TMA and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and has the phase wait for `bytes` of copies as well.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once all cp.async copies that this thread has started so far are there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first phase, then alternating. Orders what this block's
// threads and TMA wrote; a wider scope would empty L1 each time.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (done == 0);
}

// Synchronizes `threads` threads (whole warps) on hardware barrier `id`; 0 is __syncthreads's.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives there without waiting.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True in one lane of a converged warp. The compiler knows that it is one, and where the warp's values are the same in all
// lanes, starts a copy by one instruction; under `lane == 0` it writes a loop over lanes.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}" : "=r"(elected));
  return elected != 0;
}

// Blocks of a cluster: this block's number in it, and a barrier of all their threads that orders shared memory.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The same without ordering memory: says that this block has started.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// 16 bytes of block `rank`'s shared memory at what is `address` in this block's.
__device__ __forceinline__ int4 load_cluster_shared16(uint32_t address, uint32_t rank) {
  int4 v;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [remote];\n"
      "}" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address), "r"(rank) : "memory");
  return v;
}

// Adds eight words in a row of the shared memory of each of the first `blocks` blocks, at most 8; four blocks are asked at a time.
__device__ __forceinline__ void add_cluster8(uint32_t address, uint32_t blocks, int32_t (&sums)[8]) {
#pragma unroll
  for (uint32_t first = 0; first < 8; first += 4) {
    if (first >= blocks) break;
    int4 parts[4][2];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (first + i >= blocks) break;
      parts[i][0] = load_cluster_shared16(address, first + i);
      parts[i][1] = load_cluster_shared16(address + 16, first + i);
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (first + i >= blocks) break;
      const int4 a = parts[i][0], b = parts[i][1];
      sums[0] += a.x, sums[1] += a.y, sums[2] += a.z, sums[3] += a.w;
      sums[4] += b.x, sums[5] += b.y, sums[6] += b.z, sums[7] += b.w;
    }
  }
}

__device__ __forceinline__ void store_cluster_shared16(uint32_t address, uint32_t rank, float4 v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
      "}" ::"r"(address), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// The same without waiting; `barrier` of that block counts the bytes once they are there.
__device__ __forceinline__ void store_cluster_async16(uint32_t address, uint32_t barrier, uint32_t rank, float4 v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, counter;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [remote], {%3, %4, %5, %6}, [counter];\n"
      "}" ::"r"(address), "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Programmatic dependent launch: lets the next kernel of the stream start while this one runs, and waits for the
// kernels before this one. Whatever they wrote, and whatever they read that this kernel writes, comes after the wait.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
