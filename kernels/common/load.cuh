// Loads that the compiler has no words for.
#pragma once

#include <stdint.h>

// Sixteen bytes of weights, past L1.
__device__ __forceinline__ uint4 load_stream(const uint8_t* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Four bytes, likewise.
__device__ __forceinline__ uint32_t load_stream4(const uint8_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// What is at `p`, or 0 where `valid` is false: never by a branch, at which what is under way would be waited for.
__device__ __forceinline__ uint32_t load_if(const uint32_t* p, bool valid) {
  uint32_t v;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "mov.u32 %0, 0;\n"
      "@p ld.global.u32 %0, [%1];\n"
      "}" : "=r"(v) : "l"(p), "r"(static_cast<uint32_t>(valid)) : "memory");
  return v;
}
__device__ __forceinline__ int32_t load_if(const int8_t* p, bool valid) {
  int32_t v;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "mov.s32 %0, 0;\n"
      "@p ld.global.s8 %0, [%1];\n"
      "}" : "=r"(v) : "l"(p), "r"(static_cast<uint32_t>(valid)) : "memory");
  return v;
}

// From shared memory. Left to itself the compiler takes sixteen bytes in four loads, which get in each other's way.
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
