// Codes to 16-bit floats in registers: exactly `code - zero`, never scaled. Group scales go on the f32 sums, so no
// weight is ever rounded; with |code - zero| <= 256 both f16 and bf16 hold it exactly. FP8 codes (`E4m3`) become their value,
// or a power of two times it, exactly too; codes of a codebook (`Levels`, at the end) theirs, rounded once to the type.
//
// Idea of the bit trick: an unsigned integer put into the low mantissa bits of a float of fitting exponent *is* that
// float plus the integer (Kim et al., "Who Says Elephants Can't Run", 2022), so that one LOP3 makes two numbers and
// one packed operation takes the offset and the zero point away.
#pragma once

#include <type_traits>

#include "common/packed_math.cuh"
#include "gemm_w4a16/abi.h"

// What codes stand for. As bf16 whose bits are those of a code (`code_bits`), a number is 2^BF16_EXPONENT times what it stands for;
// codes of row g + 8 lie HIGH_SHIFT bits higher.
struct Uint4 {
  static constexpr int BITS = 4, BF16_EXPONENT = -133, HIGH_SHIFT = 4;
  static constexpr bool HAS_ZERO_POINT = true;
};
struct Uint8 {
  static constexpr int BITS = 8, BF16_EXPONENT = -133, HIGH_SHIFT = 0;
  static constexpr bool HAS_ZERO_POINT = true;
};
struct E4m3 {  // FP8 e4m3fn
  static constexpr int BITS = 8, BF16_EXPONENT = -120, HIGH_SHIFT = 0;
  static constexpr bool HAS_ZERO_POINT = false;
};
struct Codebook4 {  // sixteen values
  static constexpr int BITS = 4;
  static constexpr bool HAS_ZERO_POINT = false;
};

// What `CodeTile<T, Codes>::fragment` subtracts, made once per weight row and group.
template <typename T, typename Codes>
struct ZeroPoint {  // of codes without
  static __device__ __forceinline__ uint32_t low(uint32_t) { return 0; }
  static __device__ __forceinline__ uint32_t high(uint32_t) { return 0; }
};

// The codes one lane holds of a 16 x 32 part of the weight (rows g and g + 8; columns 8t .. 8t + 7), as they lie in
// memory. `fragment<HALF>` gives columns 8t + 4 HALF .. + 3 as four words:
// p[0] row g, columns 0 1; p[1] row g + 8, columns 0 1; p[2] row g, columns 2 3; p[3] row g + 8, columns 2 3.
// That is the A operand of m16n8k16, and two B operands: (p[0], p[2]) and (p[1], p[3]). Numbers are `fragment_unit` times
// what they stand for.
template <typename T, typename Codes>
struct CodeTile {
  uint32_t words[Codes::BITS / 2];
};
template <typename T, typename Codes>
constexpr float fragment_unit = 1.0f;

// 4 bits: nibbles p and p + 4 of word HALF are the low and high element of p[p].
template <>
struct ZeroPoint<f16, Uint4> {
  // Row g is unpacked as 1024 + q (one unit in the last place of 1024 is 1); row g + 8 as 1024 + 16 q, then / 16.
  static __device__ __forceinline__ uint32_t low(uint32_t z) { return (0x6400u + z) * 0x00010001u; }           // 1024 + z
  static __device__ __forceinline__ uint32_t high(uint32_t z) { return (0xd400u + (z << 4)) * 0x00010001u; }  // -(64 + z)
};
template <>
struct CodeTile<f16, Uint4> {
  uint32_t words[2];
  template <int HALF>
  __device__ __forceinline__ void fragment(uint32_t zero_g, uint32_t zero_g8, uint32_t (&p)[4]) const {
    constexpr uint32_t SIXTEENTH = 0x2c002c00;
    const uint32_t w = words[HALF], v = w >> 8;
    p[0] = sub_f16x2(select_bits(w, 0x000f000f, 0x64006400), zero_g);
    p[1] = fma_f16x2(select_bits(w, 0x00f000f0, 0x64006400), SIXTEENTH, zero_g8);
    p[2] = sub_f16x2(select_bits(v, 0x000f000f, 0x64006400), zero_g);
    p[3] = fma_f16x2(select_bits(v, 0x00f000f0, 0x64006400), SIXTEENTH, zero_g8);
  }
};

// 8 bits: words 0 and 1 are row g, words 2 and 3 row g + 8; byte i of word HALF is column 4 HALF + i.
template <>
struct ZeroPoint<f16, Uint8> {
  static __device__ __forceinline__ uint32_t low(uint32_t z) { return (0x6400u + z) * 0x00010001u; }  // 1024 + z
  static __device__ __forceinline__ uint32_t high(uint32_t z) { return low(z); }
};
template <>
struct CodeTile<f16, Uint8> {
  uint32_t words[4];
  template <int HALF>
  __device__ __forceinline__ void fragment(uint32_t zero_g, uint32_t zero_g8, uint32_t (&p)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t w = words[2 * (i % 2) + HALF];
      p[i] = sub_f16x2(__byte_perm(w, 0x64646464, i < 2 ? 0x4140 : 0x4342), i % 2 == 0 ? zero_g : zero_g8);
    }
  }
};

// An e4m3fn code has a sign, four bits of exponent, three of mantissa. Where an f16 or a bf16 has the lower four bits of its exponent
// they are the same number times a power of two, subnormal ones as well. Packing has put the eight bits of the codes of columns 0 and 1
// where they must be, in the low and the high half of a word, and those of columns 2 and 3 among the bits that are left
// (docs/formats.md): five operations make two words.
__device__ __forceinline__ uint32_t e4m3_bits(f16, uint32_t w, bool second) {
  if (!second) return w & 0xbf80bf80;
  return select_bits(w << 7, 0x3f803f80, w << 1 & 0x80008000);
}
__device__ __forceinline__ uint32_t e4m3_bits(bf16, uint32_t w, bool second) {
  if (!second) return w & 0x87f087f0;
  return select_bits(w << 4, 0x80f080f0, w >> 4 & 0x07000700);
}
template <>
constexpr float fragment_unit<f16, E4m3> = 0x1p-8f;
template <>
struct CodeTile<f16, E4m3> {
  uint32_t words[4];
  template <int HALF>
  __device__ __forceinline__ void fragment(uint32_t, uint32_t, uint32_t (&p)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = e4m3_bits(f16(), words[2 * (i % 2) + HALF], i >= 2);
  }
};
// The words of a code as bf16. The bits of an integer up to 256 are, as bf16, that many times the least subnormal 2^-133:
// the first normal numbers go on in the same steps. So a mask makes a number of a code wherever in its byte it lies, and
// one multiply-add brings it to size and takes the zero point away.
template <typename Codes, int HALF>
__device__ __forceinline__ uint32_t code_bits(const uint32_t (&words)[Codes::BITS / 2], int i) {
  if constexpr (std::is_same<Codes, E4m3>::value) {
    return e4m3_bits(bf16(), words[2 * (i % 2) + HALF], i >= 2);
  } else if constexpr (Codes::BITS == 4) {
    return words[HALF] >> i / 2 * 8 & (i % 2 == 0 ? 0x000f000f : 0x00f000f0);
  } else {
    return __byte_perm(words[2 * (i % 2) + HALF], 0, i < 2 ? 0x4140 : 0x4342);
  }
}

// The factor that brings `code_bits` to size, as near as there is one: a power of two, and what remains.
template <typename Codes>
struct Bf16Unit {
  static constexpr int EXPONENT = Codes::BF16_EXPONENT + 127 < 0 ? Codes::BF16_EXPONENT + 127 : 0;
  static_assert(EXPONENT == 0 || EXPONENT == -6, "UNIT");
  static constexpr float UNIT = EXPONENT == 0 ? 1.0f : 0x1p-6f;
};

template <typename Codes>
constexpr float fragment_unit<bf16, Codes> = Bf16Unit<Codes>::UNIT;
template <>
constexpr float fragment_unit<bf16, Codebook4> = 1.0f;
template <typename Codes>
struct ZeroPoint<bf16, Codes> {
  static __device__ __forceinline__ uint32_t low(uint32_t z) {
    if constexpr (Codes::HAS_ZERO_POINT) {
      return both<bf16>(-static_cast<float>(z) * Bf16Unit<Codes>::UNIT);
    } else {
      return 0;
    }
  }
  static __device__ __forceinline__ uint32_t high(uint32_t z) { return low(z); }
};
template <typename Codes>
struct CodeTile<bf16, Codes> {
  uint32_t words[Codes::BITS / 2];
  template <int HALF>
  __device__ __forceinline__ void fragment(uint32_t zero_g, uint32_t zero_g8, uint32_t (&p)[4]) const {
    constexpr int UP = Bf16Unit<Codes>::EXPONENT - Codes::BF16_EXPONENT;
    constexpr uint32_t FACTOR_G = bf16_powers(UP, UP), FACTOR_G8 = bf16_powers(UP - Codes::HIGH_SHIFT, UP - Codes::HIGH_SHIFT);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = code_bits<Codes, HALF>(words, i), factor = i % 2 == 0 ? FACTOR_G : FACTOR_G8;
      p[i] = Codes::HAS_ZERO_POINT ? fma_bf16x2(bits, factor, i % 2 == 0 ? zero_g : zero_g8) : mul_16x2(bf16(), bits, factor);
    }
  }
};

// Codes to numbers by one interface: of all but a codebook's what `CodeTile` gives.
template <typename T, typename Codes>
struct Levels {
  __device__ __forceinline__ explicit Levels(const GemmW4A16Args&) {}
  template <int HALF>
  __device__ __forceinline__ void fragment(const CodeTile<T, Codes>& codes, uint32_t zero_g, uint32_t zero_g8,
                                           uint32_t (&p)[4]) const {
    codes.template fragment<HALF>(zero_g, zero_g8, p);
  }
};

// Of 4-bit codes of a codebook: nibbles 0 to 3 of word HALF are row g, columns 0 to 3; nibbles 4 to 7 row g + 8. A byte
// permutation picks four of eight bytes by four nibbles: twice for the lower three bits of the codes, in each half of the
// table, once more to choose between the halves; so for the low bytes of the values and for the high ones.
template <typename T>
struct Levels<T, Codebook4> {
  uint32_t bytes[2][4];

  __device__ __forceinline__ explicit Levels(const GemmW4A16Args& args) {
#pragma unroll
    for (int i = 0; i < 8; ++i) bytes[i / 4][i % 4] = args.codebook[i];
  }
  template <int HALF>
  __device__ __forceinline__ void fragment(const CodeTile<T, Codebook4>& codes, uint32_t, uint32_t, uint32_t (&p)[4]) const {
    const uint32_t w = codes.words[HALF];
    const uint32_t index = w & 0x77777777, half = select_bits(w >> 1, 0x44444444, 0x32103210);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t plane[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t low = permute_bytes(bytes[i][0], bytes[i][1], index >> (16 * row));
        const uint32_t high = permute_bytes(bytes[i][2], bytes[i][3], index >> (16 * row));
        plane[i] = permute_bytes(low, high, half >> (16 * row));
      }
      p[row] = permute_bytes(plane[0], plane[1], 0x5140);
      p[2 + row] = permute_bytes(plane[0], plane[1], 0x7362);
    }
  }
};

// Where scales go: on the f32 sums of a group; or on the weights, in the multiply-add that makes them (bf16 only), after it,
// or after it in two parts, a 16-bit float and the rest.
enum class Scaling { SUMS, FUSED, ONE_PART, TWO_PARTS };
