// One token from each row of logits, the same as the CPU's for the same logits: all that decides is integers or single operations of
// IEEE arithmetic, so no order of sums shows.
//
// Computes   per row: the best logit; (x - best) / temperature; candidates at or above `floor` (min-p); of these the top_k best; of these
//            the fewest best whose mass is top_p of it; then the first in order of ids at which the cumulative mass exceeds the part of it
//            that `draw` says. Ties go to the lower id. Temperature 0: the best. A candidate's mass is 2^40 times its exponential as an
//            integer (`mass_of`), so that masses add up exactly.
// Shapes     SampleArgs; a row of `mask` has a bit for each id that is allowed.
// Grid       a block a row. Thresholds of keys and of ids are found four bits at a time, from counts (or masses) of what is at or above each
//            of sixteen values.
// Shared     16 bins for each thread, then a list of candidates near the best, of the widest of LEVELS that has room: where what is asked
//            for is among them, as nearly always, the row itself is read three times only. All tokens are drawn by way of masses of PART ids.
// Source     sampling by inversion; radix selection.

#include <math_constants.h>

#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "ops/abi.h"

constexpr int THREADS = LOWBIT_SAMPLE_THREADS, BINS = 16;
constexpr uint32_t LISTED = 3072;  // most candidates in shared memory
constexpr int LEVELS = 12;         // how near they may have to be to the best: numbers of at least -16, -8, -4, ..., -2^-7
constexpr int AT_ONCE = 4;         // logits that a thread asks for at a time
constexpr uint32_t PART = THREADS * AT_ONCE, PARTS = BINS * THREADS;  // ids that share a mass, and most parts of a row
static_assert(PART <= LISTED && LOWBIT_SAMPLE_SHARED == THREADS * BINS * 8 + LISTED * 8);

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
__device__ __forceinline__ float number_of(uint32_t key) { return key == 0x80000000u ? 0.0f : __uint_as_float(~key); }

struct Candidate {
  uint32_t key, id;
  __device__ __forceinline__ uint64_t mass() const { return mass_of(number_of(key)); }
};

// What is taken: keys above `key`, and of those equal to it ids up to `last`.
struct Taken {
  uint32_t key, last;
  __device__ __forceinline__ bool has(const Candidate& c) const { return c.key > key || (c.key == key && c.id <= last); }
};

// All of a row, or those that are listed.
struct Candidates {
  const float* logits;
  const uint32_t* mask;  // null: all are allowed
  uint32_t vocab;
  float best, temperature, floor;
  const Candidate* list;
  uint32_t listed;  // 0: the row is read

  __device__ __forceinline__ float allowed(uint32_t id, float x) const {
    return mask == nullptr || (mask[id / 32] >> (id % 32) & 1) != 0 ? x : -CUDART_INF_F;
  }
  __device__ __forceinline__ float number(float x) const { return __fdiv_rn(__fsub_rn(x, best), temperature); }
  // Calls `visit(id, logit)` for this thread's share of the row.
  template <typename Visit>
  __device__ __forceinline__ void each_logit(Visit visit) const {
    for (uint32_t first = threadIdx.x; first < vocab; first += THREADS * AT_ONCE) {
      float x[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) x[i] = first + i * THREADS < vocab ? __ldcg(logits + first + i * THREADS) : 0.0f;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (first + i * THREADS < vocab) visit(first + i * THREADS, x[i]);
      }
    }
  }
  // The candidate of an id, where it is one.
  template <typename Visit>
  __device__ __forceinline__ void if_candidate(uint32_t id, float logit, Visit visit) const {
    const float x = allowed(id, logit), d = number(x);
    if (x > -CUDART_INF_F && d >= floor) visit(Candidate{key_of(d), id});
  }
  // Calls `visit(candidate)` for this thread's share of the candidates.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    if (listed != 0) {
      for (uint32_t i = threadIdx.x; i < listed; i += THREADS) visit(list[i]);
      return;
    }
    each_logit([&](uint32_t id, float logit) { if_candidate(id, logit, visit); });
  }
};

// The largest value `v` such that what `measure` gives for all candidates whose `value` is at least `v` is `enough`; candidates for which
// `measure` gives 0 do not matter. Values differ in their lower `bits` alone, a multiple of 4; the others are ones.
template <typename Value, typename Measure, typename Enough>
__device__ uint32_t find(const Candidates& candidates, uint64_t* bins, int bits, Value value, Measure measure, Enough enough) {
  __shared__ uint32_t chosen;
  uint32_t low = bits == 32 ? 0 : ~((1u << bits) - 1);
  for (int shift = bits - 4; shift >= 0; shift -= 4) {
#pragma unroll
    for (int i = 0; i < BINS; ++i) bins[i * THREADS + threadIdx.x] = 0;
    candidates.each([&](const Candidate& c) {
      const uint32_t v = value(c);
      if (v >= low) bins[min((v - low) >> shift, 15u) * THREADS + threadIdx.x] += measure(c);
    });
    __syncthreads();
    // A warp sums up a bin.
    static_assert(THREADS / WARP_SIZE == BINS);
    const uint32_t bin = threadIdx.x / WARP_SIZE * THREADS;
    uint64_t sum = 0;
#pragma unroll
    for (int j = 0; j < THREADS; j += WARP_SIZE) sum += bins[bin + j + threadIdx.x % WARP_SIZE];
    sum = warp_reduce(sum, Sum());
    __syncwarp();
    if (threadIdx.x % WARP_SIZE == 0) bins[bin] = sum;
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

// The same of keys, and of ids counted from above.
template <typename Measure, typename Enough>
__device__ uint32_t find_key(const Candidates& candidates, uint64_t* bins, Measure measure, Enough enough) {
  return find(candidates, bins, 32, [](const Candidate& c) { return c.key; }, measure, enough);
}
template <typename Measure, typename Enough>
__device__ uint32_t find_last_id(const Candidates& candidates, uint64_t* bins, Measure measure, Enough enough) {
  const int bits = (32 - __clz(candidates.vocab) + 3) / 4 * 4;
  return ~find(candidates, bins, bits, [](const Candidate& c) { return ~c.id; }, measure, enough);
}

// The sum over the candidates.
template <typename Measure>
__device__ uint64_t total_of(const Candidates& candidates, Measure measure) {
  uint64_t sum = 0;
  candidates.each([&](const Candidate& c) { sum += measure(c); });
  return block_reduce(sum, uint64_t{0}, Sum());
}

// Takes of the candidates equal to `key` so many, the lowest ids.
__device__ Taken take(const Candidates& candidates, uint64_t* bins, uint32_t key, uint64_t count) {
  const auto is_tie = [&](const Candidate& c) { return static_cast<uint64_t>(c.key == key); };
  if (total_of(candidates, is_tie) <= count) return {key, UINT32_MAX};
  // The least id up to which there are so many: of ids counted from above, the largest.
  return {key, find_last_id(candidates, bins, is_tie, [&](uint64_t n) { return n >= count; })};
}

struct Best {
  float logit;
  uint32_t id;
  __device__ friend bool operator>(const Best& a, const Best& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }
};

extern "C" __global__ void __launch_bounds__(THREADS) sample(const __grid_constant__ SampleArgs args) {
  overlap();
  extern __shared__ __align__(16) uint64_t bins[];
  Candidate* list = reinterpret_cast<Candidate*>(bins + THREADS * BINS);
  __shared__ Best of_warp[THREADS / WARP_SIZE];
  __shared__ uint32_t near_count;
  const SampleRowArgs of = args.rows[blockIdx.x];
  Candidates candidates = {args.logits + static_cast<size_t>(blockIdx.x) * args.vocab,
                           of.mask == UINT32_MAX ? nullptr : args.masks + static_cast<size_t>(of.mask) * ((args.vocab + 31) / 32),
                           args.vocab, 0.0f, of.temperature, of.floor, list, 0};
  Best best = {-CUDART_INF_F, UINT32_MAX};
  int broken = 0;
  candidates.each_logit([&](uint32_t id, float x) {
    broken |= x != x || x == CUDART_INF_F;
    const Best other = {candidates.allowed(id, x), id};
    if (other > best && other.logit > -CUDART_INF_F) best = other;
  });
#pragma unroll
  for (int lane = WARP_SIZE / 2; lane > 0; lane /= 2) {
    const Best other = {__shfl_xor_sync(0xffffffffu, best.logit, lane), __shfl_xor_sync(0xffffffffu, best.id, lane)};
    if (other > best) best = other;
  }
  if (threadIdx.x % WARP_SIZE == 0) of_warp[threadIdx.x / WARP_SIZE] = best;
  if (threadIdx.x == 0) near_count = 0;
  broken = __syncthreads_or(broken);
  for (const Best& other : of_warp) {
    if (other > best) best = other;
  }
  if (broken || best.id == UINT32_MAX || of.temperature == 0.0f) {
    if (threadIdx.x == 0) args.ids[blockIdx.x] = broken ? LOWBIT_SAMPLE_NOT_FINITE : best.id == UINT32_MAX ? LOWBIT_SAMPLE_NONE : best.id;
    return;
  }
  candidates.best = best.logit;

  // How many are near the best, by level: those whose number is that or more, and some more whose logit could be that of one, so that
  // numbers are made of few. What is listed is decided by numbers: equal ones must not be parted.
  uint32_t counts[LEVELS] = {};
  const auto least_number = [](int level) { return -ldexpf(16.0f, -level); };
  const auto level_of = [&](int level) {
    return fmaf(least_number(level) * 1.001f, of.temperature, best.logit) - fabsf(best.logit) * 0x1p-21f;
  };
  candidates.each_logit([&](uint32_t id, float x) {
    if (!(x >= level_of(0))) return;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) counts[level] += x >= level_of(level);
  });
  int level = LEVELS;
#pragma unroll
  for (int i = LEVELS - 1; i >= 0; --i) {
    if (block_reduce(counts[i], 0u, Sum()) <= LISTED) level = i;
  }
  if (level < LEVELS) {
    const float least = level_of(level);
    candidates.each_logit([&](uint32_t id, float x) {
      if (!(x >= least)) return;
      candidates.if_candidate(id, x, [&](const Candidate& c) {
        if (number_of(c.key) >= least_number(level)) list[atomicAdd(&near_count, 1)] = c;
      });
    });
    __syncthreads();
  }
  const uint32_t listed = level < LEVELS ? near_count : 0;

  uint64_t total = 0;
  const auto part = [&](uint64_t of_all) { return static_cast<double>(of.top_p) * static_cast<double>(of_all); };
  if (of.top_k != 0) {
    // The list has the top_k best where it has so many. (Where there are no more in all, it does not matter which are said to be cut.)
    if (of.top_k <= listed) candidates.listed = listed;
  } else {
    // The mass of all, by parts.
    const bool has_parts = args.vocab <= PART * static_cast<uint64_t>(PARTS);
    const uint32_t parts = has_parts ? (args.vocab + PART - 1) / PART : 0;
    for (uint32_t i = threadIdx.x; i < parts; i += THREADS) bins[i] = 0;
    __syncthreads();
    uint64_t mass = 0, of_part = 0;
    uint32_t current = 0;
    const auto flush = [&](uint32_t next) {
      if (next == current) return;
      if (has_parts && of_part != 0) atomicAdd(reinterpret_cast<unsigned long long*>(bins + current), of_part);
      mass += of_part, of_part = 0, current = next;
    };
    candidates.each([&](const Candidate& c) {
      flush(c.id / PART);
      of_part += c.mass();
    });
    flush(UINT32_MAX);
    total = block_reduce(mass, uint64_t{0}, Sum());  // synchronizes
    if (of.top_p < 1.0f) {
      candidates.listed = listed;
      const uint64_t near_mass = listed == 0 ? 0 : total_of(candidates, [](const Candidate& c) { return c.mass(); });
      if (static_cast<double>(near_mass) < part(total)) candidates.listed = 0;
    } else if (has_parts) {
      // The part in which the mass passes the target, and in it the id.
      __shared__ uint32_t which;
      __shared__ uint64_t before;
      const uint64_t target = __umul64hi(of.draw, total);
      if (threadIdx.x == 0) {
        uint64_t passed = 0;
        uint32_t i = 0;
        for (; i + 1 < parts && passed + bins[i] <= target; ++i) passed += bins[i];
        which = i, before = passed, near_count = 0;
      }
      __syncthreads();
      const uint64_t rest = target - before;
      const uint32_t first = which * PART, end = min(first + PART, args.vocab);
      for (uint32_t id = first + threadIdx.x; id < end; id += THREADS) {
        candidates.if_candidate(id, candidates.logits[id], [&](const Candidate& c) { list[atomicAdd(&near_count, 1)] = c; });
      }
      __syncthreads();
      candidates.listed = near_count;
      const uint32_t id =
          find_last_id(candidates, bins, [](const Candidate& c) { return c.mass(); }, [&](uint64_t m) { return m > rest; });
      if (threadIdx.x == 0) args.ids[blockIdx.x] = id;
      return;
    }
  }

  Taken taken = {0, UINT32_MAX};
  if (of.top_k != 0) {
    const uint64_t k = of.top_k;
    const auto one = [](const Candidate&) { return uint64_t{1}; };
    if (total_of(candidates, one) > k) {
      const uint32_t key = find_key(candidates, bins, one, [&](uint64_t n) { return n >= k; });
      const uint64_t above = total_of(candidates, [&](const Candidate& c) { return static_cast<uint64_t>(c.key > key); });
      taken = take(candidates, bins, key, k - above);
    }
    total = total_of(candidates, [&](const Candidate& c) { return taken.has(c) ? c.mass() : 0; });
  }
  if (of.top_p < 1.0f) {
    const double wanted = part(total);
    const auto enough = [&](uint64_t m) { return static_cast<double>(m) >= wanted; };
    const auto of_taken = [&](const Candidate& c) { return taken.has(c) ? c.mass() : 0; };
    const uint32_t key = find_key(candidates, bins, of_taken, enough);
    const uint64_t above = total_of(candidates, [&](const Candidate& c) { return c.key > key ? of_taken(c) : 0; });
    const uint64_t ties = total_of(candidates, [&](const Candidate& c) { return static_cast<uint64_t>(c.key == key && taken.has(c)); });
    const uint64_t each = mass_of(number_of(key));
    uint64_t low = 0, high = ties;  // the least number of ties that is enough
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      if (enough(above + middle * each)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    // Where top-k cut among these ties, the lower ids are left of them as well.
    taken = take(candidates, bins, key, low);
    total = above + low * each;
  }
  // The least id up to which the mass exceeds the target.
  const uint64_t target = __umul64hi(of.draw, total);
  const uint32_t id = find_last_id(candidates, bins, [&](const Candidate& c) { return taken.has(c) ? c.mass() : 0; },
                                   [&](uint64_t m) { return m > target; });
  if (threadIdx.x == 0) args.ids[blockIdx.x] = id;
}
