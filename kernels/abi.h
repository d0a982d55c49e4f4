/* Argument structs of every kernel, shared with Rust. Plain C: read by nvcc and by bindgen.
 *
 * Each kernel takes exactly one of these by value (`const __grid_constant__ XArgs args`), so that the two sides
 * cannot disagree about an argument. Pointers are device addresses; `void*` is the activation dtype (f16 or bf16),
 * which the kernel's name ends with. Shapes are row-major, letters as in src/device/mod.rs: m rows, n outputs,
 * k reduction. A bool is a uint32_t of 0 or 1.
 */
#ifndef LOWBIT_ABI_H
#define LOWBIT_ABI_H

#include <stdint.h>

#include "abi_linear.h"

#define WARP_SIZE 32 /* lanes, on every architecture we build for */

/* ---- common ---------------------------------------------------------------------------------------------- */

/* How a row that feeds a linear layer leaves its producer (Rust: Act and Emit). */
enum {
  LOWBIT_EMIT_FLOATS = 0,  /* 16-bit floats into `floats` */
  LOWBIT_EMIT_DYNAMIC = 1, /* codes and one scale per row, s = amax / 127, codes in [-127, 127] */
  LOWBIT_EMIT_STATIC = 2,  /* codes with the given scale and zero point, codes in [-128, 127] */
  LOWBIT_EMIT_ASYMMETRIC = 3, /* codes, a scale and a zero point per row from its range, codes in [-128, 127] */
  LOWBIT_EMIT_OUTLIERS = 4, /* DYNAMIC of what is below `threshold`; the rest has code 0 and is kept in `floats` */
};

typedef struct EmitArgs {
  void* floats;          /* [m, k], mode FLOATS */
  int8_t* codes;         /* [m, k], other modes */
  float* scales;         /* [m], other modes */
  int32_t* zeros;        /* [m], mode ASYMMETRIC */
  const uint32_t* order; /* [k]: output column c takes computed column order[c]; null: no gather */
  float static_scale;
  int32_t static_zero;
  uint32_t flip;         /* 0x80: codes are written plus 128, as uint8; else 0 */
  uint32_t mode;         /* LOWBIT_EMIT_* */
  uint32_t k;            /* columns */
  uint32_t staged;       /* codes: dynamic shared memory has room for k floats */
  uint32_t* outliers;    /* [m, ceil(k / 32)], mode OUTLIERS: bit c % 32 of word c / 32 is set where column c is one */
  float threshold;       /* mode OUTLIERS: smallest magnitude of an outlier */
} EmitArgs;

/* ---- ops/ ------------------------------------------------------------------------------------------------ */

typedef struct EmbedArgs {
  float* out;          /* [m, width] */
  const void* table;   /* [vocab, width] of the type in the kernel's name */
  const uint32_t* ids; /* [m], below vocab */
  uint32_t width;
} EmbedArgs;

typedef struct GatherRowsArgs {
  float* out;           /* [m, width] */
  const float* x;       /* [rows, width] */
  const uint32_t* rows; /* [m], below the rows of x */
  uint32_t width;
} GatherRowsArgs;

typedef struct RmsNormArgs {
  EmitArgs out;        /* [m, k] */
  const float* x;      /* [m, k] */
  const float* weight; /* [k] */
  float eps;
} RmsNormArgs;

typedef struct SubNormArgs {
  EmitArgs out;        /* [m, k] */
  const void* x;       /* [m, k]; gated: [m, 2 * k], gate, then up */
  const float* weight; /* [k] */
  float eps;
  uint32_t gated;
} SubNormArgs;

typedef struct SiluMulArgs {
  EmitArgs out;        /* [m, k] */
  const void* gate_up; /* [m, 2 * k]: gate, then up */
} SiluMulArgs;

typedef struct QuantizeArgs {
  EmitArgs out;  /* [m, k] */
  const void* x; /* [m, k] */
} QuantizeArgs;

#define LOWBIT_QK_NORM_WARPS 4 /* heads per block of qk_norm */

typedef struct QkNormArgs {
  void* qkv;             /* [m, (num_heads + 2 * num_kv_heads) * head_dim], in place */
  const float* q_weight; /* [head_dim] */
  const float* k_weight; /* [head_dim] */
  float eps;
  uint32_t m;
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;
} QkNormArgs;

typedef struct RopeArgs {
  void* qkv;                 /* [m, (num_heads + 2 * num_kv_heads) * head_dim], in place */
  const float* table;        /* [positions, head_dim]: head_dim / 2 cosines, then as many sines */
  const uint32_t* positions; /* [m], below the rows of table */
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;
} RopeArgs;

#define LOWBIT_LOGITS_PART 2048 /* logits of a row that one block of logits_stats_part reads */

typedef struct LogitsPart {
  float max;   /* largest logit, -inf where none is above */
  uint32_t id; /* its lowest id, UINT32_MAX where there is none */
  float sum;   /* of exp(logit - max) */
} LogitsPart;

typedef struct LogitsStatsArgs {
  uint32_t* ids;           /* [m]: lowest id of the largest logit */
  float* stats;            /* [m, 3]: largest logit, log of the sum of exponentials, logit of the target */
  const float* logits;     /* [m, vocab] */
  const uint32_t* targets; /* [m], below vocab */
  LogitsPart* parts;       /* [m, ceil(vocab / LOWBIT_LOGITS_PART)], written by logits_stats_part */
  uint32_t vocab;
} LogitsStatsArgs;

/* ---- attention/ ------------------------------------------------------------------------------------------ */

typedef struct KvWriteArgs {
  void* k_cache;                /* [num_blocks, block_size, num_kv_heads, head_dim] */
  void* v_cache;                /* the same */
  const void* qkv;              /* [m, (num_heads + 2 * num_kv_heads) * head_dim] */
  const uint32_t* slot_mapping; /* [m]: block * block_size + offset; UINT32_MAX writes nowhere */
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;
} KvWriteArgs;

/* attention_prefill: query rows of a block. Dynamic shared memory by head dimension D, checked where it is used. */
#define LOWBIT_PREFILL_QUERIES 64
#define LOWBIT_PREFILL_SHARED_64 36864
#define LOWBIT_PREFILL_SHARED_128 69632
#define LOWBIT_PREFILL_SHARED_256 67584
#define LOWBIT_DECODE_MAX_SPLITS 256 /* no more than attention_combine has threads */
#define LOWBIT_COMBINE_GROUPS 4
#define LOWBIT_DECODE_SHARED_64 36864
#define LOWBIT_DECODE_SHARED_128 69632
#define LOWBIT_DECODE_SHARED_256 67584

typedef struct AttentionArgs {
  void* out;                    /* [m, num_heads * head_dim] */
  const void* qkv;              /* [m, (num_heads + 2 * num_kv_heads) * head_dim]; only the queries are read */
  const void* k_cache;          /* [num_blocks, block_size, num_kv_heads, head_dim] */
  const void* v_cache;          /* the same */
  const uint32_t* block_tables; /* [batch, max_blocks] */
  const uint32_t* context_lens; /* [batch]: keys, this step's included */
  const uint32_t* cu_seqlens_q; /* [batch + 1]: first row of each sequence */
  float* partials;              /* decode with splits > 1: [batch, num_heads, splits, head_dim + 2] */
  float scale_log2;             /* factor on scores times log2(e): the softmax is taken in base 2 */
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;            /* a multiple of 8, at most the kernel's template */
  uint32_t block_size;          /* tokens in a KV block, a multiple of 16 */
  uint32_t block_magic;         /* ceil(2^32 / block_size) */
  uint32_t max_blocks;          /* row stride of block_tables */
  uint32_t window;              /* keys a query sees, itself included; UINT32_MAX: all before it */
  uint32_t splits;              /* decode: blocks that share one sequence's context */
} AttentionArgs;

#endif
