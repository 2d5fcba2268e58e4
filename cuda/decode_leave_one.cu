// decode_leave.cu for one token: from the splits of attention to o's product, in half of a multiprocessor's
// registers, so that the launch behind finds room beside it.
//
// decode_leave_one_kernel: 16 warps, a block a tile of 16 rows of o. The first blocks also have a unit of 32
// rows of W_UV of one head: warps 0 to 3 add a block of 128 latents' even splits each, warps 4 to 7 the odd
// ones, warps 8 to 15 multiply 16 rows by a block each. Their outputs go to all blocks as words that say
// themselves that they are there (decode_one.cuh); warp w of every block waits for block w of them.
#include "cuda/decode_one.cuh"
#include "cuda/split_sums.cuh"

namespace rodin::cuda {
namespace {

constexpr int kLatentBlocks = kMlaMaxLora / kBlockK;
constexpr int kUnitRows = 32;
constexpr int kCombineWarps = 2 * kLatentBlocks;
enum Barrier {
  kAll,
  kOddSplits,
  kLatents = kOddSplits + kLatentBlocks,
  kUnitSums = kLatents + kLatentBlocks
};
static_assert(kDecodeRowWarps == 2 * kCombineWarps && kCombineQuads == 32 * kLatentBlocks);

__host__ __device__ int num_units_of(const MlaLeaveParams& p) {
  return p.mla.num_heads * (p.v_dim / kUnitRows);
}

struct Scratch {
  float4 odd[kCombineQuads];
  HalfBlock latents[kLatentBlocks];
  float powers[kLatentBlocks];
  float4 unit_sums[kUnitRows], unit_scales[kUnitRows];  // [kUnitRows, kLatentBlocks]
  HalfBlock inputs[kDecodeRowWarps];
  TileSums tile;
  uint4 weights[4][kDecodeRowThreads];  // of o, until there are registers for them
};

// Warps 0 .. kCombineWarps - 1: a head's latents to `scratch`.
__device__ __forceinline__ void combine_head(const SplitRow& splits, Scratch& scratch) {
  const int block = threadIdx.x / 32 % kLatentBlocks, is_odd = threadIdx.x / 32 / kLatentBlocks;
  SplitSums own = add_splits(splits, is_odd);
  if (is_odd) {
    scratch.odd[threadIdx.x % kCombineQuads] = own.total[0];
    named_arrive(kOddSplits + block, 64);
    return;
  }
  named_wait(kOddSplits + block, 64);
  own.total[1] = scratch.odd[threadIdx.x];
  const float4 out = divided(own);
  const float power =
      store_half(make_uint2(pack_bf16(out.x, out.y), pack_bf16(out.z, out.w)), scratch.latents[block]);
  if (threadIdx.x % 32 == 0) scratch.powers[block] = power;
  named_arrive(kLatents + block, 96);
}

// The kernel behind begins when attention has ended and this one's blocks lie one on a multiprocessor: beside
// attention it would find room on some of them only, and put two of its blocks there.
__device__ __forceinline__ void wait_and_let_begin() {
  wait_for_predecessor();
  let_successor_begin();
}

__global__ void __launch_bounds__(kDecodeRowThreads, 2)
    decode_leave_one_kernel(const __grid_constant__ DecodeLeaveParams p) {
  __shared__ __align__(16) Scratch scratch;
  const MlaLeaveParams& leave = p.leave;
  const WeightView& o = p.rows.weight[0];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int row0 = 16 * blockIdx.x, num_blocks = blocks_of(o);
  if (static_cast<int>(threadIdx.x) < num_blocks)
    scratch.tile.scales[threadIdx.x] =
        scale_at(scale_row(o, 0, row0, o.rows), threadIdx.x, o.blocks_per_scale);

  const auto copy_weights = [&] { WeightBlock::copy(o, row0, warp, scratch.weights[0]); };
  uint32_t launch;
  if (static_cast<int>(blockIdx.x) < num_units_of(leave)) {
    const int each = leave.v_dim / kUnitRows;
    const int head = blockIdx.x / each, unit_row0 = blockIdx.x % each * kUnitRows;
    if (warp < kCombineWarps) {
      copy_weights();
      SplitRow splits(leave.mla, head, leave.mla.cache_positions[leave.mla.first_token]);
      // Worked out here, not behind the wait.
      asm volatile("" : "+l"(splits.ml), "+l"(splits.partial), "+r"(splits.num_splits));
      wait_and_let_begin();
      combine_head(splits, scratch);
      launch = launch_number(p.arrivals);
    } else {
      const int block = warp % kLatentBlocks, tile = (warp - kCombineWarps) / kLatentBlocks;
      const int64_t offset = static_cast<int64_t>(head) * leave.weight_batch + leave.weight_offset;
      HalfWeights unit[1];
      {
        WeightBlock unit_loaded;
        unit_loaded.load(leave.w_uv, offset, unit_row0 + 16 * tile, leave.v_dim, block);
        copy_weights();
        unit[0].widen(unit_loaded);
      }
      if (tile == 0) {  // block `block`'s scale of row `lane`
        const float* const scales = scale_row(leave.w_uv, offset, unit_row0 + lane, leave.v_dim);
        reinterpret_cast<float*>(&scratch.unit_scales[lane])[block] =
            scale_at(scales, block, leave.w_uv.blocks_per_scale);
      }
      wait_and_let_begin();
      launch = launch_number(p.arrivals);
      named_wait(kLatents + block, 96);
      RowPair sums[1];
      multiply_half(unit, scratch.latents[block], scratch.powers[block], sums);
      if (lane % 4 == 0) {
        float* const to = reinterpret_cast<float*>(&scratch.unit_sums[16 * tile + g]) + block;
        to[0] = sums[0].low, to[8 * kLatentBlocks] = sums[0].high;
      }
      if (warp == kCombineWarps) {
        named_wait(kUnitSums, 32 * (kDecodeRowWarps - kCombineWarps));
        const float4 sum = scratch.unit_sums[lane], scale = scratch.unit_scales[lane];
        float total = add_block<WeightF8>(0.0f, sum.x, scale.x);
        total = add_block<WeightF8>(total, sum.y, scale.y);
        total = add_block<WeightF8>(total, sum.z, scale.z);
        total = add_block<WeightF8>(total, sum.w, scale.w);
        const float next = __shfl_down_sync(kAllLanes, total, 1);
        if (lane % 2 == 0) {
          const uint32_t pair = pack_bf16(total, next);
          const int at = (head * leave.v_dim + unit_row0 + lane) / 2;
          give_word(p.exchange + at, pair, launch);
          static_cast<uint32_t*>(leave.out)[at] = pair;
        }
      } else {
        named_arrive(kUnitSums, 32 * (kDecodeRowWarps - kCombineWarps));
      }
    }
  } else {
    copy_weights();
    wait_and_let_begin();
    launch = launch_number(p.arrivals);
  }

  copy_async_wait_all();
  HalfWeights weights[1];
  {
    WeightBlock loaded;
    loaded.read(scratch.weights[0]);
    weights[0].widen(loaded);
  }
  const int column = warp * kBlockK + 4 * lane;
  const uint2 pairs = column < o.cols ? await_words(p.exchange + column / 2, launch) : make_uint2(0, 0);
  const float power = store_half(pairs, scratch.inputs[warp]);
  __syncwarp();
  RowPair sums[1];
  multiply_half(weights, scratch.inputs[warp], power, sums);
  scratch.tile.store(sums[0], warp);
  __syncthreads();
  if (threadIdx.x < 16) {
    const bf16 total = __float2bfloat16_rn(scratch.tile.total(threadIdx.x, num_blocks));
    if (row0 + lane < o.rows) static_cast<bf16*>(p.rows.io[0].out)[row0 + lane] = total;
  }
  if (threadIdx.x == 32) count_block(p.arrivals);
}

int num_blocks_of(const DecodeLeaveParams& p) {
  return max(tiles_of(p.rows.weight[0]), num_units_of(p.leave));
}

// Shared memory that is not used, so that blocks lie alone: not beside attention, nor two of them together.
constexpr int kUnused = 110000;

}  // namespace

void prepare_decode_leave_one() {
  raise_shared_limit(decode_leave_one_kernel, kUnused);
  keep_shared_memory(decode_leave_one_kernel);
}

bool is_decode_leave_one(const DecodeLeaveParams& p) {
  return p.leave.mla.num_tokens == 1 && p.leave.v_dim % kUnitRows == 0 && p.rows.weight[1].rows == 0 &&
         num_blocks_of(p) <= p.num_multiprocessors &&
         p.rows.weight[0].cols == p.leave.mla.num_heads * p.leave.v_dim &&
         reinterpret_cast<uintptr_t>(p.leave.out) % 4 == 0;
}

void run_decode_leave_one(const DecodeLeaveParams& params, cudaStream_t stream) {
  launch_overlapped(decode_leave_one_kernel, dim3(static_cast<unsigned>(num_blocks_of(params))),
                    kDecodeRowThreads, kUnused, stream, params, "decode_leave_one_kernel");
}

}  // namespace rodin::cuda
