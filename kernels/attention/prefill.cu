// Causal attention of a ragged batch over the paged cache, for sequences of any number of query rows; those of one row have a kernel of
// their own (decode.cu) unless the host says otherwise.

#include "attention/flash.cuh"
#include "common/overlap.cuh"

template <int D_>
struct PrefillConfig {
  static constexpr int D = D_;
  static constexpr int WARPS = 4;
  static constexpr int QUERIES = 16 * WARPS;       // rows of a block
  static constexpr int KEYS = D <= 128 ? 64 : 32;  // of a tile: two of them, twice, fit the 99 KB of sm_86
  static constexpr int THREADS = WARPS * WARP_SIZE;
  static constexpr uint32_t SHARED_BYTES = 4 * TILE_BYTES<D, KEYS>;
};
static_assert(PrefillConfig<64>::SHARED_BYTES == LOWBIT_PREFILL_SHARED_64);
static_assert(PrefillConfig<128>::SHARED_BYTES == LOWBIT_PREFILL_SHARED_128);
static_assert(PrefillConfig<256>::SHARED_BYTES == LOWBIT_PREFILL_SHARED_256);
static_assert(PrefillConfig<128>::QUERIES == LOWBIT_PREFILL_QUERIES);

// Computes   softmax(scale * q k^T, over the keys each row sees) v. Row i of a sequence's n rows is at position
//            context_len - n + i and sees keys up to it, the last `window` of them.
// Shapes     AttentionArgs; head_dim a multiple of 8, at most D.
// Grid       (tiles of 64 query rows, the last first since it has most keys; query heads; sequences). A warp owns 16
//            rows; the block shares two stages of keys and values.
// Numerics   scores and sums in f32, the softmax in base 2, probabilities rounded to T against values, one final
//            rounding. The order of sums is fixed.
template <typename T, typename C>
__device__ void prefill(const AttentionArgs& args) {
  extern __shared__ __align__(16) uint8_t shared[];
  constexpr int D = C::D;
  const uint32_t sequence = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % WARP_SIZE;
  const uint32_t first_row = args.cu_seqlens_q[sequence], rows = args.cu_seqlens_q[sequence + 1] - first_row;
  const uint32_t tile = gridDim.x - 1 - blockIdx.x;
  if (tile * C::QUERIES >= rows || rows < args.least_rows) return;

  const PagedKv<T> kv(args, sequence, head / (args.num_heads / args.num_kv_heads), args.context_lens[sequence]);
  const uint32_t before = kv.end - rows;  // keys of earlier steps
  auto visible = [&](uint32_t row) {
    const uint32_t last = before + row + 1;
    return Visible{last > args.window ? last - args.window : 0, last};
  };

  const uint32_t row = tile * C::QUERIES + threadIdx.x / WARP_SIZE * 16 + lane / 4;  // and row + 8
  const Visible sees[2] = {visible(row), visible(row + 8)};

  const uint32_t last_row = min(tile * C::QUERIES + C::QUERIES, rows) - 1;
  const Visible of_first = visible(tile * C::QUERIES);
  const uint32_t begin = of_first.first / C::KEYS * C::KEYS, end = visible(last_row).last;
  const uint32_t address = shared_address(shared);
  auto load = [&](uint32_t key, uint32_t stage) {
    const uint32_t k_tile = address + stage * 2 * TILE_BYTES<D, C::KEYS>;
    kv.template load<D, C::KEYS, C::THREADS>(k_tile, k_tile + TILE_BYTES<D, C::KEYS>, key, threadIdx.x);
    commit_copies();
  };

  WarpAttention<T, D> attention;
  load(begin, 0);

  const size_t q_stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  const T* q = static_cast<const T*>(args.qkv) + first_row * q_stride + head * args.head_dim;
  const QueryRows<T, D> queries(row < rows ? q + row * q_stride : nullptr,
                                row + 8 < rows ? q + (row + 8) * q_stride : nullptr, args.head_dim);

  uint32_t stage = 0;
  for (uint32_t key = begin; key < end; key += C::KEYS, stage ^= 1) {
    if (key + C::KEYS < end) {
      load(key + C::KEYS, stage ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    // Every row sees all keys between the first key of the last row's window and the last key of the first row.
    const bool masked = key + C::KEYS > of_first.last || key < visible(last_row).first;
    const uint32_t k_tile = address + stage * 2 * TILE_BYTES<D, C::KEYS>;
    attention.template take<C::KEYS>(queries, k_tile, k_tile + TILE_BYTES<D, C::KEYS>, key, sees, masked, args.scale_log2);
    __syncthreads();
  }
  attention.finish();

  T* out = static_cast<T*>(args.out) + (static_cast<size_t>(first_row) * args.num_heads + head) * args.head_dim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= rows) continue;
    const float inverse = 1.0f / attention.sum[r];
    T* out_row = out + static_cast<size_t>(row + 8 * r) * args.num_heads * args.head_dim;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const uint32_t column = 8 * i + lane % 4 * 2;
      if (column >= args.head_dim) break;
      *reinterpret_cast<uint32_t*>(out_row + column) =
          pack2<T>(attention.out[i][2 * r] * inverse, attention.out[i][2 * r + 1] * inverse);
    }
  }
}

#define PREFILL(T, D)                                                              \
  extern "C" __global__ void __launch_bounds__(PrefillConfig<D>::THREADS)          \
      attention_prefill_##D##_##T(const __grid_constant__ AttentionArgs args) {    \
    overlap();                                                                     \
    prefill<T, PrefillConfig<D>>(args);                                            \
  }
PREFILL(f16, 64)
PREFILL(f16, 128)
PREFILL(f16, 256)
PREFILL(bf16, 64)
PREFILL(bf16, 128)
PREFILL(bf16, 256)
