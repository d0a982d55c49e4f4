/* Arguments of repack, beside abi.h: in a file of its own for the same reason as abi_linear.h. */
#ifndef LOWBIT_ABI_REPACK_H
#define LOWBIT_ABI_REPACK_H

#include <stdint.h>

#define LOWBIT_REPACK_PARTS 4     /* weights that are stacked into one: q, k, v; gate, up */
#define LOWBIT_REPACK_THREADS 256 /* of a block of any repack kernel */

/* How the codes of a part lie (Rust: quant::Storage; docs/formats.md, sections 2 to 5). */
enum {
  LOWBIT_STORED_BYTES = 0,   /* one to a byte, from which `offset` has been taken (modulo 256) */
  LOWBIT_STORED_STREAM = 1,  /* in 32-bit words, a bit stream */
  LOWBIT_STORED_ALIGNED = 2, /* in 32-bit words, `per_word` in each */
  LOWBIT_STORED_AWQ = 3,     /* 4 bits, eight rows in a word */
  LOWBIT_STORED_HIGH = 4,    /* 4 bits, two in a byte, the first in the high half */
};

/* Rows first to the next part's first. Word w of row r is data[w * word_stride + r * row_stride], r counted from first. */
typedef struct RepackPart {
  const void* data;
  uint32_t first;
  uint32_t storage; /* LOWBIT_STORED_* */
  uint32_t offset;
  uint32_t per_word;
  uint32_t word_stride;
  uint32_t row_stride;
} RepackPart;

/* One weight [n, k] and one thing that is made of it. */
typedef struct RepackArgs {
  RepackPart parts[LOWBIT_REPACK_PARTS]; /* `first` is UINT32_MAX in those there are not */
  const uint32_t* rows;    /* [n]: row r of the weight is row rows[r] of the parts; null: r */
  const uint32_t* columns; /* [k]: column c of the weight is column columns[c] of the parts; null: c */
  const float* scales;     /* [n, groups] */
  const float* zeros;      /* [n, groups], whole numbers; null: `zero` everywhere */
  void* out;
  int32_t zero;
  uint32_t n;
  uint32_t k;
  uint32_t bits;       /* of a code, 2 to 8 */
  uint32_t group_size;
  uint32_t groups;     /* of a row */
  uint32_t units;      /* threads with work */
  uint32_t steps;      /* codes minus zero points are written, else codes */
  uint32_t nibbles;    /* fragments4: place of column i (0 to 3) of row half h is byte 4 h + i of these 8 bytes, low word first */
  uint32_t nibbles_high;
  uint32_t n_pad;      /* by_group, sums: rows of a group in the output; 0: the output is [n, groups] */
  uint32_t container;  /* blocks16: bits of a code there, 4 or 8 */
  uint32_t block_groups;  /* blocks16, blocks4: groups of a block; 0: no scales */
  uint32_t low_scales;    /* blocks16: scales are in two parts */
  uint32_t zero_points;   /* blocks16: zero points lie beside scales */
} RepackArgs;

#endif
