// From codes to the weights that gemm_w4a16/sm80 multiplies, and what a group's scale and zero point are for that.
#pragma once

#include <type_traits>

#include "gemm_w4a16/sm80_ring.cuh"

// Zero points and scales of one group for the 16 NT rows of w of a warp, ready for use, in shared memory of its own. A lane
// makes them of two rows, 8 apart; all that need them read them again for every 16 columns. Registers for them are taken by sums.
template <typename T, typename Codes, int NT, Scaling SCALING>
struct GroupTable {
  // Weights, or sums, are so many times what they should be.
  static constexpr float UNIT = SCALING == Scaling::FUSED ? 0x1p-32f : 1.0f;
  static constexpr float CODE_UNIT = fragment_unit<T, Codes>;  // codes, before they are scaled

  uint32_t to, from, low_to, low_from;  // addresses: this lane's two rows as it makes them, and as it uses them
  float scale[2];                       // of the next group
  uint32_t zero[2];
  uint32_t row;
  bool inside;
  Levels<T, Codes> levels;

  __device__ __forceinline__ GroupTable(const GemmW4A16Args& args, uint32_t address, uint32_t first_row) : levels(args) {
    const uint32_t lane = threadIdx.x % 32;
    to = address + lane * 16, from = address + lane / 4 * 16;
    low_to = address + NT * 128 + lane * 8, low_from = address + NT * 128 + lane / 4 * 8;
    row = first_row + lane / 8 * 16 + lane % 8;
    inside = lane < 8 * NT && row < args.n_pad;
  }

  __device__ __forceinline__ void fetch(const GemmW4A16Args& args, uint32_t group) {
    const size_t at = static_cast<size_t>(group) * args.n_pad + row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale[r] = inside ? args.w_scales[at + 8 * r] : 0.0f;
      zero[r] = inside && args.w_zero_points != nullptr ? args.w_zero_points[at + 8 * r] : args.w_zero_point;
    }
  }

  // What was fetched replaces what there was. All lanes together.
  __device__ __forceinline__ void publish() const {
    uint32_t v[4], low[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float code_zero = -static_cast<float>(zero[r]);
      if constexpr (SCALING == Scaling::FUSED) {  // the zero point is a power of two: one rounding is all there is
        constexpr int UP = -32 - Codes::BF16_EXPONENT;
        v[r] = both<T>(scale[r] * power_of_two(r == 1 ? UP - Codes::HIGH_SHIFT : UP));
        v[2 + r] = both<T>(code_zero * scale[r] * UNIT);
      } else {
        v[r] = r == 0 ? ZeroPoint<T, Codes>::low(zero[r]) : ZeroPoint<T, Codes>::high(zero[r]);
        const float high = to_float(from_float<T>(scale[r]));
        v[2 + r] = SCALING == Scaling::SUMS ? __float_as_uint(scale[r] / CODE_UNIT) : both<T>(high / CODE_UNIT);
        low[r] = both<T>((scale[r] - high) / CODE_UNIT);
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 < 8 * NT) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
      if constexpr (SCALING == Scaling::TWO_PARTS) {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(low_to), "r"(low[0]), "r"(low[1]) : "memory");
      }
    }
    __syncwarp();
  }

  // SUMS: scales of rows g and g + 8 of tile j.
  __device__ __forceinline__ float2 sum_scales(int j) const {
    const uint4 v = load_shared16(from + j * 128);
    return make_float2(__uint_as_float(v.z), __uint_as_float(v.w));
  }

  // Columns 8t + 4 HALF .. + 3 of tile j, as CodeTile::fragment gives them.
  template <int HALF>
  __device__ __forceinline__ void make(const CodeTile<T, Codes>& codes, int j, uint32_t (&p)[4]) const {
    const uint4 v = load_shared16(from + j * 128);
    if constexpr (SCALING == Scaling::FUSED) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = code_bits<Codes, HALF>(codes.words, i), factor = i % 2 == 0 ? v.x : v.y;
        p[i] = Codes::HAS_ZERO_POINT ? fma_bf16x2(bits, factor, i % 2 == 0 ? v.z : v.w) : mul_16x2(bf16(), bits, factor);
      }
    } else {
      levels.template fragment<HALF>(codes, v.x, v.y, p);
    }
    if constexpr (SCALING == Scaling::ONE_PART || SCALING == Scaling::TWO_PARTS) {
      uint2 low;
      if constexpr (SCALING == Scaling::TWO_PARTS) low = load_shared8(low_from + j * 64);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t high = i % 2 == 0 ? v.z : v.w;
        if constexpr (SCALING == Scaling::TWO_PARTS) {
          p[i] = fma_16x2(T(), p[i], high, mul_16x2(T(), p[i], i % 2 == 0 ? low.x : low.y));
        } else {
          p[i] = mul_16x2(T(), p[i], high);
        }
      }
    }
  }
};
