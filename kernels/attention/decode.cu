// Attention of sequences with one query row over the paged cache: bound by reading keys and values, so each is read once
// for all query heads that share it, by as many blocks as fill the GPU.

#include "attention/flash.cuh"
#include "common/overlap.cuh"

template <int D_>
struct DecodeConfig {
  static constexpr int D = D_;
  static constexpr int WARPS = D <= 128 ? 4 : 2;
  static constexpr int STAGES = 2;  // with three blocks on an SM, 100 KB are under way
  static constexpr int KEYS = 16;   // of a warp's tile
  static constexpr int THREADS = WARPS * WARP_SIZE;
  static constexpr uint32_t SHARED_BYTES = WARPS * STAGES * 2 * TILE_BYTES<D, KEYS>;
};
static_assert(DecodeConfig<64>::SHARED_BYTES == LOWBIT_DECODE_SHARED_64);
static_assert(DecodeConfig<128>::SHARED_BYTES == LOWBIT_DECODE_SHARED_128);
static_assert(DecodeConfig<256>::SHARED_BYTES == LOWBIT_DECODE_SHARED_256);

// Up to sixteen query heads that share a KV head, of one sequence.
struct HeadGroup {
  uint32_t sequence, kv_head, head, count;  // first query head and how many

  __device__ HeadGroup(const AttentionArgs& args, uint32_t sequence, uint32_t group) : sequence(sequence) {
    const uint32_t heads_per_kv = args.num_heads / args.num_kv_heads, groups = (heads_per_kv + 15) / 16;
    kv_head = group / groups;
    const uint32_t first = group % groups * 16;
    head = kv_head * heads_per_kv + first;
    count = min(heads_per_kv - first, 16u);
  }
};

// The part's unnormalized sum of values, then its largest score (in powers of two) and its sum of exponentials.
__device__ __forceinline__ float* partial_of(const AttentionArgs& args, uint32_t item, uint32_t head) {
  return args.partials + (static_cast<size_t>(item) * args.num_heads + head) * (args.head_dim + LOWBIT_DECODE_PARTIAL_PAD);
}

// Adds up the parts of a sequence, items `first` to `first + parts`, in this order: what the last of its blocks does. The way to L2 and
// back is what takes time: a first one for all stats, from which come the parts' weights, [heads, parts] in shared memory; then values,
// sixteen parts at a time.
template <typename T, int THREADS>
__device__ void merge(const AttentionArgs& args, const HeadGroup& heads, uint32_t row, uint32_t first, uint32_t parts, float* weights) {
  const uint32_t d = args.head_dim, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  for (uint32_t h = warp; h < heads.count; h += THREADS / WARP_SIZE) {
    const auto stats_of = [&](uint32_t part) {
      return __ldcg(reinterpret_cast<const float2*>(partial_of(args, first + part, heads.head + h) + d));
    };
    // Those of a lane's first part stay in registers: most sequences have no more.
    const float2 mine = lane < parts ? stats_of(lane) : make_float2(-CUDART_INF_F, 0.0f);
    float max = mine.x;
    for (uint32_t part = lane + WARP_SIZE; part < parts; part += WARP_SIZE) max = fmaxf(max, stats_of(part).x);
    max = warp_reduce(max, Max());
    const float base = max == -CUDART_INF_F ? 0.0f : max;
    float sum = mine.y * exp2_approx(mine.x - base);
    for (uint32_t part = lane + WARP_SIZE; part < parts; part += WARP_SIZE) {
      const float2 stats = stats_of(part);
      sum = fmaf(stats.y, exp2_approx(stats.x - base), sum);
    }
    sum = warp_reduce(sum, Sum());
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (lane < parts) weights[h * parts + lane] = exp2_approx(mine.x - base) * inverse;
    for (uint32_t part = lane + WARP_SIZE; part < parts; part += WARP_SIZE) {
      weights[h * parts + part] = exp2_approx(stats_of(part).x - base) * inverse;
    }
  }
  __syncthreads();
  const uint32_t columns = d / 4;
  for (uint32_t i = threadIdx.x; i < heads.count * columns; i += THREADS) {
    const uint32_t h = i / columns, column = i % columns * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 16
    for (uint32_t part = 0; part < parts; ++part) {
      const float4 value = __ldcg(reinterpret_cast<const float4*>(partial_of(args, first + part, heads.head + h) + column));
      const float weight = weights[h * parts + part];
      sum.x = fmaf(value.x, weight, sum.x), sum.y = fmaf(value.y, weight, sum.y);
      sum.z = fmaf(value.z, weight, sum.z), sum.w = fmaf(value.w, weight, sum.w);
    }
    T* out = static_cast<T*>(args.out) + (static_cast<size_t>(row) * args.num_heads + heads.head + h) * d + column;
    *reinterpret_cast<uint2*>(out) = make_uint2(pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w));
  }
}

// Sixteen query heads of one KV head against a part of its keys.
//
// Computes   as attention_prefill for the one row of a sequence.
// Grid       as many blocks as run at once; each takes every so manyth of (item, KV head * groups of 16 query heads), items as the
//            host cut them from all sequences' keys. The query heads are the rows of the warp's mma; each warp walks its own keys, 16
//            at a time, with its own pipeline and no barrier; the warps' results are merged at the end. Of a sequence in several items
//            the block that comes last merges the parts.
// Shared     WARPS * STAGES * two tiles, then WARPS * 16 * D floats in their place.
// Numerics   as attention_prefill; merging in the order of warps and items, so that it does not depend on who was last.
template <typename T, typename C>
__device__ void decode(const AttentionArgs& args, uint32_t index, const AttentionItem& item, const HeadGroup& heads, uint32_t group,
                       uint32_t groups) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float max_of[C::WARPS][16], sum_of[C::WARPS][16];
  __shared__ uint32_t arrived;
  constexpr int D = C::D;
  const uint32_t warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const uint32_t row = item.row;

  const PagedKv<T> kv(args, item.sequence, heads.kv_head, item.keys);
  const Visible visible = {max(item.begin, kv.end > args.window ? kv.end - args.window : 0), item.end};
  const Visible sees[2] = {visible, visible};
  const uint32_t begin = visible.first / C::KEYS, end = (item.end + C::KEYS - 1) / C::KEYS;  // in tiles
  const uint32_t address = shared_address(shared) + warp * C::STAGES * 2 * TILE_BYTES<D, C::KEYS>;
  auto load = [&](uint32_t tile, uint32_t stage) {
    const uint32_t k_tile = address + stage * 2 * TILE_BYTES<D, C::KEYS>;
    if (tile < end) {
      kv.template load<D, C::KEYS, WARP_SIZE>(k_tile, k_tile + TILE_BYTES<D, C::KEYS>, tile * C::KEYS, lane);
    }
    commit_copies();
  };

  WarpAttention<T, D> attention;
  uint32_t stage = 0, tile = begin + warp;
  load(tile, 0);

  const size_t q_stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  const T* q = static_cast<const T*>(args.qkv) + row * q_stride + static_cast<size_t>(heads.head) * args.head_dim;
  const uint32_t g = lane / 4;
  const QueryRows<T, D> queries(g < heads.count ? q + g * args.head_dim : nullptr,
                                g + 8 < heads.count ? q + (g + 8) * args.head_dim : nullptr, args.head_dim);

  for (; tile < end; tile += C::WARPS, stage ^= 1) {
    load(tile + C::WARPS, stage ^ 1);
    wait_copies<1>();
    __syncwarp();
    const uint32_t key = tile * C::KEYS, k_tile = address + stage * 2 * TILE_BYTES<D, C::KEYS>;
    const bool masked = key < visible.first || key + C::KEYS > visible.last;
    attention.template take<C::KEYS>(queries, k_tile, k_tile + TILE_BYTES<D, C::KEYS>, key, sees, masked, args.scale_log2);
    __syncwarp();
  }
  attention.finish();
  wait_copies<0>();
  __syncthreads();  // the tiles' memory now holds the warps' sums

  float* sums = reinterpret_cast<float*>(shared);  // [WARPS, 16, D]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (lane % 4 == 0) {
      max_of[warp][g + 8 * r] = attention.max[r];
      sum_of[warp][g + 8 * r] = attention.sum[r];
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      float2* at = reinterpret_cast<float2*>(sums + (warp * 16 + g + 8 * r) * D + 8 * i + lane % 4 * 2);
      *at = make_float2(attention.out[i][2 * r], attention.out[i][2 * r + 1]);
    }
  }
  __syncthreads();

  const uint32_t parts = item.parts;
  for (uint32_t i = threadIdx.x; i < heads.count * D; i += C::THREADS) {
    const uint32_t h = i / D, column = i % D;
    if (column >= args.head_dim) continue;
    float max = -CUDART_INF_F, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < C::WARPS; ++w) max = fmaxf(max, max_of[w][h]);
    const float base = max == -CUDART_INF_F ? 0.0f : max;
#pragma unroll
    for (int w = 0; w < C::WARPS; ++w) {
      const float weight = exp2_approx(max_of[w][h] - base);
      sum = fmaf(sum_of[w][h], weight, sum);
      value = fmaf(sums[(w * 16 + h) * D + column], weight, value);
    }
    if (parts == 1) {
      T* out = static_cast<T*>(args.out) + (static_cast<size_t>(row) * args.num_heads + heads.head + h) * args.head_dim;
      out[column] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
    } else {
      float* partial = partial_of(args, index, heads.head + h);
      __stcg(partial + column, value);
      if (column == 0) __stcg(reinterpret_cast<float2*>(partial + args.head_dim), make_float2(max, sum));
    }
  }
  if (parts == 1) return;
  // The block's writes come before its arrival, and all arrivals before what the last block reads: a release and an acquire by one
  // thread, which the barriers carry to the others.
  __syncthreads();
  uint32_t* counter = args.counters + item.sequence * groups + group;
  if (threadIdx.x == 0) {
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter) : "memory");
    if (arrived == parts - 1) *counter = 0;
  }
  __syncthreads();
  if (arrived != parts - 1) return;
  merge<T, C::THREADS>(args, heads, row, index - item.part, parts, sums);
}

template <typename T, typename C>
__device__ void decode_items(const AttentionArgs& args) {
  const uint32_t groups = args.num_kv_heads * ((args.num_heads / args.num_kv_heads + 15) / 16);
  for (uint32_t i = blockIdx.x;; i += gridDim.x) {
    // Fetched together: whether there is such an item, and what it is. There is room for one more than there can be.
    const uint32_t index = i / groups, group = i % groups;
    const uint4* words = reinterpret_cast<const uint4*>(args.items + min(index, args.most_items));
    const uint4 low = words[0], high = words[1];
    if (index >= args.header[0]) return;
    const AttentionItem item = {low.x, low.y, low.z, low.w, high.x, high.y, high.z};
    decode<T, C>(args, index, item, HeadGroup(args, item.sequence, group), group, groups);
    __syncthreads();  // shared memory is free for the next
  }
}

#define DECODE(T, D)                                                              \
  extern "C" __global__ void __launch_bounds__(DecodeConfig<D>::THREADS)          \
      attention_decode_##D##_##T(const __grid_constant__ AttentionArgs args) {    \
    overlap();                                                                    \
    decode_items<T, DecodeConfig<D>>(args);                                       \
  }
DECODE(f16, 64)
DECODE(f16, 128)
DECODE(f16, 256)
DECODE(bf16, 64)
DECODE(bf16, 128)
DECODE(bf16, 256)
