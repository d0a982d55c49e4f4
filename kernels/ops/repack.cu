// Weights from the order of a checkpoint's file into the layouts of the linear kernels, while a model is loaded.
//
// Computes  one weight [n, k] in one layout of docs/formats.md ("Kernel layouts"), byte for byte what the host's packer
//           (src/device/cuda/gemm/pack.rs) writes, with everything that lies beside the codes.
// Reads     codes as files have them: words packed along rows or down columns, in AWQ's order, bytes. A code is looked up
//           by its row and column, so that stacking, the rows' order (gate and up in turns, a later layer's act-order) and
//           the columns' (act-order) are a table each, and every layout reads every storage.
// Grid      LOWBIT_REPACK_THREADS threads a block; a thread makes 16 bytes (repack_by_group: a value, repack_sums: a warp a
//           sum). Neighbours' codes share words, which the caches hold: a whole model takes less time than its copy to the GPU.
// Numerics  exact; halves of scales are rounded to nearest even.
// Limits    n, k and 16-byte units below 2^32.

#include "common/dtype.cuh"
#include "common/overlap.cuh"
#include "ops/abi.h"

// Code of a row and a column of the parts, which are there.
__device__ __forceinline__ uint32_t stored_code(const RepackArgs& args, uint32_t row, uint32_t column) {
  uint32_t which = 0;
#pragma unroll
  for (int i = 1; i < LOWBIT_REPACK_PARTS; ++i) which += row >= args.parts[i].first;
  const RepackPart& part = args.parts[which];
  const size_t r = row - part.first;
  const uint32_t mask = (1u << args.bits) - 1;
  const uint32_t* words = static_cast<const uint32_t*>(part.data);
  const uint8_t* bytes = static_cast<const uint8_t*>(part.data);
  switch (part.storage) {
    case LOWBIT_STORED_STREAM: {
      const size_t bit = static_cast<size_t>(column) * args.bits;
      const uint32_t shift = bit % 32;
      const size_t at = bit / 32 * part.word_stride + r * part.row_stride;
      uint32_t code = words[at] >> shift;
      if (shift + args.bits > 32) code |= words[at + part.word_stride] << (32 - shift);
      return code & mask;
    }
    case LOWBIT_STORED_ALIGNED: {
      const uint32_t word = column / part.per_word;
      const uint32_t shift = (column - word * part.per_word) * args.bits;
      return words[static_cast<size_t>(word) * part.word_stride + r * part.row_stride] >> shift & mask;
    }
    case LOWBIT_STORED_AWQ: {  // rows 0 to 7 are nibbles 0 4 1 5 2 6 3 7
      const uint32_t i = r % 8;
      const uint32_t shift = 4 * (i / 2 + i % 2 * 4);
      return words[static_cast<size_t>(column) * part.word_stride + r / 8] >> shift & 15;
    }
    case LOWBIT_STORED_HIGH: {
      const size_t at = r * args.k + column;
      return at % 2 == 0 ? bytes[at / 2] >> 4 : bytes[at / 2] & 15;
    }
    default:
      return bytes[r * args.k + column] + part.offset & 0xff;
  }
}

__device__ __forceinline__ int32_t zero_point(const RepackArgs& args, uint32_t row, uint32_t group) {
  if (args.zero_points == nullptr) return args.zero_point;
  return static_cast<int32_t>(args.zero_points[static_cast<size_t>(row) * args.groups + group]);
}

// Code of a row and a column of the weight, or that minus its zero point; 0 in the padding.
__device__ __forceinline__ uint32_t value_at(const RepackArgs& args, uint32_t row, uint32_t column) {
  if (row >= args.n || column >= args.k) return 0;
  const uint32_t from = args.rows == nullptr ? row : args.rows[row];
  const uint32_t code = stored_code(args, from, args.columns == nullptr ? column : args.columns[column]);
  return args.subtract_zeros ? code - zero_point(args, row, column / args.group_size) : code;
}

// Eight values of a row as bytes.
__device__ __forceinline__ uint2 bytes8(const RepackArgs& args, uint32_t row, uint32_t column) {
  uint32_t word[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) word[i / 4] |= (value_at(args, row, column + i) & 0xff) << (8 * (i % 4));
  return make_uint2(word[0], word[1]);
}

// Codes of columns 0 to 3, a byte each, as kernels of FP8 weights find them: those of 0 and 1 where sixteen bits of a float have sign,
// lower exponent and mantissa, those of 2 and 3 in the bits between (docs/formats.md).
__device__ __forceinline__ uint32_t arrange_e4m3(const RepackArgs& args, uint32_t codes) {
  if (args.e4m3 == LOWBIT_E4M3_NONE) return codes;
  const uint32_t first = __byte_perm(codes, 0, 0x4140), second = __byte_perm(codes, 0, 0x4342);
  const uint32_t signs = (first & 0x00800080) << 8;
  if (args.e4m3 == LOWBIT_E4M3_F16) {
    return signs | (first & 0x007f007f) << 7 | (second & 0x00800080) << 7 | (second & 0x007f007f);
  }
  return signs | (first & 0x007f007f) << 4 | (second & 0x00800080) << 4 | (second & 0x000f000f) | (second & 0x00700070) << 8;
}

__device__ __forceinline__ uint32_t unit_index() { return blockIdx.x * LOWBIT_REPACK_THREADS + threadIdx.x; }

__device__ __forceinline__ uint4* out16(const RepackArgs& args, uint32_t unit) { return static_cast<uint4*>(args.out) + unit; }

// Fragment order, 4 bits: tiles of 16 x 64, a unit the four words of a lane.
extern "C" __global__ void repack_fragments4(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index();
  if (unit >= args.units) return;
  const uint32_t slices = (args.k + 63) / 64, lane = unit % 32, slice = unit / 32 % slices, tile = unit / 32 / slices;
  const uint64_t places = static_cast<uint64_t>(args.nibbles_high) << 32 | args.nibbles;
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t column = slice * 64 + j / 2 * 32 + lane % 4 * 8 + j % 2 * 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t place = places >> (8 * i) & 7;
      words[j] |= value_at(args, tile * 16 + i / 4 * 8 + lane / 4, column + i % 4) << (4 * place);
    }
  }
  *out16(args, unit) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Fragment order, 8 bits: tiles of 16 x 32, k padded to 64, a unit the sixteen bytes of a lane.
extern "C" __global__ void repack_fragments8(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index();
  if (unit >= args.units) return;
  const uint32_t slices = (args.k + 63) / 64 * 2, lane = unit % 32, slice = unit / 32 % slices, tile = unit / 32 / slices;
  const uint32_t row = tile * 16 + lane / 4, column = slice * 32 + lane % 4 * 8;
  const uint2 low = bytes8(args, row, column), high = bytes8(args, row + 8, column);
  *out16(args, unit) = make_uint4(arrange_e4m3(args, low.x), arrange_e4m3(args, low.y), arrange_e4m3(args, high.x),
                                  arrange_e4m3(args, high.y));
}

// [n, k] bytes, a unit sixteen of them wherever rows begin.
extern "C" __global__ void repack_rows(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index();
  if (unit >= args.units) return;
  const size_t first = static_cast<size_t>(unit) * 16, size = static_cast<size_t>(args.n) * args.k;
  uint32_t row = first / args.k, column = first % args.k;
  for (size_t at = first; at < min(first + 16, size); ++at) {
    static_cast<uint8_t*>(args.out)[at] = value_at(args, row, column);
    if (++column == args.k) ++row, column = 0;
  }
}

// Blocks of int8: 64 x 128 bytes under the 128-byte swizzle, a unit sixteen columns of a row.
extern "C" __global__ void repack_blocks8(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index();
  if (unit >= args.units) return;
  const uint32_t slices = (args.k + 127) / 128, block = unit / 512, r = unit / 8 % 64;
  const uint32_t row = block / slices * 64 + r, column = block % slices * 128 + ((unit ^ r) % 8) * 16;
  const uint2 low = bytes8(args, row, column), high = bytes8(args, row, column + 8);
  *out16(args, unit) = make_uint4(low.x, low.y, high.x, high.y);
}

// Row of value i (0 to 63) of the parameters of a block: in pairs of rows eight apart.
__device__ __forceinline__ uint32_t paired_row(uint32_t i) { return i / 16 * 16 + i % 2 * 8 + i / 2 % 8; }

// Blocks for 16 bits: codes, then for each group planes of 64 scales, their low parts, zero points.
template <typename T>
__device__ void blocks16(const RepackArgs& args) {
  const uint32_t unit = unit_index();
  if (unit >= args.units) return;
  const uint32_t planes = 1 + args.low_scales + args.has_zero_points;
  const uint32_t code_units = 64 * args.container, block_units = code_units + args.block_groups * planes * 8;
  const uint32_t slices = (args.k + 127) / 128, block = unit / block_units, at = unit % block_units;
  const uint32_t first_row = block / slices * 64, first_column = block % slices * 128;
  uint32_t words[4] = {0, 0, 0, 0};
  if (at < code_units) {
    const uint32_t thread = at % 128, part = at / 128;
    const uint32_t row = first_row + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t step = args.container == 4 ? 4 * part + j : 2 * part + j % 2;
      const uint32_t column = first_column + step * 16 + thread % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t c = column + i / 2 * 8 + i % 2;
        if (args.container == 4) {
          const int place = i / 2 * 2 + i % 2 * 4;
          words[j] |= value_at(args, row, c) << (4 * place) | value_at(args, row + 8, c) << (4 * place + 4);
        } else {
          words[j] |= value_at(args, row + j / 2 * 8, c) << (8 * i);
        }
      }
      words[j] = arrange_e4m3(args, words[j]);
    }
  } else {
    const uint32_t first = (at - code_units) * 8, group = first / 64 / planes, plane = first / 64 % planes;
    const uint32_t column = first_column + group * (128 / args.block_groups);
    const uint32_t of_row = min(column / args.group_size, args.groups - 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t row = first_row + paired_row(first % 64 + i);
      if (row >= args.n) continue;
      uint32_t bits;
      if (plane == 2 || (plane == 1 && !args.low_scales)) {
        bits = zero_point(args, row, of_row);
      } else {
        const float scale = args.scales[static_cast<size_t>(row) * args.groups + of_row];
        const T high = from_float<T>(scale);
        const T half = plane == 0 ? high : from_float<T>(__fsub_rn(scale, to_float(high)));
        bits = *reinterpret_cast<const uint16_t*>(&half);
      }
      words[i / 2] |= (bits & 0xffff) << (16 * (i % 2));
    }
  }
  *out16(args, unit) = make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void repack_blocks16_f16(const __grid_constant__ RepackArgs args) {
  overlap();
  blocks16<f16>(args);
}
extern "C" __global__ void repack_blocks16_bf16(const __grid_constant__ RepackArgs args) {
  overlap();
  blocks16<bf16>(args);
}

// Nibbles in blocks: code minus zero point in four bits, then sixteenths of the scales.
extern "C" __global__ void repack_blocks4(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index();
  if (unit >= args.units) return;
  const uint32_t block_units = 256 + args.block_groups * 16;
  const uint32_t slices = (args.k + 127) / 128, block = unit / block_units, at = unit % block_units;
  const uint32_t first_row = block / slices * 64, first_column = block % slices * 128;
  uint32_t words[4] = {0, 0, 0, 0};
  if (at < 256) {
    const uint32_t thread = at % 128, row = first_row + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t column = first_column + at / 128 * 64 + i / 4 * 16 + thread % 4 * 4 + i % 4;
      const uint32_t byte = (value_at(args, row, column) & 15) | (value_at(args, row + 8, column) & 15) << 4;
      words[i / 4] |= byte << (8 * (i % 4));
    }
  } else {
    const uint32_t first = (at - 256) * 4, column = first_column + first / 64 * (128 / args.block_groups);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = first_row + paired_row(first % 64 + i);
      if (row >= args.n || column >= args.k) continue;
      const float scale = args.scales[static_cast<size_t>(row) * args.groups + column / args.group_size];
      words[i] = __float_as_uint(__fmul_rn(scale, 0.0625f));
    }
  }
  *out16(args, unit) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Where the value of a row and a group lies.
__device__ __forceinline__ size_t place(const RepackArgs& args, uint32_t row, uint32_t group) {
  return args.n_pad == 0 ? static_cast<size_t>(row) * args.groups + group : static_cast<size_t>(group) * args.n_pad + row;
}

// [n, groups] to [groups, n_pad]: scales as they are; zero points as 16-bit integers. A unit is a value of the output.
extern "C" __global__ void repack_scales(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index(), row = unit % args.n_pad, group = unit / args.n_pad;
  if (unit >= args.units) return;
  const size_t from = static_cast<size_t>(row) * args.groups + group;
  static_cast<float*>(args.out)[unit] = row < args.n ? args.scales[from] : 0.0f;
}

extern "C" __global__ void repack_zeros(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index(), row = unit % args.n_pad, group = unit / args.n_pad;
  if (unit >= args.units) return;
  static_cast<uint16_t*>(args.out)[unit] = row < args.n ? zero_point(args, row, group) : 0;
}

// Sums of code minus zero point over each group. Warps: one a sum, those of the padding write 0.
extern "C" __global__ void repack_sums(const __grid_constant__ RepackArgs args) {
  overlap();
  const uint32_t unit = unit_index() / 32, lane = threadIdx.x % 32;
  if (unit >= args.units) return;
  const uint32_t rows = args.n_pad == 0 ? args.n : args.n_pad, row = unit % rows, group = unit / rows;
  const uint32_t end = min((group + 1) * args.group_size, args.k);
  int32_t sum = 0;
  for (uint32_t column = group * args.group_size + lane; column < end; column += 32) {
    sum += static_cast<int32_t>(value_at(args, row, column));
  }
  sum = __reduce_add_sync(0xffffffff, sum);
  if (lane == 0) static_cast<int32_t*>(args.out)[place(args, row, group)] = sum;
}
