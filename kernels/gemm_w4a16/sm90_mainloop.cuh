// Products of blocks of w with tokens by wgmma, the weights scaled before them (sm_90a): code minus zero point, exact, times
// its scale, rounded once to the activations' type. Scales on the sums would need as many registers again, and the
// products to end at each group.
#pragma once

#include <type_traits>

#include "common/wgmma.cuh"
#include "gemm_w4a16/sm90_block.cuh"

// SCALING: any but SUMS.
template <typename T, int BITS, Scaling SCALING>
struct ScaledFragments {
  GroupParameters parameters;
  Fragments<T, BITS> fragments;

  __device__ __forceinline__ explicit ScaledFragments(const GroupParameters& p) : parameters(p), fragments(of(p)) {}
  static __device__ __forceinline__ Fragments<T, BITS> of(const GroupParameters& p) {
    if constexpr (SCALING == Scaling::FUSED) {
      return Fragments<T, BITS>::scaled(p);
    } else {
      return Fragments<T, BITS>(p);
    }
  }
  template <int HALF>
  __device__ __forceinline__ void make(const CodeTile<T, BITS>& codes, uint32_t (&a)[4]) const {
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
template <typename T, int BITS, Scaling SCALING, int STEPS>
struct ScaledWay {
  static constexpr Scaling scaling = SCALING;
  static constexpr int steps = STEPS;
  static constexpr float rest = 1 / (SCALING == Scaling::FUSED ? Fragments<bf16, BITS>::SCALED_UNIT : Fragments<T, BITS>::UNIT);
};

// Of ROOMY kernels, with registers for parameters that hold for long.
template <typename T, int BITS, bool ROOMY, typename F>
__device__ __forceinline__ void by_scaling(const GemmW4A16Sm90Args& args, F run) {
  if constexpr (std::is_same<T, bf16>::value) {
    const bool exact_offset = args.has_zero_points == 0 && (args.w_zero_point & (args.w_zero_point - 1)) == 0;
    if (args.low_scales == 0 && args.groups == 1 && exact_offset) return run(ScaledWay<T, BITS, Scaling::FUSED, 8>());
  }
  if (args.low_scales != 0) {
    run(ScaledWay<T, BITS, Scaling::TWO_PARTS, 2>());
  } else if (ROOMY && args.groups == 1) {
    run(ScaledWay<T, BITS, Scaling::ONE_PART, 8>());
  } else {
    run(ScaledWay<T, BITS, Scaling::ONE_PART, 2>());
  }
}

// Adds the products of one stage to `acc`, those of the last sixteen columns still under way at the end; `onto` is false for the
// first of a tile; `x` describes the first box. The next fragments are made while the tensor cores work on these, by turns in `a`.
// `previous_done` is called once the products of the stage before have ended.
template <typename Way, typename T, int BITS, int TOKENS, typename F>
__device__ __forceinline__ void multiply_stage(const GemmW4A16Sm90Args& args, const WeightBlock<T, BITS>& block, uint64_t x,
                                               bool onto, uint32_t (&a)[2][4], float (&acc)[TOKENS / 2],
                                               F previous_done) {
  constexpr uint64_t BOX = TOKENS * 128 / 16;  // in units of a descriptor's address
  CodeTile<T, BITS> codes[4];
#pragma unroll
  for (int first = 0; first < 8; first += Way::steps) {
    const ScaledFragments<T, BITS, Way::scaling> group(
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
