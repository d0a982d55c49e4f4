// Outputs of the sm_90 kernels of W4A8: from the sums of a warpgroup, 64 rows of w by TOKENS rows of x as products leave
// them, to rows of y, by way of shared memory that turns them over.
#pragma once

#include "common/async_copy.cuh"
#include "common/mbarrier.cuh"
#include "gemm_w4a8/abi.h"
#include "common/epilogue.cuh"

// Whether rows of x have zero points.
__device__ __forceinline__ bool has_zeros(const GemmW4A8Sm90Args& args) {
  return args.x_zero_point != 0 || args.x_zero_points != nullptr;
}

template <int TOKENS>
class TokenTile {
 public:
  static constexpr uint32_t PITCH = GEMM_W4A8_SM90_TRANSPOSE_PITCH;  // floats between tokens: no bank conflicts
  static constexpr uint32_t TRANSPOSE_BYTES = GEMM_W4A8_SM90_TRANSPOSE_BYTES;
  static constexpr uint32_t BYTES = TRANSPOSE_BYTES + GEMM_W4A8_SM90_TOKEN_BYTES * TOKENS;

  // Of a warpgroup: its memory, and the hardware barrier it meets at.
  __device__ __forceinline__ TokenTile(const GemmW4A8Sm90Args& args, uint8_t* shared, uint32_t named)
      : args_(args), shared_(shared), named_(named) {}

  // Asks for what the tile of tokens from `token` on needs of its rows of x, and publishes their zero points.
  __device__ __forceinline__ void begin(uint32_t token) {
    token_ = token;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const uint32_t at = thread() + 128 * i;
      const bool inside = at < TOKENS && token + at < args_.y.m;
      x_scales_[i] = inside ? args_.x_scales[token + at] : 0.0f;
      if (has_zeros(args_) && at < TOKENS) zeros()[at] = inside ? zero_of_row(args_, token + at) : 0;
    }
    if (has_zeros(args_)) sync();
  }

  // Takes what the zero points of x add to sums of 16 times the weights: `w_sums` are those of the
  // thread's rows.
  __device__ __forceinline__ void correct(int32_t (&sums)[TOKENS / 2], int2 w_sums) const {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
      const int2 zero = *reinterpret_cast<const int2*>(zeros() + 8 * j + 2 * (threadIdx.x % 4));
      sums[4 * j] -= zero.x * w_sums.x;
      sums[4 * j + 1] -= zero.y * w_sums.x;
      sums[4 * j + 2] -= zero.x * w_sums.y;
      sums[4 * j + 3] -= zero.y * w_sums.y;
    }
  }

  // Writes the outputs of rows of w from `row` on. `acc` are sums over groups, before the scale of x; where there is one
  // group bare sums, in mode FIXED their bits.
  __device__ __forceinline__ void store(uint32_t row, const float (&acc)[TOKENS / 2]) {
    const LinearOut& y = args_.y;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (thread() + 128 * i < TOKENS) x_scales()[thread() + 128 * i] = x_scales_[i];
    }
    sync();
    if (row >= y.n) return;
    const LinearWriter writer(y);
    const bool is_16bit = y.mode == LOWBIT_OUT_F16 || y.mode == LOWBIT_OUT_BF16;
    if (is_16bit && y.activation == LOWBIT_ACTIVATION_NONE && row + 64 <= y.n && writer.takes_16_bytes()) {
      store_16bit(row, acc);
    } else {
      store_any(writer, row, acc);
    }
  }

 private:
  static constexpr int EACH = (TOKENS + 127) / 128;
  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ float* transpose() const { return reinterpret_cast<float*>(shared_); }
  __device__ __forceinline__ float* x_scales() const { return reinterpret_cast<float*>(shared_ + TRANSPOSE_BYTES); }
  __device__ __forceinline__ int32_t* zeros() const { return reinterpret_cast<int32_t*>(shared_ + TRANSPOSE_BYTES) + TOKENS; }
  __device__ __forceinline__ void sync() const { named_barrier(named_, 128); }
  // Of this thread's rows g and g + 8 of its warp's sixteen.
  __device__ __forceinline__ uint32_t lane_row() const { return thread() / 32 * 16 + threadIdx.x % 32 / 4; }

  // Of the thread's two rows, where there is one group.
  __device__ __forceinline__ float2 w_scales(uint32_t row) const {
    if (args_.w_scales == nullptr) return make_float2(1.0f, 1.0f);
    return make_float2(args_.w_scales[row + lane_row()], args_.w_scales[row + lane_row() + 8]);
  }

  // The four sums of tokens 8 j + 2 t and the next, by two rows: scaled.
  __device__ __forceinline__ void scale(int j, float2 w_scale, const float (&acc)[TOKENS / 2], float (&v)[4]) const {
    const float2 x_scale = *reinterpret_cast<const float2*>(x_scales() + 8 * j + 2 * (threadIdx.x % 4));
    const bool one_group = args_.w_scales != nullptr;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = __fmul_rn(acc[4 * j + i], i % 2 == 0 ? x_scale.x : x_scale.y);
      if (one_group) v[i] = __fmul_rn(v[i], i < 2 ? w_scale.x : w_scale.y);
    }
  }

  // 16-bit floats, with a bias or not, all rows of w inside y: 32 tokens of 128 bytes at a time.
  __device__ __forceinline__ void store_16bit(uint32_t row, const float (&acc)[TOKENS / 2]) const {
    const LinearOut& y = args_.y;
    const float2 w_scale = w_scales(row);
    const bool has_bias = y.bias != nullptr, is_f16 = y.mode == LOWBIT_OUT_F16;
    const float bias_g = has_bias ? y.bias[row + lane_row()] : 0.0f, bias_g8 = has_bias ? y.bias[row + lane_row() + 8] : 0.0f;
    const uint32_t shared = shared_address(shared_), lane = threadIdx.x % 32, warp = thread() / 32;
    const uint32_t put = shared + (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2 ^ lane % 8) << 4);
    constexpr int TOGETHER = TOKENS < 32 ? TOKENS : 32;
#pragma unroll
    for (int first = 0; first < TOKENS; first += TOGETHER) {
      if (token_ + first >= y.m) break;
#pragma unroll
      for (int j = 0; j < TOGETHER / 8; j += 2) {
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (first / 8 + j + i >= TOKENS / 8) continue;
          float v[4];
          scale(first / 8 + j + i, w_scale, acc, v);
          if (has_bias) {
            v[0] = __fadd_rn(v[0], bias_g), v[1] = __fadd_rn(v[1], bias_g);
            v[2] = __fadd_rn(v[2], bias_g8), v[3] = __fadd_rn(v[3], bias_g8);
          }
          words[2 * i] = is_f16 ? pack2<f16>(v[0], v[1]) : pack2<bf16>(v[0], v[1]);
          words[2 * i + 1] = is_f16 ? pack2<f16>(v[2], v[3]) : pack2<bf16>(v[2], v[3]);
        }
        const uint32_t to = put + j * 1024;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
      }
      sync();
#pragma unroll
      for (int i = 0; i < (TOGETHER + 15) / 16; ++i) {
        const uint32_t at = thread() / 8 + 16 * i, token = token_ + first + at, chunk = threadIdx.x % 8;
        if (at >= TOGETHER || token >= y.m) continue;
        const uint4 line = *reinterpret_cast<const uint4*>(shared_ + at * 128 + ((chunk ^ at % 8) << 4));
        uint16_t* out = static_cast<uint16_t*>(y.out) + static_cast<size_t>(token) * y.stride + row + 8 * chunk;
        *reinterpret_cast<uint4*>(out) = line;
      }
      sync();
    }
  }

  // Any epilogue, place and edge: as floats, sixteen tokens at a time.
  __device__ __forceinline__ void store_any(const LinearWriter& writer, uint32_t row, const float (&acc)[TOKENS / 2]) const {
    const LinearOut& y = args_.y;
    const float2 w_scale = w_scales(row);
    const bool plain = is_plain(y), exact = y.mode == LOWBIT_OUT_FIXED;
    constexpr int TOGETHER = TOKENS < 16 ? TOKENS : 16;
#pragma unroll 1
    for (uint32_t pass = 0; pass < TOKENS / TOGETHER; ++pass) {
      const uint32_t token = token_ + pass * TOGETHER;
      if (token >= y.m) break;
      static_for<TOKENS / TOGETHER>([&](auto index) {
        constexpr int PASS = decltype(index)::VALUE;
        if (PASS != pass) return;
        asm volatile("// tokens of pass %0" ::"n"(PASS));  // keeps the compiler from indexing sums in memory
#pragma unroll
        for (int j = 0; j < TOGETHER / 8; ++j) {
          constexpr int FIRST = PASS * TOGETHER / 8;
          float v[4];
          scale(FIRST + j, w_scale, acc, v);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* to = transpose() + (8 * j + 2 * (threadIdx.x % 4) + i % 2) * PITCH + lane_row() + i / 2 * 8;
            *to = exact ? acc[4 * (FIRST + j) + i] : v[i];
          }
        }
      });
      sync();
      if (plain) {
#pragma unroll 4
        for (uint32_t i = 0; i < TOGETHER / 4; ++i) {
          const uint32_t at = 4 * i + thread() / 32, column = threadIdx.x % 32 * 2;
          const float2 pair = *reinterpret_cast<const float2*>(transpose() + at * PITCH + column);
          writer.store2(token + at, row + column, pair.x, pair.y);
        }
      } else {
        const auto row_of = [&](uint32_t from) { return token + from; };
        finish_tile<128, TOGETHER, 64>(FusedWriter(y, args_.x_scales), y, transpose(), PITCH, thread(), row, row_of);
      }
      sync();
    }
  }

  const GemmW4A8Sm90Args& args_;
  uint8_t* shared_;
  uint32_t named_, token_;
  float x_scales_[EACH];
};
