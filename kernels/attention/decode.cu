// Attention of one query row per sequence over the paged cache: bound by reading keys and values, so each is read once
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

// Sixteen query heads of one KV head against a part of its keys.
//
// Computes   as attention_prefill for the one row of each sequence. With splits = 1 the result; else for every split its
//            unnormalized sum of values, largest score (in powers of two) and sum of exponentials, for
//            attention_combine.
// Grid       (splits, KV heads * groups of 16 query heads, sequences). The query heads are the rows of the warp's mma;
//            each warp walks its own keys, 16 at a time, with its own pipeline and no barrier; the warps' results are
//            merged at the end. A split takes an equal part of its own sequence's keys.
// Shared     WARPS * STAGES * two tiles, then WARPS * 16 * D floats in their place.
// Numerics   as attention_prefill; merging in the order of warps and splits.
template <typename T, typename C>
__device__ void decode(const AttentionArgs& args) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float max_of[C::WARPS][16], sum_of[C::WARPS][16];
  constexpr int D = C::D;
  const uint32_t sequence = blockIdx.z, split = blockIdx.x;
  const uint32_t warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  const uint32_t row = args.cu_seqlens_q[sequence];
  if (row == args.cu_seqlens_q[sequence + 1]) return;

  const uint32_t heads_per_kv = args.num_heads / args.num_kv_heads, groups = (heads_per_kv + 15) / 16;
  const uint32_t kv_head = blockIdx.y / groups, first = blockIdx.y % groups * 16;  // head of the group
  const uint32_t heads = min(heads_per_kv - first, 16u), head = kv_head * heads_per_kv + first;

  const PagedKv<T> kv(args, sequence, kv_head);
  const Visible visible = {kv.end > args.window ? kv.end - args.window : 0, kv.end};
  const Visible sees[2] = {visible, visible};
  const uint32_t begin = visible.first / C::KEYS, tiles = (kv.end + C::KEYS - 1) / C::KEYS - begin;
  const uint32_t share = (tiles + args.splits - 1) / args.splits;
  const uint32_t end = begin + min(tiles, (split + 1) * share);  // in tiles
  const uint32_t address = shared_address(shared) + warp * C::STAGES * 2 * TILE_BYTES<D, C::KEYS>;
  auto load = [&](uint32_t tile, uint32_t stage) {
    const uint32_t k_tile = address + stage * 2 * TILE_BYTES<D, C::KEYS>;
    if (tile < end) {
      kv.template load<D, C::KEYS, WARP_SIZE>(k_tile, k_tile + TILE_BYTES<D, C::KEYS>, tile * C::KEYS, lane);
    }
    commit_copies();
  };

  WarpAttention<T, D> attention;
  uint32_t stage = 0, tile = begin + split * share + warp;
  load(tile, 0);

  const size_t q_stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  const T* q = static_cast<const T*>(args.qkv) + row * q_stride + static_cast<size_t>(head) * args.head_dim;
  const uint32_t g = lane / 4;
  const QueryRows<T, D> queries(g < heads ? q + g * args.head_dim : nullptr,
                                g + 8 < heads ? q + (g + 8) * args.head_dim : nullptr, args.head_dim);

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

  for (uint32_t i = threadIdx.x; i < heads * D; i += C::THREADS) {
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
    if (args.splits == 1) {
      T* out = static_cast<T*>(args.out) + (static_cast<size_t>(row) * args.num_heads + head + h) * args.head_dim;
      out[column] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
    } else {
      const size_t of_head = static_cast<size_t>(sequence) * args.num_heads + head + h;
      float* partial = args.partials + (of_head * args.splits + split) * (args.head_dim + 2);
      partial[column] = value;
      if (column == 0) partial[args.head_dim] = max, partial[args.head_dim + 1] = sum;
    }
  }
}

#define DECODE(T, D)                                                              \
  extern "C" __global__ void __launch_bounds__(DecodeConfig<D>::THREADS)          \
      attention_decode_##D##_##T(const __grid_constant__ AttentionArgs args) {    \
    overlap();                                                                    \
    decode<T, DecodeConfig<D>>(args);                                             \
  }
DECODE(f16, 64)
DECODE(f16, 128)
DECODE(f16, 256)
DECODE(bf16, 64)
DECODE(bf16, 128)
DECODE(bf16, 256)

// Merges the splits of attention_decode. Grid: (query heads, sequences); LOWBIT_COMBINE_GROUPS threads per column, each
// for every so manyth split: the loads are what takes time. Sums in a fixed order.
template <typename T>
__device__ void combine(const AttentionArgs& args) {
  __shared__ float weight[LOWBIT_DECODE_MAX_SPLITS];
  __shared__ float value_of[LOWBIT_COMBINE_GROUPS][256];  // the widest head
  const uint32_t head = blockIdx.x, sequence = blockIdx.y, d = args.head_dim;
  const uint32_t columns = blockDim.x / LOWBIT_COMBINE_GROUPS;
  const uint32_t column = threadIdx.x % columns, group = threadIdx.x / columns;
  const uint32_t row = args.cu_seqlens_q[sequence];
  if (row == args.cu_seqlens_q[sequence + 1]) return;
  const size_t of_head = static_cast<size_t>(sequence) * args.num_heads + head;
  const float* partials = args.partials + of_head * args.splits * (d + 2);

  // At most one split a thread: there are at least as many threads as splits.
  const bool has_split = threadIdx.x < args.splits;
  const float* mine = partials + threadIdx.x * (d + 2) + d;
  const float split_max = has_split ? mine[0] : -CUDART_INF_F, split_sum = has_split ? mine[1] : 0.0f;
  const float max = block_reduce(split_max, -CUDART_INF_F, Max());
  const float factor = exp2_approx(split_max - (max == -CUDART_INF_F ? 0.0f : max));
  if (has_split) weight[threadIdx.x] = factor;
  const float sum = block_reduce(split_sum * factor, 0.0f, Sum());  // synchronizes: all weights are written

  float value = 0.0f;
  if (column < d) {
#pragma unroll 8
    for (uint32_t s = group; s < args.splits; s += LOWBIT_COMBINE_GROUPS) {
      value = fmaf(partials[s * (d + 2) + column], weight[s], value);
    }
  }
  value_of[group][column] = value;
  __syncthreads();
  if (group != 0 || column >= d) return;
#pragma unroll
  for (int other = 1; other < LOWBIT_COMBINE_GROUPS; ++other) value += value_of[other][column];
  T* out = static_cast<T*>(args.out) + (static_cast<size_t>(row) * args.num_heads + head) * d;
  out[column] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
}

extern "C" __global__ void attention_combine_f16(const __grid_constant__ AttentionArgs args) {
  overlap();
  combine<f16>(args);
}
extern "C" __global__ void attention_combine_bf16(const __grid_constant__ AttentionArgs args) {
  overlap();
  combine<bf16>(args);
}
