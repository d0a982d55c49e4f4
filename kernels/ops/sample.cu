// One token from each row of logits, the same as the CPU's for the same logits: all that decides is integers or single operations of
// IEEE arithmetic, so no order of sums shows.
//
// Computes   per row: the best logit; (x - best) / temperature; candidates at or above `floor` (min-p); of these the top_k best; of these
//            the fewest best whose mass is top_p of it; then the first in order of ids at which the cumulative mass exceeds the part of it
//            that `draw` says. Ties go to the lower id. Temperature 0: the best. A candidate's mass is 2^40 times its exponential as an
//            integer (`mass_of`), so that masses add up exactly.
// Shapes     SampleArgs; a row of `mask` has a bit for each id that is allowed.
// Grid       a block a row. A threshold is found four bits at a time: counts (or masses) of keys from each of sixteen on.
// Shared     16 bins for each thread.
// Source     sampling by inversion; radix selection.

#include <math_constants.h>

#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "ops/abi.h"

constexpr int THREADS = LOWBIT_SAMPLE_THREADS, BINS = 16;
static_assert(LOWBIT_SAMPLE_SHARED == THREADS * BINS * 8);

// 2^40 exp(d), d <= 0, every operation rounded on its own as the CPU rounds it.
__device__ __forceinline__ uint64_t mass_of(float d) {
  const float t = __fmul_rn(d, 0x1.715476p+0f), n = floorf(t), f = __fsub_rn(t, n);
  float p = 0x1.d52662p-10f;
  p = __fadd_rn(__fmul_rn(p, f), 0x1.2d5c5ep-7f);
  p = __fadd_rn(__fmul_rn(p, f), 0x1.c7f4aep-5f);
  p = __fadd_rn(__fmul_rn(p, f), 0x1.ebf194p-3f);
  p = __fadd_rn(__fmul_rn(p, f), 0x1.62e43ep-1f);
  p = __fadd_rn(__fmul_rn(p, f), 1.0f);
  return n < -62.0f ? 0 : static_cast<uint64_t>(__fmul_rn(p, 0x1p40f)) >> static_cast<int>(-n);
}

// Orders as d <= 0 does.
__device__ __forceinline__ uint32_t key_of(float d) { return d == 0.0f ? 0x80000000u : ~__float_as_uint(d); }

struct Row {
  const float* logits;
  const uint32_t* mask;  // null: all are allowed
  uint32_t vocab;
  float best, temperature, floor;

  __device__ __forceinline__ float logit(uint32_t id) const {
    return mask == nullptr || (mask[id / 32] >> (id % 32) & 1) != 0 ? logits[id] : -CUDART_INF_F;
  }
  // False where the id is no candidate.
  __device__ __forceinline__ bool candidate(uint32_t id, float& d) const {
    const float x = logit(id);
    d = __fdiv_rn(__fsub_rn(x, best), temperature);
    return x > -CUDART_INF_F && d >= floor;
  }
};

// What is taken: keys above `key`, and of those equal to it the first `ties` in order of ids.
struct Threshold {
  uint32_t key, ties;
};

// The largest key from which on counts (or masses) of candidates taken by `within` are at least `wanted`.
template <bool MASS, typename Enough>
__device__ uint32_t find_key(const Row& row, const Threshold& within, uint64_t* bins, Enough enough) {
  __shared__ uint32_t chosen;
  uint32_t low = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
#pragma unroll
    for (int i = 0; i < BINS; ++i) bins[i * THREADS + threadIdx.x] = 0;
    for (uint32_t id = threadIdx.x; id < row.vocab; id += THREADS) {
      float d;
      if (!row.candidate(id, d)) continue;
      const uint32_t key = key_of(d);
      if (key < within.key || key < low) continue;
      bins[min((key - low) >> shift, 15u) * THREADS + threadIdx.x] += MASS ? mass_of(d) : 1;
    }
    __syncthreads();
    // Each warp sums up some of the bins.
    for (int i = threadIdx.x / WARP_SIZE; i < BINS; i += THREADS / WARP_SIZE) {
      uint64_t sum = 0;
      for (int j = threadIdx.x % WARP_SIZE; j < THREADS; j += WARP_SIZE) sum += bins[i * THREADS + j];
      sum = warp_reduce(sum, Sum());
      __syncwarp();
      if (threadIdx.x % WARP_SIZE == 0) bins[i * THREADS] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t from = 0;
      int i = BINS - 1;
      for (; i > 0; --i) {
        from += bins[i * THREADS];
        if (enough(from)) break;
      }
      chosen = low | static_cast<uint32_t>(i) << shift;
    }
    __syncthreads();
    low = chosen;
  }
  return low;
}

// Count and mass of candidates above a key, and how many are equal to it.
struct Above {
  uint64_t count, mass, equal;
};
__device__ Above above(const Row& row, uint32_t key, uint64_t* bins) {
  Above sum = {0, 0, 0};
  for (uint32_t id = threadIdx.x; id < row.vocab; id += THREADS) {
    float d;
    if (!row.candidate(id, d)) continue;
    const uint32_t of = key_of(d);
    if (of > key) ++sum.count, sum.mass += mass_of(d);
    if (of == key) ++sum.equal;
  }
  sum.count = block_reduce(sum.count, uint64_t{0}, Sum());
  sum.mass = block_reduce(sum.mass, uint64_t{0}, Sum());
  sum.equal = block_reduce(sum.equal, uint64_t{0}, Sum());
  return sum;
}

// The mass of a key.
__device__ __forceinline__ uint64_t key_mass(uint32_t key) { return mass_of(key == 0x80000000u ? 0.0f : __uint_as_float(~key)); }

// Ids whose cumulative mass, over a warp's contiguous part of the row, and then within it, passes `target`.
__device__ uint32_t draw(const Row& row, const Threshold& taken, uint64_t target, uint64_t* shared) {
  constexpr uint32_t WARPS = THREADS / WARP_SIZE;
  const uint32_t warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const uint32_t part = (row.vocab + WARPS * WARP_SIZE - 1) / (WARPS * WARP_SIZE) * WARP_SIZE;
  const uint32_t begin = min(warp * part, row.vocab), end = min(begin + part, row.vocab);
  uint64_t* masses = shared;                // of each warp's part, those equal to the key left out
  uint64_t* equals = shared + WARPS;        // how many of these
  __shared__ uint32_t result;
  uint64_t mass = 0, equal = 0;
  for (uint32_t id = begin + lane; id < end; id += WARP_SIZE) {
    float d;
    if (!row.candidate(id, d)) continue;
    const uint32_t key = key_of(d);
    if (key > taken.key) mass += mass_of(d);
    if (key == taken.key) ++equal;
  }
  mass = warp_reduce(mass, Sum()), equal = warp_reduce(equal, Sum());
  if (lane == 0) masses[warp] = mass, equals[warp] = equal;
  if (threadIdx.x == 0) result = UINT32_MAX;
  __syncthreads();
  uint64_t before = 0, ties = 0;  // mass and ties of the parts before this one
  const uint64_t of_tie = key_mass(taken.key);
  for (uint32_t w = 0; w < warp; ++w) {
    const uint64_t here = min(equals[w], taken.ties - min(ties, static_cast<uint64_t>(taken.ties)));
    before += masses[w] + here * of_tie;
    ties += equals[w];
  }
  const uint64_t here = min(equal, taken.ties - min(ties, static_cast<uint64_t>(taken.ties)));
  if (target < before || target >= before + mass + here * of_tie) {
    __syncthreads();
    return result;
  }
  for (uint32_t first = begin; first < end; first += WARP_SIZE) {
    const uint32_t id = first + lane;
    float d = 0.0f;
    const bool is_candidate = id < end && row.candidate(id, d);
    const uint32_t key = is_candidate ? key_of(d) : 0;
    const bool is_tie = is_candidate && key == taken.key;
    const uint32_t tie_lanes = __ballot_sync(0xffffffffu, is_tie);
    const uint64_t rank = ties + __popc(tie_lanes & ((1u << lane) - 1));
    uint64_t sum = is_candidate && (key > taken.key || (is_tie && rank < taken.ties)) ? mass_of(d) : 0;
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    const uint32_t passed = __ballot_sync(0xffffffffu, before + sum > target);
    if (passed != 0) {
      if (lane == 0) result = first + __ffs(passed) - 1;
      break;
    }
    before += __shfl_sync(0xffffffffu, sum, WARP_SIZE - 1);
    ties += __popc(tie_lanes);
  }
  __syncthreads();
  return result;
}

struct Best {
  float logit;
  uint32_t id;
  __device__ friend bool operator>(const Best& a, const Best& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }
};

extern "C" __global__ void __launch_bounds__(THREADS) sample(const __grid_constant__ SampleArgs args) {
  overlap();
  extern __shared__ __align__(16) uint64_t bins[];
  __shared__ Best of_warp[THREADS / WARP_SIZE];
  const SampleRowArgs of = args.rows[blockIdx.x];
  Row row = {args.logits + static_cast<size_t>(blockIdx.x) * args.vocab,
             of.mask == UINT32_MAX ? nullptr : args.masks + static_cast<size_t>(of.mask) * ((args.vocab + 31) / 32), args.vocab, 0.0f,
             of.temperature, of.floor};
  Best best = {-CUDART_INF_F, UINT32_MAX};
  int broken = 0;
  for (uint32_t id = threadIdx.x; id < args.vocab; id += THREADS) {
    broken |= row.logits[id] != row.logits[id] || row.logits[id] == CUDART_INF_F;
    const Best other = {row.logit(id), id};
    if (other > best && other.logit > -CUDART_INF_F) best = other;
  }
#pragma unroll
  for (int lane = WARP_SIZE / 2; lane > 0; lane /= 2) {
    const Best other = {__shfl_xor_sync(0xffffffffu, best.logit, lane), __shfl_xor_sync(0xffffffffu, best.id, lane)};
    if (other > best) best = other;
  }
  if (threadIdx.x % WARP_SIZE == 0) of_warp[threadIdx.x / WARP_SIZE] = best;
  broken = __syncthreads_or(broken);
  for (const Best& other : of_warp) {
    if (other > best) best = other;
  }
  if (broken || best.id == UINT32_MAX || of.temperature == 0.0f) {
    if (threadIdx.x == 0) args.ids[blockIdx.x] = broken ? LOWBIT_SAMPLE_NOT_FINITE : best.id == UINT32_MAX ? LOWBIT_SAMPLE_NONE : best.id;
    return;
  }
  row.best = best.logit;

  Threshold taken = {0, UINT32_MAX};
  if (of.top_k != 0) {
    const Above all = above(row, 0, bins);
    if (of.top_k < all.count) {
      const uint64_t k = of.top_k;
      taken.key = find_key<false>(row, taken, bins, [&](uint64_t count) { return count >= k; });
      taken.ties = static_cast<uint32_t>(k - above(row, taken.key, bins).count);
    }
  }
  uint64_t total;
  {
    const Above of_taken = above(row, taken.key, bins);
    total = of_taken.mass + min(of_taken.equal, static_cast<uint64_t>(taken.ties)) * key_mass(taken.key);
  }
  if (of.top_p < 1.0f) {
    const double wanted = static_cast<double>(of.top_p) * static_cast<double>(total);
    const auto enough = [&](uint64_t mass) { return static_cast<double>(mass) >= wanted; };
    const uint32_t key = find_key<true>(row, taken, bins, enough);
    const Above of_key = above(row, key, bins);
    // Ties at the lower threshold are fewer than there are where top-k has cut them, but never fewer than are needed.
    uint64_t ties = 0;
    const uint64_t each = key_mass(key), most = key == taken.key ? min(of_key.equal, static_cast<uint64_t>(taken.ties)) : of_key.equal;
    uint64_t low = 0, high = most;  // the least number of ties that is enough
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      if (enough(of_key.mass + middle * each)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    ties = low;
    taken = {key, static_cast<uint32_t>(min(ties, static_cast<uint64_t>(UINT32_MAX)))};
    total = of_key.mass + ties * each;
  }
  const uint64_t target = __umul64hi(of.draw, total);
  const uint32_t id = draw(row, taken, target, bins);
  if (threadIdx.x == 0) args.ids[blockIdx.x] = id;
}
