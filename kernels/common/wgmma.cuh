// Tensor-core products of a warpgroup (sm_90a): operands in shared memory or registers, sums in registers, asynchronous.
//
// d[64, N] (+)= a[64, k] * b[N, k]^T, k being 32 bytes of each row. Both operands have rows along k.
// d: warp w of the four holds rows 16w to 16w + 15; lane 4g + t has in d[4j + 2h + i] row g + 8h, column 8j + 2t + i.
// a in registers: words 0 to 3 are rows g, g + 8, g, g + 8; the first two hold bytes 4t.. of the first 16 of the row,
// the others of the second 16.
#pragma once

#include "common/dtype.cuh"

// Of a matrix in shared memory whose rows are 128 bytes long, each row's 16-byte chunks permuted by TMA's
// 128-byte swizzle, from an address that is a multiple of 1024. Add 2 for each 32 bytes along k.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared) {
  constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 >> 4, LEADING = 1;
  return SWIZZLE_128 | EIGHT_ROWS << 32 | LEADING << 16 | (shared >> 4 & 0x3fff);
}

// Orders register writes before the next product.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING committed groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers of each thread of this warpgroup from here on: taken from, or given back to, what the block was launched with.
template <int REGISTERS>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Operand lists: the text and the registers of 4 to 128 sums.
#define WGMMA_TEXT_4 \
  "%0, %1, %2, %3"
#define WGMMA_TEXT_8 WGMMA_TEXT_4 \
  ", %4, %5, %6, %7"
#define WGMMA_TEXT_16 WGMMA_TEXT_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_TEXT_32 WGMMA_TEXT_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_48 WGMMA_TEXT_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_TEXT_64 WGMMA_TEXT_48 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_96 WGMMA_TEXT_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_TEXT_128 WGMMA_TEXT_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_SUMS_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define WGMMA_SUMS_8(c, d, i) WGMMA_SUMS_4(c, d, i), WGMMA_SUMS_4(c, d, i + 4)
#define WGMMA_SUMS_16(c, d, i) WGMMA_SUMS_8(c, d, i), WGMMA_SUMS_8(c, d, i + 8)
#define WGMMA_SUMS_32(c, d, i) WGMMA_SUMS_16(c, d, i), WGMMA_SUMS_16(c, d, i + 16)
#define WGMMA_SUMS_48(c, d, i) WGMMA_SUMS_32(c, d, i), WGMMA_SUMS_16(c, d, i + 32)
#define WGMMA_SUMS_64(c, d, i) WGMMA_SUMS_32(c, d, i), WGMMA_SUMS_32(c, d, i + 32)
#define WGMMA_SUMS_96(c, d, i) WGMMA_SUMS_64(c, d, i), WGMMA_SUMS_32(c, d, i + 64)
#define WGMMA_SUMS_128(c, d, i) WGMMA_SUMS_64(c, d, i), WGMMA_SUMS_64(c, d, i + 64)
// A x B -> s32 for A and B of int8_t and uint8_t. `accumulate` false: d = a * b.
template <typename A, typename B, int N>
struct Wgmma8Bit;
// T x T -> f32 for T of f16 and bf16.
template <typename T, int N>
struct Wgmma16Bit;

// N, number of sums, and the numbers of the operands that follow them.
#define WGMMA_8BIT_OF(A, B, TYPES, N, SUMS, O0, O1, O2, O3, O4, O5)                                                 \
  template <>                                                                                                       \
  struct Wgmma8Bit<A, B, N> {                                                                                       \
    static __device__ __forceinline__ void run(int32_t (&d)[SUMS], uint64_t a, uint64_t b, bool accumulate) {       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O2 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32." TYPES " {" WGMMA_TEXT_##SUMS "}, " O0 ", " O1  \
                   ", p;\n}"                                                                                        \
                   : WGMMA_SUMS_##SUMS("+r", d, 0)                                                                  \
                   : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)));                                       \
    }                                                                                                               \
    static __device__ __forceinline__ void run(int32_t (&d)[SUMS], const uint32_t (&a)[4], uint64_t b,              \
                                               bool accumulate) {                                                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O5 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32." TYPES " {" WGMMA_TEXT_##SUMS "}, {" O0 ", " O1 \
                   ", " O2 ", " O3 "}, " O4 ", p;\n}"                                                               \
                   : WGMMA_SUMS_##SUMS("+r", d, 0)                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));   \
    }                                                                                                               \
  };
#define WGMMA_16BIT_OF(T, N, SUMS, O0, O1, O2, O3, O4, O5)                                                           \
  template <>                                                                                                        \
  struct Wgmma16Bit<T, N> {                                                                                          \
    static __device__ __forceinline__ void run(float (&d)[SUMS], uint64_t a, uint64_t b, bool accumulate) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O2 ", 0;\n"                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " {" WGMMA_TEXT_##SUMS "}, " O0 ", "  \
                   O1 ", p, 1, 1, 0, 0;\n}"                                                                          \
                   : WGMMA_SUMS_##SUMS("+f", d, 0)                                                                   \
                   : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)));                                        \
    }                                                                                                                \
    static __device__ __forceinline__ void run(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b,                 \
                                               bool accumulate) {                                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O5 ", 0;\n"                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " {" WGMMA_TEXT_##SUMS "}, {" O0 ", " \
                   O1 ", " O2 ", " O3 "}, " O4 ", p, 1, 1, 0;\n}"                                                    \
                   : WGMMA_SUMS_##SUMS("+f", d, 0)                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));    \
    }                                                                                                                \
  };
#define WGMMA_SHAPE(N, SUMS, ...)                               \
  WGMMA_8BIT_OF(int8_t, int8_t, "s8.s8", N, SUMS, __VA_ARGS__)  \
  WGMMA_8BIT_OF(uint8_t, int8_t, "u8.s8", N, SUMS, __VA_ARGS__) \
  WGMMA_8BIT_OF(int8_t, uint8_t, "s8.u8", N, SUMS, __VA_ARGS__) \
  WGMMA_16BIT_OF(f16, N, SUMS, __VA_ARGS__)                     \
  WGMMA_16BIT_OF(bf16, N, SUMS, __VA_ARGS__)

WGMMA_SHAPE(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
WGMMA_SHAPE(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
WGMMA_SHAPE(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA_SHAPE(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_SHAPE(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
WGMMA_SHAPE(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_SHAPE(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
WGMMA_SHAPE(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
