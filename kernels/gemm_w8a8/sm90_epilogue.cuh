// Outputs of the sm_90 kernels of W8A8: from sums as each kernel holds them to rows of y, sixteen bytes at a time.
#pragma once

#include <type_traits>

#include "common/async_copy.cuh"
#include "gemm_w8a8/abi.h"
#include "common/epilogue.cuh"

// What the epilogue knows of eight consecutive columns.
struct Columns8 {
  float scales[8];
  int32_t w_sums[8];

  // `col` a multiple of 8, below n rounded up to 256.
  __device__ __forceinline__ Columns8(const GemmW8A8Sm90Args& args, uint32_t col) {
    load8(args.w_scales + col, scales);
#pragma unroll
    for (int i = 0; i < 8; ++i) w_sums[i] = args.w_sums == nullptr ? 0 : args.w_sums[col + i];
  }

  __device__ __forceinline__ float scaled(int i, int32_t sum, int32_t x_zero_point, float x_scale) const {
    return dequantize_w8a8(sum, x_zero_point * w_sums[i], x_scale, scales[i]);
  }
};

// What the epilogue knows of the columns of a tile, in shared memory: asked for before the products, so that it is there
// when they end.
template <int N>
class TileColumns {
 public:
  static constexpr uint32_t BYTES = GEMM_W8A8_SM90_COLUMN_BYTES * N;  // of shared memory for each warpgroup

  __device__ __forceinline__ TileColumns(uint8_t* shared, uint32_t named) : shared_(shared), named_(named) {}

  // Columns from `col` on, by all threads of a warpgroup. What lies past n is 0, scales to n rounded up to 256 aside.
  __device__ __forceinline__ void load(const GemmW8A8Sm90Args& args, uint32_t col) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const uint32_t c = col + thread() + 128 * i;
      const bool inside = thread() + 128 * i < N && c < args.y.n;
      scales_[i] = inside ? args.w_scales[c] : 0.0f;
      sums_[i] = inside && args.w_sums != nullptr ? args.w_sums[c] : 0;
      biases_[i] = inside && args.y.bias != nullptr ? args.y.bias[c] : 0.0f;
    }
  }

  // Into shared memory. The warpgroup is past its last read of what was there.
  __device__ __forceinline__ void publish() {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const uint32_t c = thread() + 128 * i;
      if (c < N) scales()[c] = scales_[i], sums()[c] = sums_[i], biases()[c] = biases_[i];
    }
    named_barrier(named_, 128);
  }

  __device__ __forceinline__ float2 scale(uint32_t c) const { return *reinterpret_cast<float2*>(scales() + c); }
  __device__ __forceinline__ int2 w_sum(uint32_t c) const { return *reinterpret_cast<int2*>(sums() + c); }
  __device__ __forceinline__ float2 bias(uint32_t c) const { return *reinterpret_cast<float2*>(biases() + c); }

 private:
  static constexpr int EACH = (N + 127) / 128;
  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ float* scales() const { return reinterpret_cast<float*>(shared_); }
  __device__ __forceinline__ int32_t* sums() const { return reinterpret_cast<int32_t*>(shared_) + N; }
  __device__ __forceinline__ float* biases() const { return reinterpret_cast<float*>(shared_) + 2 * N; }

  uint8_t* shared_;
  uint32_t named_;
  float scales_[EACH], biases_[EACH];
  int32_t sums_[EACH];
};

// Sixteen rows of 128 bytes in shared memory through which a warp turns its sums into whole lines of memory. Chunks of 16
// bytes are permuted within a row so that neither side meets bank conflicts.
class WarpRows {
 public:
  static constexpr uint32_t BYTES = GEMM_W8A8_SM90_LINE_BYTES;
  __device__ __forceinline__ explicit WarpRows(uint8_t* memory)
      : memory_(memory), shared_(shared_address(memory)), lane_(threadIdx.x % 32) {}

  // The same memory as 512 floats.
  __device__ __forceinline__ float* floats() const { return reinterpret_cast<float*>(memory_); }

  // Chunks first to first + 3 of the eight rows from 8 * half on: word i of this lane lies in chunk first + i of row
  // lane / 4, at its 4-byte column lane % 4.
  __device__ __forceinline__ void put4(int half, uint32_t first, const uint32_t (&words)[4]) const {
    const uint32_t row = 8 * half + lane_ % 8;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at(row, first + lane_ / 8)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
  }
  // Two floats at columns 8j + 2t of row lane / 4 + 8 * half.
  __device__ __forceinline__ void put(int half, uint32_t j, float y0, float y1) const {
    const uint32_t t = lane_ % 4;
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at(8 * half + lane_ / 4, 2 * j + t / 2) + t % 2 * 8), "f"(y0),
                 "f"(y1));
  }
  // Two codes at columns 8j + 2t of row lane / 4 + 8 * half.
  __device__ __forceinline__ void put_codes(int half, uint32_t j, uint32_t code0, uint32_t code1) const {
    const uint32_t t = lane_ % 4;
    const uint16_t both = static_cast<uint16_t>(code0 | code1 << 8);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at(8 * half + lane_ / 4, j / 2) + j % 2 * 8 + 2 * t), "h"(both));
  }
  // Row and chunk that this lane gets in turn i of four.
  __device__ __forceinline__ uint32_t row(int i) const { return 4 * i + lane_ / 8; }
  __device__ __forceinline__ uint32_t chunk() const { return lane_ % 8; }
  __device__ __forceinline__ uint4 get(int i) const {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at(row(i), chunk())));
    return v;
  }
  // Between puts and gets. Not a fence for the compiler, which may move other work across: all accesses here are asm.
  __device__ __forceinline__ void sync() const { asm volatile("bar.warp.sync 0xffffffff;"); }

 private:
  __device__ __forceinline__ uint32_t at(uint32_t row, uint32_t chunk) const {
    return shared_ + row * 128 + ((chunk ^ (row & 7)) << 4);
  }
  uint8_t* memory_;
  uint32_t shared_, lane_;
};

// What a tile's outputs need beside their scales.
enum Terms {
  TERMS_NONE,
  TERMS_AFFINE,         // zero points of x, a bias
  TERMS_SWIGLU,         // pairs of blocks of eight columns make one
  TERMS_AFFINE_SWIGLU,  // both
};
__device__ constexpr bool is_affine(Terms terms) { return terms == TERMS_AFFINE || terms == TERMS_AFFINE_SWIGLU; }
__device__ constexpr bool is_swiglu(Terms terms) { return terms == TERMS_SWIGLU || terms == TERMS_AFFINE_SWIGLU; }

// The 16 x N outputs of a warp, from its sums as a product leaves them: sums[4 b + 2 h + i] is of row lane / 4 + 8 h and
// column 8 b + 2 (lane % 4) + i. As floats these are scaled already and only the bias is missing: LLM.int8(), which no
// epilogue follows.
template <int N, typename Sum = int32_t>
struct WarpTile {
  static constexpr bool IS_SCALED = std::is_same<Sum, float>::value;

  const GemmW8A8Sm90Args& args;
  const TileColumns<N>& columns;
  uint32_t row;        // first of the warp's
  uint32_t col;        // first of the tile
  float x_scales[2];   // of rows lane / 4 and lane / 4 + 8
  int32_t x_zero_points[2];

  template <Terms TERMS>
  static constexpr int BLOCKS = is_swiglu(TERMS) ? N / 16 : N / 8;  // of eight outputs

  static __device__ __forceinline__ uint32_t lane_row() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ uint32_t lane_col() { return threadIdx.x % 4 * 2; }

  // Scaled sums of columns 8 b + lane_col() and the next, before the bias.
  template <Terms TERMS>
  __device__ __forceinline__ float2 scaled(int half, int b, const Sum (&sums)[N / 2]) const {
    const uint32_t c = 8 * b + lane_col();
    const Sum s0 = sums[4 * b + 2 * half], s1 = sums[4 * b + 2 * half + 1];
    if constexpr (IS_SCALED) {
      return make_float2(s0, s1);
    } else {
      const float2 scale = columns.scale(c);
      const int2 w_sum = is_affine(TERMS) ? columns.w_sum(c) : make_int2(0, 0);
      const int32_t zero = x_zero_points[half];
      return make_float2(dequantize_w8a8(s0, zero * w_sum.x, x_scales[half], scale.x),
                         dequantize_w8a8(s1, zero * w_sum.y, x_scales[half], scale.y));
    }
  }

  template <Terms TERMS>
  __device__ __forceinline__ float2 biased(int half, int b, const Sum (&sums)[N / 2]) const {
    float2 y = scaled<TERMS>(half, b, sums);
    if (is_affine(TERMS) && args.y.bias != nullptr) {
      const float2 bias = columns.bias(8 * b + lane_col());
      y.x = __fadd_rn(y.x, bias.x), y.y = __fadd_rn(y.y, bias.y);
    }
    return y;
  }

  // Outputs 8 b + lane_col() and the next.
  template <Terms TERMS>
  __device__ __forceinline__ float2 output(int half, int b, const Sum (&sums)[N / 2]) const {
    if (is_swiglu(TERMS)) {
      const float2 gate = biased<TERMS>(half, 2 * b, sums), up = biased<TERMS>(half, 2 * b + 1, sums);
      return make_float2(swiglu(gate.x, up.x), swiglu(gate.y, up.y));
    }
    return biased<TERMS>(half, b, sums);
  }

  template <Terms TERMS>
  __device__ __forceinline__ uint32_t first_output() const { return is_swiglu(TERMS) ? col / 2 : col; }

  // 16-bit floats, all columns inside y, rows on 16 bytes. T void: f16 or bf16 as the mode says, one code for both.
  template <typename T, Terms TERMS>
  __device__ __forceinline__ void store_16bit(const WarpRows& rows, const Sum (&sums)[N / 2]) const {
    uint16_t* out = static_cast<uint16_t*>(args.y.out) + first_output<TERMS>() + 8 * rows.chunk();
    const bool is_f16 = args.y.mode == LOWBIT_OUT_F16;
#pragma unroll
    for (int first = 0; first < BLOCKS<TERMS>; first += 8) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        if (first + j >= BLOCKS<TERMS>) continue;
        uint32_t words[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 y = output<TERMS>(half, first + j + i, sums);
            if constexpr (std::is_void<T>::value) {
              words[half][i] = is_f16 ? pack2<f16>(y.x, y.y) : pack2<bf16>(y.x, y.y);
            } else {
              words[half][i] = pack2<T>(y.x, y.y);
            }
          }
        }
        rows.put4(0, j, words[0]);
        rows.put4(1, j, words[1]);
      }
      store_lines(rows, first + rows.chunk() < BLOCKS<TERMS>, out + 8 * first);
    }
  }

  // 8-bit codes of static scale, all columns inside y, rows on 16 bytes.
  template <Terms TERMS>
  __device__ __forceinline__ void store_codes(const WarpRows& rows, const Sum (&sums)[N / 2]) const {
    const StaticCoder coder(args.y.scale, args.y.zero_point);
    uint8_t* out = static_cast<uint8_t*>(args.y.out) + first_output<TERMS>() + 16 * rows.chunk();
#pragma unroll
    for (int first = 0; first < BLOCKS<TERMS>; first += 16) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (first + j >= BLOCKS<TERMS>) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 y = output<TERMS>(half, first + j, sums);
          const uint32_t flip = args.y.flip;
          rows.put_codes(half, j, (coder.code(y.x) ^ flip) & 0xff, (coder.code(y.y) ^ flip) & 0xff);
        }
      }
      store_lines(rows, first + 2 * rows.chunk() < BLOCKS<TERMS>, out + 8 * first);
    }
    if (first_output<TERMS>() == 0 && lane_col() == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t r = row + lane_row() + 8 * half;
        if (r < args.y.m) args.y.scales[r] = isfinite(x_scales[half]) ? args.y.scale : __uint_as_float(0x7fc00000u);
      }
    }
  }

  // What waits in `rows` to memory, where this lane's chunk is `used`.
  template <typename T>
  __device__ __forceinline__ void store_lines(const WarpRows& rows, bool used, T* out) const {
    rows.sync();
    uint4 lines[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) lines[i] = rows.get(i);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t r = row + rows.row(i);
      if (used && r < args.y.m) *reinterpret_cast<uint4*>(out + static_cast<size_t>(r) * args.y.stride) = lines[i];
    }
    rows.sync();
  }

  // f32, stored or added, all columns inside y, rows on 16 bytes.
  template <bool ADD, Terms TERMS>
  __device__ __forceinline__ void store_f32(const WarpRows& rows, const Sum (&sums)[N / 2]) const {
    float* out = static_cast<float*>(args.y.out) + first_output<TERMS>() + 4 * rows.chunk();
#pragma unroll
    for (int first = 0; first < BLOCKS<TERMS>; first += 4) {
      float4 old[4];
      if (ADD) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t r = row + rows.row(i);
          if (r < args.y.m) old[i] = *reinterpret_cast<const float4*>(out + static_cast<size_t>(r) * args.y.stride + 8 * first);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 y = output<TERMS>(half, first + j, sums);
          rows.put(half, j, y.x, y.y);
        }
      }
      if (!ADD) {
        store_lines(rows, true, out + 8 * first);
        continue;
      }
      rows.sync();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t r = row + rows.row(i);
        const uint4 line = rows.get(i);
        const float4 y = make_float4(__fadd_rn(old[i].x, __uint_as_float(line.x)), __fadd_rn(old[i].y, __uint_as_float(line.y)),
                                     __fadd_rn(old[i].z, __uint_as_float(line.z)), __fadd_rn(old[i].w, __uint_as_float(line.w)));
        if (r < args.y.m) *reinterpret_cast<float4*>(out + static_cast<size_t>(r) * args.y.stride + 8 * first) = y;
      }
      rows.sync();
    }
  }

  // Any epilogue, place and edge: a few rows at a time, as floats, through `rows` and common/linear_fused.cuh. Groups of
  // outputs that share a scale lie in tiles that hold whole ones; the host asks no other.
  __device__ __forceinline__ void store_any(const WarpRows& rows, const Sum (&sums)[N / 2]) const {
    constexpr uint32_t TOGETHER = 512 / N < 8 ? (512 / N < 4 ? 2 : 4) : 8;  // rows that fit, a power of two
    const FusedWriter writer(args.y, args.x_scales);
    const bool exact = !IS_SCALED && args.y.mode == LOWBIT_OUT_FIXED;
    float* staged = rows.floats();
#pragma unroll 1
    for (uint32_t pass = 0; pass < 16 / TOGETHER; ++pass) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t r = lane_row() + 8 * half;
        if (r / TOGETHER != pass) continue;
#pragma unroll
        for (int b = 0; b < N / 8; ++b) {
          const uint32_t c = 8 * b + lane_col();
          float2 y = scaled<TERMS_AFFINE>(half, b, sums);
          if (exact) {
            const int2 w_sum = columns.w_sum(c);
            y.x = __int_as_float(sums[4 * b + 2 * half] - x_zero_points[half] * w_sum.x);
            y.y = __int_as_float(sums[4 * b + 2 * half + 1] - x_zero_points[half] * w_sum.y);
          }
          *reinterpret_cast<float2*>(staged + r % TOGETHER * N + c) = y;
        }
      }
      __syncwarp();
      const auto row_of = [&](uint32_t from) { return row + pass * TOGETHER + from; };
      finish_tile<32, TOGETHER, N>(writer, args.y, staged, N, threadIdx.x % 32, col, row_of);
      __syncwarp();
    }
  }

  __device__ __forceinline__ void store(const WarpRows& rows, const Sum (&sums)[N / 2]) const {
    const LinearOut& y = args.y;
    const uint32_t in_16_bytes = y.mode == LOWBIT_OUT_STATIC ? 16 : 8;
    const bool whole = col + N <= y.n && y.stride % in_16_bytes == 0 && reinterpret_cast<uintptr_t>(y.out) % 16 == 0;
    const bool has_terms = args.w_sums != nullptr || y.bias != nullptr;
    if constexpr (IS_SCALED) {
      if (!whole) return store_any(rows, sums);
      if (y.mode == LOWBIT_OUT_F32) return store_f32<false, TERMS_AFFINE>(rows, sums);
      if (y.mode == LOWBIT_OUT_F32_ADD) return store_f32<true, TERMS_AFFINE>(rows, sums);
      return store_16bit<void, TERMS_AFFINE>(rows, sums);
    }
    if (whole && y.activation == LOWBIT_ACTIVATION_NONE) {
      switch (y.mode) {
        case LOWBIT_OUT_F16:
        case LOWBIT_OUT_BF16:
          if (has_terms) return store_16bit<void, TERMS_AFFINE>(rows, sums);
          if (y.mode == LOWBIT_OUT_F16) return store_16bit<f16, TERMS_NONE>(rows, sums);
          return store_16bit<bf16, TERMS_NONE>(rows, sums);
        case LOWBIT_OUT_F32: return store_f32<false, TERMS_AFFINE>(rows, sums);
        case LOWBIT_OUT_F32_ADD:
          if (has_terms) return store_f32<true, TERMS_AFFINE>(rows, sums);
          return store_f32<true, TERMS_NONE>(rows, sums);
        case LOWBIT_OUT_STATIC: return store_codes<TERMS_AFFINE>(rows, sums);
        default: break;
      }
    }
    if (whole && y.activation == LOWBIT_ACTIVATION_SWIGLU) {
      if (y.mode == LOWBIT_OUT_F16 || y.mode == LOWBIT_OUT_BF16) {
        if (has_terms) return store_16bit<void, TERMS_AFFINE_SWIGLU>(rows, sums);
        return store_16bit<void, TERMS_SWIGLU>(rows, sums);
      }
      if (y.mode == LOWBIT_OUT_STATIC) {
        if (has_terms) return store_codes<TERMS_AFFINE_SWIGLU>(rows, sums);
        return store_codes<TERMS_SWIGLU>(rows, sums);
      }
    }
    store_any(rows, sums);
  }
};
