/* Argument structs of attention/; common/abi.h says what holds for all. */
#pragma once

#include <stdint.h>

#define LOWBIT_ROPE_WARPS 4 /* heads of a block of rope_kv_write */

typedef struct RopeKvWriteArgs {
  void* qkv;                    /* [m, (num_heads + 2 * num_kv_heads) * head_dim], query and key heads in place */
  void* k_cache;                /* [num_blocks, block_size, num_kv_heads, head_dim] */
  void* v_cache;                /* the same */
  const float* table;           /* [positions, head_dim]: head_dim / 2 cosines, then as many sines */
  const uint32_t* positions;    /* [m], below the rows of table */
  const uint32_t* slot_mapping; /* [m]: block * block_size + offset; UINT32_MAX writes nowhere */
  const float* q_weight;        /* [head_dim] of the query heads' norm; null: no norm */
  const float* k_weight;        /* [head_dim], the key heads' */
  float eps;
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;            /* a multiple of 8 */
} RopeKvWriteArgs;

/* attention_prefill: query rows of a block. Dynamic shared memory by head dimension D, checked where it is used. */
#define LOWBIT_PREFILL_QUERIES 64
#define LOWBIT_PREFILL_SHARED_64 36864
#define LOWBIT_PREFILL_SHARED_128 69632
#define LOWBIT_PREFILL_SHARED_256 67584
#define LOWBIT_DECODE_SHARED_64 36864
#define LOWBIT_DECODE_SHARED_128 69632
#define LOWBIT_DECODE_SHARED_256 67584
#define LOWBIT_DECODE_PARTIAL_PAD 4 /* floats behind the head_dim of a part's sum of values: its largest score, its sum, two unused */

/* A part of the keys of a sequence of one query row: what one block takes, for one KV head. Items of a sequence follow each other. */
typedef struct AttentionItem {
  uint32_t sequence;
  uint32_t row;        /* of the query */
  uint32_t keys;       /* of the sequence */
  uint32_t begin, end; /* keys of the part, begin a multiple of 64 */
  uint32_t part;       /* which of the sequence's */
  uint32_t parts;      /* how many it has */
  uint32_t unused;
} AttentionItem;

typedef struct AttentionArgs {
  void* out;                    /* [m, num_heads * head_dim] */
  const void* qkv;              /* [m, (num_heads + 2 * num_kv_heads) * head_dim]; only the queries are read */
  const void* k_cache;          /* [num_blocks, block_size, num_kv_heads, head_dim] */
  const void* v_cache;          /* the same */
  const uint32_t* block_tables; /* [batch, stride] */
  const uint32_t* context_lens; /* [batch]: keys, this step's included */
  const uint32_t* cu_seqlens_q; /* [batch + 1]: first row of each sequence */
  const uint32_t* header;       /* number of items, row stride of block_tables: in device memory, so that a graph serves every context */
  const AttentionItem* items;   /* decode: as many as the header says, room for most_items + 1 */
  float* partials;              /* decode: [items, num_heads, head_dim + LOWBIT_DECODE_PARTIAL_PAD], of sequences in several items */
  uint32_t* counters;           /* decode: [batch, KV heads * groups of 16 query heads] of those sequences, 0 before and after */
  float scale_log2;             /* factor on scores times log2(e): the softmax is taken in base 2 */
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;            /* a multiple of 8, at most the kernel's template */
  uint32_t block_size;          /* tokens in a KV block, a multiple of 16 */
  uint32_t block_magic;         /* ceil(2^32 / block_size) */
  uint32_t window;              /* keys a query sees, itself included; UINT32_MAX: all before it */
  uint32_t most_items;
  uint32_t least_rows;          /* prefill: sequences of fewer query rows are left out */
} AttentionArgs;
