// decode_enter.cu for one token: from a layer's residual, or its normed input, to the queries that attention
// takes and the cache row, in half of a multiprocessor's registers, so that the launch ahead leaves it room.
//
// decode_enter_one_kernel: 16 warps, a block up to two tiles of 16 rows of q and kv_a. Every block norms the
// row for itself (norm.cuh's order: each half of the threads adds all squares). A tile of q's rotary part is
// rotated where it is summed; what others wait for goes to them as words that say themselves that they are
// there (decode_one.cuh): a head's q_nope to the warps that hold 16 rows of its W_UK, kv_a's outputs to the
// last block's last warps, which write the cache (rope_store.cuh).
#include "cuda/decode_one.cuh"
#include "cuda/norm.cuh"
#include "cuda/rope_store.cuh"

namespace rodin::cuda {
namespace {

constexpr int kTiles = kDecodeRowTiles;
constexpr int kStoreWarps = kRopeThreads / 32;
constexpr int kLatentWarps = kDecodeRowWarps - kStoreWarps;
constexpr int kStoreBarrier = 1;
static_assert(kDecodeRowThreads == 2 * kNormThreads && kDecodeRowWarps * kBlockK == 4 * kDecodeRowThreads);

struct Scratch {
  float squares[kNormThreads / 32];
  HalfBlock inputs[kDecodeRowWarps];
  TileSums tiles[kTiles];
  int parts[kTiles][16];  // rotary_part of the tiles' rows
};

// This thread's four normed inputs from 4 * threadIdx.x on, as pairs of bf16: norm.cuh's bits. All threads.
__device__ __forceinline__ uint2 norm_inputs(const NormParams& p, float* scratch) {
  const float* const x = static_cast<const float*>(p.x);
  const int own = 4 * static_cast<int>(threadIdx.x);
  if (own < p.cols) touch(p.weight + own);
  // Threads t and t + 256 add the squares of the columns that thread t of a norm has.
  const int column = 4 * (threadIdx.x % kNormThreads), half = 4 * kNormThreads;
  float4 value[2] = {};  // [2] words of a norm's thread
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (column + i * half < p.cols) value[i] = load_four(x + column + i * half);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 v = value[i];
    if (column + i * half < p.cols) sum += fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0 && threadIdx.x < kNormThreads) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  // Out of the first-level cache: there are no registers to keep them.
  const float4 v = own < p.cols ? load_four(x + own) : make_float4(0, 0, 0, 0);
  const float4 weight = own < p.cols ? load_four(p.weight + own) : make_float4(0, 0, 0, 0);
  sum = 0;
#pragma unroll
  for (int i = 0; i < kNormThreads / 32; ++i) sum += scratch[i];
  const float inverse = inverse_rms(sum, p.cols, p.eps);
  return make_uint2(pack_bf16(v.x * inverse * weight.x, v.y * inverse * weight.y),
                    pack_bf16(v.z * inverse * weight.z, v.w * inverse * weight.w));
}

// Where a row of q lies in its head's rotary part; below 0: in the other part.
__device__ __forceinline__ int rotary_part(const RopeStoreParams& p, int row) {
  return row % (p.nope_dim + p.rope_dim) - p.nope_dim;
}

// A row of q (rotary_part `part`) or kv_a, by the lanes of a tile's 16 rows.
__device__ __forceinline__ void give_row(const DecodeEnterParams& p, int matrix, int row, int part,
                                         float value, uint32_t launch) {
  const float other = __shfl_xor_sync(0xffffu, value, 1);
  if (row % 2 != 0) return;
  const uint32_t pair = pack_bf16(value, other);
  if (matrix == 1) return give_word(p.exchange + (p.rows.weight[0].rows + row) / 2, pair, launch);
  const RopeStoreParams& rope = p.enter.rope;
  uint32_t* const q = reinterpret_cast<uint32_t*>(static_cast<bf16*>(rope.q) + row);
  if (part < 0) {
    give_word(p.exchange + row / 2, pair, launch);
    *q = pair;
  } else {
    const float* const angles = rope.rope_table + part / 2;
    const float2 turned = rotated(low_float(pair), high_float(pair), angles[0], angles[rope.rope_dim / 2]);
    *q = pack_bf16(turned.x, turned.y);
  }
}

// 16 rows of W_UK, which are of one head.
struct HeadRows {
  WeightBlock weights[1];
  float scale[2];  // [row half]

  __device__ __forceinline__ void load(const WeightView& w_uk, int row0) {
    const int g = threadIdx.x % 32 / 4;
    weights[0].load(w_uk, 0, row0, w_uk.rows, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scale[half] = scale_at(scale_row(w_uk, 0, row0 + g + 8 * half, w_uk.rows), 0, 1);
  }
  __device__ __forceinline__ void run(const DecodeEnterParams& p, int row0, uint32_t launch,
                                      HalfBlock& inputs) const {
    const RopeStoreParams& rope = p.enter.rope;
    const int head = row0 / rope.lora_rank, lane = threadIdx.x % 32, g = lane / 4;
    const uint64_t* const q = p.exchange + head * (rope.nope_dim + rope.rope_dim) / 2;
    const uint2 pairs = 4 * lane < rope.nope_dim ? await_words(q + 2 * lane, launch) : make_uint2(0, 0);
    __syncwarp();  // all have read what was there
    const float power = store_half(pairs, inputs);
    __syncwarp();
    RowPair sums[1];
    multiply_half(weights, inputs, power, sums);
    if (lane % 4 != 0) return;
    bf16* const to =
        static_cast<bf16*>(p.enter.q_latent) + head * p.enter.q_latent_stride + row0 % rope.lora_rank + g;
    to[0] = __float2bfloat16_rn(add_block<WeightF8>(0.0f, sums[0].low, scale[0]));
    to[8] = __float2bfloat16_rn(add_block<WeightF8>(0.0f, sums[0].high, scale[1]));
  }
};

// The cache row, by the last warps of a block: the work of rope_store.cuh's first block, on what others give.
template <bool kFp8>
__device__ __forceinline__ void store_key(const DecodeEnterParams& p, uint32_t launch,
                                          float* scratch) {  // [kStoreWarps]
  const RopeStoreParams& rope = p.enter.rope;
  const auto sync = [] { named_wait(kStoreBarrier, kRopeThreads); };
  constexpr int kEach = kMlaMaxLora / kRopeThreads;  // latents of a thread: thread, thread + 128, ..
  const int thread = threadIdx.x - 32 * kLatentWarps, half = rope.rope_dim / 2;
  const uint64_t* const words = p.exchange + p.rows.weight[0].rows / 2;
  // Asked for before the others' words are waited for.
  const int slot = rope.slots[0];
  float weight[kEach], cos = 0, sin = 0;  // [kEach]
#pragma unroll
  for (int i = 0; i < kEach; ++i) weight[i] = rope.norm_weight[i * kRopeThreads + thread];
  if (thread < half) cos = rope.rope_table[thread], sin = rope.rope_table[half + thread];
  uint32_t pairs[kEach + 1];  // [kEach + 1] the last one of the key
  await_each(pairs, launch, [&](int i) {
    return words + (i < kEach ? (i * kRopeThreads + thread) / 2 : kMlaMaxLora / 2 + min(thread, half - 1));
  });
  float value[kEach], sum = 0;  // [kEach]
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    value[i] = thread % 2 == 0 ? low_float(pairs[i]) : high_float(pairs[i]);
    sum += value[i] * value[i];
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) scratch[thread / 32] = sum;
  sync();
  if (slot < 0) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kStoreWarps; ++i) sum += scratch[i];
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(kMlaMaxLora) + rope.eps);
#pragma unroll
  for (int i = 0; i < kEach; ++i) value[i] = value[i] * inverse * weight[i];
  char* const cache = static_cast<char*>(rope.cache) + slot * rope.cache_stride * (kFp8 ? 1 : 2);
  uint32_t* key_to;
  if constexpr (kFp8) {
    __shared__ float group_scratch[kEach * kStoreWarps];
    store_fp8_latents(value, reinterpret_cast<uint8_t*>(cache), group_scratch, thread, sync);
    key_to = reinterpret_cast<uint32_t*>(cache + kMlaMaxLora + kEach * 4);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      reinterpret_cast<bf16*>(cache)[i * kRopeThreads + thread] = __float2bfloat16_rn(value[i]);
    key_to = reinterpret_cast<uint32_t*>(cache + kMlaMaxLora * 2);
  }
  if (thread < half) {
    const float2 turned = rotated(low_float(pairs[kEach]), high_float(pairs[kEach]), cos, sin);
    key_to[thread] = pack_bf16(turned.x, turned.y);
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kDecodeRowThreads, 2)
    decode_enter_one_kernel(const __grid_constant__ DecodeEnterParams p) {
  let_successor_begin();
  __shared__ __align__(16) Scratch scratch;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_blocks = blocks_of(p.rows.weight[0]), num_tiles = RowTiles::count(p.rows);
  WeightBlock weights[kTiles];  // [kTiles] where there are fewer, the last one again
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const RowTiles::Tile at = RowTiles::tile(p.rows, min(i, num_tiles - 1));
    const WeightView& weight = p.rows.weight[at.matrix];
    weights[i].load(weight, 0, at.row0, weight.rows, warp);
    if (static_cast<int>(threadIdx.x) < num_blocks)
      scratch.tiles[i].scales[threadIdx.x] =
          scale_at(scale_row(weight, 0, at.row0, weight.rows), threadIdx.x, weight.blocks_per_scale);
    if (threadIdx.x < 16) scratch.parts[i][threadIdx.x] = rotary_part(p.enter.rope, at.row0 + lane);
  }
  // Blocks one after the other get a warp's rows, so that few rows are spread over all of them. They are
  // loaded when there are registers for them.
  const WeightView& w_uk = p.enter.w_uk;
  const int step = 16 * kLatentWarps * static_cast<int>(gridDim.x);
  int row0 = warp < kLatentWarps ? 16 * static_cast<int>(warp * gridDim.x + blockIdx.x) : w_uk.rows;
  if (row0 < w_uk.rows) WeightBlock::prefetch(w_uk, row0, 0);
  const int column = 4 * threadIdx.x, cols = p.rows.weight[0].cols;
  const bool is_norming = p.norm.x != nullptr;
  if (is_norming && column < cols) touch(p.norm.weight + column);

  wait_for_predecessor();
  const uint32_t launch = launch_number(p.arrivals);
  uint2 pairs = {};
  if (is_norming) {
    pairs = norm_inputs(p.norm, scratch.squares);
  } else if (column < cols) {
    pairs = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(p.rows.io[0].x) + column);
  }
  {
    const float power = store_half(pairs, scratch.inputs[warp]);
    __syncwarp();
    RowPair sums[kTiles];
    multiply_half(weights, scratch.inputs[warp], power, sums);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) scratch.tiles[i].store(sums[i], warp);
  }
  __syncthreads();

  const int summed = kDecodeRowWarps - 1 - warp;  // the last warps add up a tile each
  if (summed < num_tiles && lane < 16) {
    const RowTiles::Tile at = RowTiles::tile(p.rows, summed);
    give_row(p, at.matrix, at.row0 + lane, scratch.parts[summed][lane],
             scratch.tiles[summed].total(lane, num_blocks), launch);
  }
  if (warp < kLatentWarps) {
    for (; row0 < w_uk.rows; row0 += step) {
      HeadRows rows;
      rows.load(w_uk, row0);
      rows.run(p, row0, launch, scratch.inputs[warp]);
    }
  } else if (blockIdx.x == gridDim.x - 1) {
    store_key<kFp8>(p, launch, scratch.squares);
  }
  __syncthreads();
  if (threadIdx.x == 0) count_block(p.arrivals);
}

// As few as hold all tiles: attention's blocks find room beside them.
int num_blocks_of(const DecodeEnterParams& p) {
  return (tiles_of(p.rows.weight[0]) + tiles_of(p.rows.weight[1]) + kTiles - 1) / kTiles;
}

bool is_norm_taken(const DecodeEnterParams& p) {
  return p.norm.x_dtype == Dtype::kF32 && p.norm.delta == nullptr && p.norm.num_rows == 1 &&
         p.norm.cols == p.rows.weight[0].cols && is_norm_in_registers(p.norm);
}

// Shared memory that is not used, so that blocks do not lie beside the experts' kernels.
constexpr int kUnused = 72000;

}  // namespace

void prepare_decode_enter_one() {
  for (const auto kernel : {decode_enter_one_kernel<true>, decode_enter_one_kernel<false>}) {
    raise_shared_limit(kernel, kUnused);
    keep_shared_memory(kernel);
  }
}

bool is_decode_enter_one(const DecodeEnterParams& p) {
  const RopeStoreParams& rope = p.enter.rope;
  return rope.num_tokens == 1 && rope.is_interleaved && rope.rope_dim % 16 == 0 &&
         rope.lora_rank == kMlaMaxLora && rope.cache_stride % 4 == 0 && rope.rope_dim <= 2 * kRopeThreads &&
         num_blocks_of(p) <= p.num_multiprocessors && p.rows.io[0].out == rope.q &&
         p.rows.io[1].out == rope.kv && p.rows.weight[1].rows == rope.lora_rank + rope.rope_dim &&
         p.rows.weight[0].rows + p.rows.weight[1].rows <= 2 * kExchangeWords &&
         (p.norm.x == nullptr || is_norm_taken(p));
}

void run_decode_enter_one(const DecodeEnterParams& params, cudaStream_t stream) {
  launch_overlapped(
      params.enter.rope.is_cache_fp8 ? decode_enter_one_kernel<true> : decode_enter_one_kernel<false>,
      dim3(static_cast<unsigned>(num_blocks_of(params))), kDecodeRowThreads, kUnused, stream, params,
      "decode_enter_one_kernel");
}

}  // namespace rodin::cuda
