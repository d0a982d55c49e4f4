/* Argument structs of ops/; common/abi.h says what holds for all. */
#pragma once

#include <stdint.h>

#define LOWBIT_EMIT_MOST_CHUNKS 4 /* times eight columns of a row, at the most, that a thread holds in registers */

/* How a row that feeds a linear layer leaves its producer (Rust: LinearInput and InputFormat). */
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
  int32_t* zero_points;  /* [m], mode ASYMMETRIC */
  const uint32_t* order; /* [k]: output column c takes computed column order[c]; null: no gather */
  float static_scale;
  int32_t static_zero_point;
  uint32_t flip;         /* 0x80: codes are written plus 128, as uint8; else 0 */
  uint32_t mode;         /* LOWBIT_EMIT_* */
  uint32_t k;            /* columns */
  uint32_t staged;       /* codes: dynamic shared memory has room for k floats */
  uint32_t* outliers;    /* [m, ceil(k / 32)], mode OUTLIERS: bit c % 32 of word c / 32 is set where column c is one */
  float threshold;       /* mode OUTLIERS: smallest magnitude of an outlier */
} EmitArgs;

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

#define LOWBIT_SAMPLE_THREADS 512
#define LOWBIT_SAMPLE_SHARED 90112
#define LOWBIT_SAMPLE_NOT_FINITE 0xffffffff /* in place of an id: a logit is NaN or infinite */
#define LOWBIT_SAMPLE_NONE 0xfffffffe       /* no id is left */

/* How a row is sampled. */
typedef struct SampleRowArgs {
  float temperature; /* 0: the best logit */
  float top_p;       /* 1: all */
  float floor;       /* least logit less the best, over the temperature */
  uint32_t top_k;    /* 0: all */
  uint64_t draw;     /* uniform random bits */
  uint32_t mask;     /* row of masks; UINT32_MAX: none */
  uint32_t unused;
} SampleRowArgs;

typedef struct SampleArgs {
  uint32_t* ids;             /* [m] */
  const float* logits;       /* [m, vocab] */
  const SampleRowArgs* rows; /* [m] */
  const uint32_t* masks;     /* [.., ceil(vocab / 32)]: a bit for each id that is allowed */
  uint32_t vocab;
} SampleArgs;

/* ---- repack ---- */

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

/* FP8 codes of four columns in a 32-bit word of fragments8 or blocks16, for kernels that make floats of a type of them. */
enum {
  LOWBIT_E4M3_NONE = 0, /* no FP8: the codes are the word's bytes */
  LOWBIT_E4M3_F16 = 1,
  LOWBIT_E4M3_BF16 = 2,
};

/* One weight [n, k] and one thing that is made of it. */
typedef struct RepackArgs {
  RepackPart parts[LOWBIT_REPACK_PARTS]; /* `first` is UINT32_MAX in those there are not */
  const uint32_t* rows;                  /* [n]: row r of the weight is row rows[r] of the parts; null: r */
  const uint32_t* columns;               /* [k]: column c of the weight is column columns[c] of the parts; null: c */
  const float* scales;                   /* [n, groups] */
  const float* zero_points;              /* [n, groups], whole numbers; null: `zero_point` everywhere */
  void* out;
  int32_t zero_point;
  uint32_t n;
  uint32_t k;
  uint32_t bits;                         /* of a code, 2 to 8 */
  uint32_t group_size;
  uint32_t groups;                       /* of a row */
  uint32_t units;                        /* threads with work */
  uint32_t subtract_zeros;               /* codes minus zero points are written, else codes */
  uint32_t nibbles;                      /* fragments4: byte 4 h + i, low word first, is the place of column i (0 to 3) of row half h */
  uint32_t nibbles_high;
  uint32_t n_pad;                        /* by_group, sums: rows of a group in the output; 0: the output is [n, groups] */
  uint32_t container;                    /* blocks16: bits of a code there, 4 or 8 */
  uint32_t block_groups;                 /* blocks16, blocks4: groups of a block; 0: no scales */
  uint32_t low_scales;                   /* blocks16: scales are in two parts */
  uint32_t has_zero_points;              /* blocks16: zero points lie beside scales */
  uint32_t e4m3;                         /* fragments8, blocks16: LOWBIT_E4M3_* */
} RepackArgs;
