/* What argument structs of kernels have in common. Each abi.h is plain C, read by nvcc and by bindgen, so that kernels and Rust
 * cannot disagree.
 *
 * Each kernel takes exactly one struct by value (`const __grid_constant__ XArgs args`). Pointers are device addresses; `void*` is
 * the activation dtype (f16 or bf16), which the kernel's name ends with. Shapes are row-major, letters as in src/device/mod.rs: m
 * rows, n outputs, k reduction. A bool is a uint32_t of 0 or 1.
 */
#pragma once

#include <stdint.h>

#define WARP_SIZE 32 /* lanes, on every architecture we build for */

/* Rows of w and columns of k in a block of the layouts for sm_90 (docs/formats.md). */
#define LOWBIT_BLOCK_ROWS 64
#define LOWBIT_BLOCK_COLUMNS 128

/* Shared memory before the stages of a ring on sm_90: a full and an empty barrier for each stage there can be. */
#define LOWBIT_RING_HEAD_BYTES 1024
#define LOWBIT_RING_MAX_STAGES (LOWBIT_RING_HEAD_BYTES / 16)

/* How TMA, which copies on sm_90, sees a matrix (CUtensorMap): made by the driver, read by the hardware alone. */
typedef struct __attribute__((aligned(64))) TensorMap {
  uint64_t opaque[16];
} TensorMap;

/* Element type of a linear layer's destination and how it is written (Rust: Output, Write). */
enum {
  LOWBIT_OUT_F32 = 0,
  LOWBIT_OUT_F32_ADD = 1, /* out += y */
  LOWBIT_OUT_F16 = 2,
  LOWBIT_OUT_BF16 = 3,
  LOWBIT_OUT_STATIC = 4, /* 8-bit codes clamp(rne(y / scale) + zero, -128, 127) */
  LOWBIT_OUT_FIXED = 5,  /* 8-bit codes from the exact sums by Q31 multipliers */
  LOWBIT_OUT_GROUPS = 6, /* 8-bit codes with a scale for each row and 128 outputs */
};

/* Function of an output before it is written (Rust: Activation). */
enum {
  LOWBIT_ACTIVATION_NONE = 0,
  LOWBIT_ACTIVATION_RELU = 1,
  LOWBIT_ACTIVATION_GELU_TANH = 2,
  LOWBIT_ACTIVATION_GELU_ERF = 3,
  LOWBIT_ACTIVATION_SILU = 4,
  LOWBIT_ACTIVATION_SWIGLU = 5, /* rows of w interleaved: 8 of gate, 8 of up; n / 2 outputs */
};

#define LOWBIT_GROUP_OUTPUTS 128 /* of LOWBIT_OUT_GROUPS */

/* Destination of y[m, n]. */
typedef struct LinearOut {
  void* out;            /* first element written of row 0 */
  const float* bias;    /* [n]; null: none */
  float* scales;        /* codes: [m], GROUPS: [m, ceil(outputs / 128)] */
  const int32_t* fixed; /* FIXED: [3, n] bias, Q31 mantissa and shift */
  float scale;          /* STATIC and FIXED: real value of a step, */
  int32_t zero_point;   /* and code of real zero */
  uint32_t flip;        /* 0x80: codes are written plus 128, as uint8; else 0 */
  uint32_t activation;  /* LOWBIT_ACTIVATION_* */
  uint32_t stride;      /* elements between rows */
  uint32_t mode;        /* LOWBIT_OUT_* */
  uint32_t m;
  uint32_t n;           /* rows of w */
} LinearOut;
