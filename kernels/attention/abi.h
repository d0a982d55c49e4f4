/* Argument structs of attention/; common/abi.h says what holds for all. */
#pragma once

#include <stdint.h>

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
