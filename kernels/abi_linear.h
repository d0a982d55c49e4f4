/* The part of abi.h that is about linear layers: gemm_w8a8/, gemm_w4a8/, gemm_w4a16/, gemm_16bit/, gemm_any/. In a file
 * of its own because these kernels take long to compile, and need not be compiled again when another op changes.
 */
#ifndef LOWBIT_ABI_LINEAR_H
#define LOWBIT_ABI_LINEAR_H

#include <stdint.h>

/* How the copy engine of sm_90 sees a matrix (CUtensorMap): made by the driver, read by the hardware alone. */
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
  int32_t zero;         /* and code of real zero */
  uint32_t flip;        /* 0x80: codes are written plus 128, as uint8; else 0 */
  uint32_t activation;  /* LOWBIT_ACTIVATION_* */
  uint32_t stride;      /* elements between rows */
  uint32_t mode;        /* LOWBIT_OUT_* */
  uint32_t m;
  uint32_t n;           /* rows of w */
} LinearOut;

typedef struct GemmW8A8Args {
  LinearOut y;
  const int8_t* x;        /* [m, k]; uint8 in kernels of that name */
  const int8_t* w;        /* [n, k], code minus zero point */
  const float* x_scales;  /* [m] */
  const int32_t* x_zeros; /* [m], zero points of x, added to x_zero; null: none */
  const float* w_scales;  /* [n] */
  const int32_t* w_sums;  /* [n], sums of w's rows; null where no row has a zero point */
  int32_t x_zero;         /* zero point of x, as it is read: of uint8 plus 128 */
  uint32_t k;            /* a multiple of 16 */
  const uint32_t* outliers; /* kernels named llm_int8: [m, ceil(k / 32)], as EmitArgs has it */
  const void* x_floats;   /* the same: [m, k] values of outliers, 16-bit floats of the kernel's name */
} GemmW8A8Args;

typedef struct GemmW8A8Sm90Args {
  TensorMap x;           /* [m, k]; boxes of 128 columns and as many rows as the kernel's tile, 128-byte swizzle */
  LinearOut y;
  const int8_t* w;       /* [ceil(n / 64), ceil(k / 128), 64, 128] swizzled (docs/formats.md), code minus zero point */
  const float* x_scales; /* [m] */
  const float* w_scales; /* [n rounded up to 256] */
  const int32_t* w_sums; /* [n rounded up to 256], sums of w's rows; null where no row has a zero point */
  const int32_t* x_zeros; /* [m], zero points of x, added to x_zero; null: none */
  int32_t x_zero;        /* zero point of x, as it is read: of uint8 plus 128 */
  uint32_t k;            /* a multiple of 16 */
  uint32_t x_unsigned;   /* 1: x is uint8, codes plus 128 */
  uint32_t floats_f16;   /* kernels named llm_int8: 1: x_floats are f16, else bf16 */
  const uint32_t* outliers; /* the same: [m, ceil(k / 32)], as EmitArgs has it */
  const void* x_floats;  /* the same: [m, k] values of outliers */
} GemmW8A8Sm90Args;

typedef struct GemmW4A8Args {
  LinearOut y;
  const int8_t* x;         /* [m, k] */
  const uint8_t* w;        /* fragment order for int8 (docs/formats.md) */
  const float* x_scales;   /* [m] */
  const int32_t* x_zeros;  /* [m], zero points of x, added to x_zero; null: none */
  const float* w_scales;   /* [groups, n_pad] */
  const uint16_t* w_zeros; /* [groups, n_pad]; null: w_zero everywhere */
  const int32_t* w_sums;   /* [groups, n_pad], sums of (code - zero); null where no row has a zero point */
  int32_t x_zero;
  uint32_t x_flip;         /* 0x80808080: x is uint8, codes plus 128; else 0 */
  uint32_t w_zero;
  uint32_t k;              /* a multiple of 16 */
  uint32_t n_pad;          /* n rounded up to 16 */
  uint32_t group;          /* a multiple of 32, or at least k */
} GemmW4A8Args;

typedef struct GemmW4A16Args {
  LinearOut y;
  const void* x;           /* [m, k], 16-bit floats of the kernel's name */
  const uint8_t* w;        /* fragment order for 16-bit floats (docs/formats.md) */
  const float* w_scales;   /* [groups, n_pad] */
  const uint16_t* w_zeros; /* [groups, n_pad]; null: w_zero everywhere */
  uint32_t w_zero;
  uint32_t k;              /* a multiple of 8 */
  uint32_t n_pad;          /* n rounded up to 16 */
  uint32_t group;          /* a multiple of 32, or at least k */
  uint32_t codebook[8];    /* kernels named c4: low bytes of sixteen values of the type of x, then their high bytes */
} GemmW4A16Args;

typedef struct GemmW4A16Sm90Args {
  TensorMap x;          /* [m, 2 k] bytes of 16-bit floats, boxes of 128 and as many rows as the kernel's tile, swizzled */
  LinearOut y;
  const uint8_t* w;     /* [row_blocks, k_blocks] blocks of 64 x 128 (docs/formats.md) */
  uint32_t block_bytes; /* codes, then the parameters of the block's groups */
  uint32_t row_blocks;  /* ceil(n / 64) */
  uint32_t k_blocks;    /* ceil(k / 128) */
  uint32_t groups;      /* of a block: 1, 2 or 4 */
  uint32_t low_scales;  /* bool: a second part of each scale */
  uint32_t zeros;       /* bool: a zero point for each group; else w_zero everywhere */
  uint32_t w_zero;
  uint32_t k;           /* a multiple of 8 */
  const void* x_rows;   /* what the tensor map describes */
} GemmW4A16Sm90Args;

typedef struct Gemm16BitArgs {
  LinearOut y;
  const void* x; /* [m, k], 16-bit floats of the kernel's name */
  const void* w; /* [n, k], the same type */
  uint32_t k;    /* a multiple of 8 */
} Gemm16BitArgs;

typedef struct GemmAnyArgs {
  LinearOut y;
  const void* x;         /* [m, k], int8 or 16-bit floats of the kernel's name */
  const void* w;         /* [n, k], codes as uint8, or the type of x when dense */
  const float* x_scales; /* [m], int8 x only, as */
  const int32_t* x_zeros; /* [m], zero points of x, added to x_zero; null: none */
  const float* w_scales; /* [n, groups], not dense */
  const float* w_zeros;  /* [n, groups], not dense */
  int32_t x_zero;
  uint32_t x_flip;       /* 0x80: x is uint8, codes plus 128; else 0 */
  uint32_t k;
  uint32_t group;
  float codebook[16];    /* gemm_any_codebook: what codes stand for */
  const uint32_t* outliers; /* as in GemmW8A8Args */
  const void* x_floats;
} GemmAnyArgs;

#endif
