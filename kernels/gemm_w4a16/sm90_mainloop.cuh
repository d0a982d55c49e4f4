// Products of blocks of w with tokens by wgmma, the weights scaled before them (sm_90a): code minus zero point, exact, times
// its scale, rounded once to the activations' type. Scales on the sums would need as many registers again, and the
// products to end at each group.
#pragma once

#include <type_traits>

#include "common/wgmma.cuh"
#include "gemm_w4a16/sm90_block.cuh"

// SCALING: any but SUMS.
template <typename T, typename Codes, Scaling SCALING>
struct ScaledFragments {
  // f16 has no room for weights that are UNIT times what they should be: their scales make up for it.
  static constexpr bool SCALES_MAKE_UP = std::is_same<T, f16>::value && Fragments<T, Codes>::UNIT != 1.0f;
  GroupParameters parameters;
  Fragments<T, Codes> fragments;

  __device__ __forceinline__ explicit ScaledFragments(const GroupParameters& p) : parameters(p), fragments(of(p)) {
    if constexpr (SCALES_MAKE_UP) {
      const uint32_t up = both<f16>(1.0f / Fragments<T, Codes>::UNIT);
      parameters.scales = mul_16x2(f16(), p.scales, up);
      parameters.low_scales = mul_16x2(f16(), p.low_scales, up);
    }
  }
  static __device__ __forceinline__ Fragments<T, Codes> of(const GroupParameters& p) {
    if constexpr (SCALING == Scaling::FUSED) {
      return Fragments<T, Codes>::scaled(p);
    } else {
      return Fragments<T, Codes>(p);
    }
  }
  template <int HALF>
  __device__ __forceinline__ void make(const CodeTile<T, Codes>& codes, uint32_t (&a)[4]) const {
    fragments.template make<HALF>(codes, a);
    if constexpr (SCALING != Scaling::FUSED) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t scale = i % 2 == 0 ? twice_low(parameters.scales) : twice_high(parameters.scales);
        const uint32_t low = i % 2 == 0 ? twice_low(parameters.low_scales) : twice_high(parameters.low_scales);
        a[i] = SCALING == Scaling::TWO_PARTS ? fma_16x2(T(), a[i], scale, mul_16x2(T(), a[i], low))
                                             : mul_16x2(T(), a[i], scale);
      }
    }
  }
};

// The way that fits the weights, as types: STEPS, of sixteen columns for which a group's parameters hold, 8 where a block of w
// is in one; what is left to multiply the sums by.
template <typename T, typename Codes, Scaling SCALING, int STEPS>
struct ScaledWay {
  static constexpr Scaling scaling = SCALING;
  static constexpr int steps = STEPS;
  static constexpr float unit = ScaledFragments<T, Codes, SCALING>::SCALES_MAKE_UP ? 1.0f : Fragments<T, Codes>::UNIT;
  static constexpr float rest = 1 / (SCALING == Scaling::FUSED ? Fragments<bf16, Codes>::SCALED_UNIT : unit);
};

// Of ROOMY kernels, with registers for parameters that hold for long.
template <typename T, typename Codes, bool ROOMY, typename F>
__device__ __forceinline__ void by_scaling(const GemmW4A16Sm90Args& args, F run) {
  if constexpr (std::is_same<T, bf16>::value) {
    const bool exact_offset =
        !Codes::HAS_ZERO_POINT || (args.has_zero_points == 0 && (args.w_zero_point & (args.w_zero_point - 1)) == 0);
    if (args.low_scales == 0 && args.groups == 1 && exact_offset) return run(ScaledWay<T, Codes, Scaling::FUSED, 8>());
  }
  if (args.low_scales != 0) {
    run(ScaledWay<T, Codes, Scaling::TWO_PARTS, 2>());
  } else if (ROOMY && args.groups == 1) {
    run(ScaledWay<T, Codes, Scaling::ONE_PART, 8>());
  } else {
    run(ScaledWay<T, Codes, Scaling::ONE_PART, 2>());
  }
}

// Adds the products of one stage to `acc`, those of the last sixteen columns still under way at the end; `onto` is false for the
// first of a tile; `x` describes the first box. The next fragments are made while the tensor cores work on these, by turns in `a`.
// `previous_done` is called once the products of the stage before have ended.
template <typename Way, typename T, typename Codes, int TOKENS, typename F>
__device__ __forceinline__ void multiply_stage(const GemmW4A16Sm90Args& args, const WeightBlock<T, Codes>& block, uint64_t x,
                                               bool onto, uint32_t (&a)[2][4], float (&acc)[TOKENS / 2],
                                               F previous_done) {
  constexpr uint64_t BOX = TOKENS * 128 / 16;  // in units of a descriptor's address
  CodeTile<T, Codes> codes[4];
#pragma unroll
  for (int first = 0; first < 8; first += Way::steps) {
    const ScaledFragments<T, Codes, Way::scaling> group(
        Way::scaling == Scaling::FUSED ? block.only_group(args)
                                       : block.group(args, Way::steps == 8 ? 0 : first / 2 * args.groups / 4));
#pragma unroll
    for (int step = first; step < first + Way::steps; ++step) {
      if (step % (8 / block.CHUNKS) == 0) block.load(step / (8 / block.CHUNKS), codes);
      if (step % 2 == 0) {
        group.template make<0>(codes[step / 2], a[0]);
      } else {
        group.template make<1>(codes[step / 2], a[1]);
      }
      wgmma_fence();
      Wgmma16Bit<T, TOKENS>::run(acc, a[step % 2], x + step / 4 * BOX + step % 4 * 2, onto || step != 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (step == 0) previous_done();
    }
  }
}
