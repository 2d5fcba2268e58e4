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
  bf16 kv[kMlaMaxLatent];
};

// This thread's four normed inputs from 4 * threadIdx.x on, as pairs of bf16: norm.cuh's bits. All threads.
__device__ __forceinline__ uint2 norm_inputs(const NormParams& p, float4 weight, float* scratch) {
  const float* const x = static_cast<const float*>(p.x);
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
  sum = 0;
#pragma unroll
  for (int i = 0; i < kNormThreads / 32; ++i) sum += scratch[i];
  const float inverse = inverse_rms(sum, p.cols, p.eps);
  const float4 v = threadIdx.x < kNormThreads ? value[0] : value[1];
  return make_uint2(pack_bf16(v.x * inverse * weight.x, v.y * inverse * weight.y),
                    pack_bf16(v.z * inverse * weight.z, v.w * inverse * weight.w));
}

// Row `row` of q or kv_a, by the lanes of a tile's 16 rows.
__device__ __forceinline__ void store_output(const DecodeEnterParams& p, int matrix, int row, float value,
                                             uint32_t launch) {
  const RopeStoreParams& rope = p.enter.rope;
  const bool is_odd = row % 2 != 0;
  const float other = __shfl_xor_sync(0xffffu, value, 1);
  const uint32_t pair = pack_bf16(value, other);  // of an even row
  if (matrix == 1) {
    if (!is_odd) give_word(p.exchange + (p.rows.weight[0].rows + row) / 2, pair, launch);
    return;
  }
  bf16* const q = static_cast<bf16*>(rope.q);
  const int part = row % (rope.nope_dim + rope.rope_dim) - rope.nope_dim;
  if (part < 0) {
    if (is_odd) return;
    give_word(p.exchange + row / 2, pair, launch);
    *reinterpret_cast<uint32_t*>(q + row) = pair;
  } else if (!is_odd) {
    const float* const angles = rope.rope_table + part / 2;
    const float2 turned = rotated(low_float(pair), high_float(pair), angles[0], angles[rope.rope_dim / 2]);
    *reinterpret_cast<uint32_t*>(q + row) = pack_bf16(turned.x, turned.y);
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
    bf16* const to = static_cast<bf16*>(p.enter.q_latent) + head * p.enter.q_latent_stride +
                     row0 % rope.lora_rank + g;
    to[0] = __float2bfloat16_rn(add_block<WeightF8>(0.0f, sums[0].low, scale[0]));
    to[8] = __float2bfloat16_rn(add_block<WeightF8>(0.0f, sums[0].high, scale[1]));
  }
};

template <bool kFp8>
__global__ void __launch_bounds__(kDecodeRowThreads, 2)
    decode_enter_one_kernel(const __grid_constant__ DecodeEnterParams p) {
  let_successor_begin();
  __shared__ __align__(16) Scratch scratch;
  const RopeStoreParams& rope = p.enter.rope;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_blocks = blocks_of(p.rows.weight[0]), num_tiles = RowTiles::count(p.rows);
  WeightBlock weights[kTiles] = {};  // [kTiles]
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i >= num_tiles) break;
    const RowTiles::Tile at = RowTiles::tile(p.rows, i);
    const WeightView& weight = p.rows.weight[at.matrix];
    weights[i].load(weight, 0, at.row0, weight.rows, warp);
    if (static_cast<int>(threadIdx.x) < num_blocks)
      scratch.tiles[i].scales[threadIdx.x] =
          scale_at(scale_row(weight, 0, at.row0, weight.rows), threadIdx.x, weight.blocks_per_scale);
  }
  // Blocks one after the other get a warp's rows, so that few rows are spread over all of them.
  const WeightView& w_uk = p.enter.w_uk;
  const int step = 16 * kLatentWarps * static_cast<int>(gridDim.x);
  int row0 = warp < kLatentWarps ? 16 * static_cast<int>(warp * gridDim.x + blockIdx.x) : w_uk.rows;
  if (row0 < w_uk.rows) WeightBlock::prefetch(w_uk, row0, 0);  // loaded when there are registers
  const int column = 4 * threadIdx.x, cols = p.rows.weight[0].cols;
  const bool is_norming = p.norm.x != nullptr;
  float4 norm_weight = {};
  if (is_norming && column < cols) norm_weight = load_four(p.norm.weight + column);

  wait_for_predecessor();
  const uint32_t launch = launch_number(p.arrivals);
  uint2 pairs = {};
  if (is_norming) {
    pairs = norm_inputs(p.norm, norm_weight, scratch.squares);
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
  HeadRows rows;
  if (row0 < w_uk.rows) rows.load(w_uk, row0);
  __syncthreads();

  const int summed = kDecodeRowWarps - 1 - warp;  // the last warps add up a tile each
  if (summed < num_tiles && lane < 16) {
    const RowTiles::Tile at = RowTiles::tile(p.rows, summed);
    store_output(p, at.matrix, at.row0 + lane, scratch.tiles[summed].total(lane, num_blocks), launch);
  }
  if (warp < kLatentWarps) {
    while (row0 < w_uk.rows) {
      rows.run(p, row0, launch, scratch.inputs[warp]);
      row0 += step;
      if (row0 < w_uk.rows) rows.load(w_uk, row0);
    }
  } else if (blockIdx.x == gridDim.x - 1) {
    const int thread = threadIdx.x - 32 * kLatentWarps;
    const uint64_t* const words = p.exchange + p.rows.weight[0].rows / 2;
    // What is wanted behind the wait.
    if (4 * thread < rope.lora_rank) touch(rope.norm_weight + 4 * thread);
    if (thread < rope.rope_dim) touch(rope.rope_table + thread);
    touch(rope.slots);
    for (int i = 4 * thread; i < rope.lora_rank + rope.rope_dim; i += 4 * kRopeThreads)
      *reinterpret_cast<uint2*>(scratch.kv + i) = await_words(words + i / 2, launch);
    const auto sync = [] { asm volatile("bar.sync %0, %1;" ::"n"(kStoreBarrier), "n"(kRopeThreads) : "memory"); };
    sync();
    RopeStoreParams own = rope;
    own.kv = scratch.kv;
    rope_store_block<kFp8>(own, 0, 0, thread, sync);
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

}  // namespace

bool is_decode_enter_one(const DecodeEnterParams& p) {
  const RopeStoreParams& rope = p.enter.rope;
  return rope.num_tokens == 1 && rope.is_interleaved && rope.rope_dim % 16 == 0 &&
         rope.lora_rank + rope.rope_dim <= kMlaMaxLatent && num_blocks_of(p) <= p.num_multiprocessors &&
         p.rows.io[0].out == rope.q && p.rows.io[1].out == rope.kv &&
         p.rows.weight[1].rows == rope.lora_rank + rope.rope_dim &&
         p.rows.weight[0].rows + p.rows.weight[1].rows <= 2 * kExchangeWords &&
         (p.norm.x == nullptr || is_norm_taken(p));
}

void run_decode_enter_one(const DecodeEnterParams& params, cudaStream_t stream) {
  launch_overlapped(params.enter.rope.is_cache_fp8 ? decode_enter_one_kernel<true> : decode_enter_one_kernel<false>,
                    dim3(static_cast<unsigned>(num_blocks_of(params))), kDecodeRowThreads, 0, stream, params,
                    "decode_enter_one_kernel");
}

}  // namespace rodin::cuda
