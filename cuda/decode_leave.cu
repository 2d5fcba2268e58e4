// From the splits of attention to o's product, for up to 8 tokens, with the bits of the ops that it stands
// for (mla_combine, the linear layers of W_UV and of o).
//
// decode_leave_kernel: 16 warps a block. A unit is 32 rows of W_UV of one head: the block puts the splits of
// that head together for every token (mla_combine.cuh), and a warp multiplies 16 rows of a block of latents.
// Behind a barrier of all blocks come the rows of o (decode_rows.cuh). Bound by latency: the weights are
// asked for before the kernel ahead has ended, in blocks on the multiprocessors that attention leaves free.
#include "cuda/decode_rows.cuh"
#include "cuda/mla_combine.cuh"

namespace rodin::cuda {
namespace {

constexpr int kLatentBlocks = kMlaMaxLora / kBlockK;  // blocks of inputs
constexpr int kUnitTiles = 2;                         // of 16 rows
constexpr int kUnitRows = 16 * kUnitTiles;
constexpr int kUnitWarps = kUnitTiles * kLatentBlocks;

__host__ __device__ int num_units_of(const MlaLeaveParams& p) {
  return p.mla.num_heads * ((p.v_dim + kUnitRows - 1) / kUnitRows);
}

// Rows of W_UV of one head.
struct ValueUnit {
  int head, row0;

  __device__ __forceinline__ ValueUnit(const MlaLeaveParams& p, int index) {
    const int each = (p.v_dim + kUnitRows - 1) / kUnitRows;
    head = index / each, row0 = index % each * kUnitRows;
  }
  __device__ __forceinline__ int64_t offset(const MlaLeaveParams& p) const {
    return static_cast<int64_t>(head) * p.weight_batch + p.weight_offset;
  }
};

// The latents of a head of every token, in bf16, to `latents`: kThreads threads a token.
template <int kThreads>
__device__ __forceinline__ void combine_head(
    const MlaParams& p, int head, bf16 (*latents)[kMlaMaxLora],
    float4* scratch) {  // [kDecodeRowThreads / kThreads, kCombineQuads]
  constexpr int kAtOnce = kDecodeRowThreads / kThreads;
  const int part = threadIdx.x / kThreads, quad = threadIdx.x % kCombineQuads;
  // All threads take part in each round: there are barriers on the way.
  for (int first = 0; first < p.num_tokens; first += kAtOnce) {
    const int token = min(first + part, p.num_tokens - 1);
    const float4 out =
        combine_splits<kThreads>(p, static_cast<int64_t>(token) * p.num_heads + head,
                                 p.cache_positions[p.first_token + token], scratch + part * kCombineQuads);
    if (first + part < p.num_tokens && threadIdx.x % kThreads < kCombineQuads) {
      *reinterpret_cast<uint2*>(&latents[token][4 * quad]) =
          make_uint2(pack_bf16(out.x, out.y), pack_bf16(out.z, out.w));
    }
  }
}

__global__ void __launch_bounds__(kDecodeRowThreads, 1)
    decode_leave_kernel(const __grid_constant__ DecodeLeaveParams p) {
  let_successor_begin();
  __shared__ RowScratch scratch;
  __shared__ __align__(16) bf16 latents[kMlaFewTokens][kMlaMaxLora];
  __shared__ float4 combine_scratch[2 * kCombineQuads];
  __shared__ float sums[kUnitTiles][kLatentBlocks][kMlaFewTokens * kRowSumPitch];
  const MlaLeaveParams& leave = p.leave;
  const MlaParams& mla = leave.mla;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int num_units = num_units_of(leave);
  const int row = threadIdx.x % kUnitRows, token = threadIdx.x / kUnitRows;  // of this thread's output
  WeightBlock weights;
  float scale[kLatentBlocks];  // [kLatentBlocks] of the output
  const auto ask = [&](const ValueUnit& unit) {
    if (warp < kUnitWarps) {
      weights.load(leave.w_uv, unit.offset(leave), unit.row0 + warp / kLatentBlocks * 16, leave.v_dim,
                   warp % kLatentBlocks);
    }
    const float* scales = scale_row(leave.w_uv, unit.offset(leave), unit.row0 + row, leave.v_dim);
#pragma unroll
    for (int block = 0; block < kLatentBlocks; ++block)
      scale[block] = scale_at(scales, block, leave.w_uv.blocks_per_scale);
  };
  int index = blockIdx.x;
  if (index < num_units) ask(ValueUnit(leave, index));
  RowTiles tiles;
  tiles.ask(p.rows, scratch);
  wait_for_predecessor();
  const GridBarrier barrier(p.arrivals);
  while (index < num_units) {
    const ValueUnit unit(leave, index);
    if (mla.num_tokens <= 2) {
      combine_head<2 * kCombineQuads>(mla, unit.head, latents, combine_scratch);
    } else {
      combine_head<kCombineQuads>(mla, unit.head, latents, combine_scratch);
    }
    __syncthreads();
    if (warp < kUnitWarps) {
      const int block = warp % kLatentBlocks;
      uint32_t x[2][8];  // [K half, 8]
      load_block_inputs(x, g < mla.num_tokens ? latents[g] : nullptr, block, kMlaMaxLora, true);
      float acc[4] = {};
      weights.multiply(x, acc);
      store_row_sums(acc, mla.num_tokens, sums[warp / kLatentBlocks][block]);
    }
    __syncthreads();
    if (token < mla.num_tokens && unit.row0 + row < leave.v_dim) {
      float total = 0;
#pragma unroll
      for (int block = 0; block < kLatentBlocks; ++block)
        total =
            add_block<WeightF8>(total, sums[row / 16][block][token * kRowSumPitch + row % 16], scale[block]);
      bf16* to = static_cast<bf16*>(leave.out) + token * leave.out_stride +
                 static_cast<int64_t>(unit.head) * leave.v_dim + unit.row0;
      to[row] = __float2bfloat16_rn(total);
    }
    index += gridDim.x;
    if (index < num_units) ask(ValueUnit(leave, index));
  }
  barrier.wait();
  tiles.run(p.rows, mla.num_tokens, scratch);
}

// Blocks of a launch: where attention has few, those that find room beside it.
int num_blocks_of(const DecodeLeaveParams& p) {
  const int left = p.num_multiprocessors - p.leave.mla.num_tiles * p.leave.mla.max_splits;
  return left >= num_units_of(p.leave) && is_decode_rows(p.rows, left) ? left : p.num_multiprocessors;
}

}  // namespace

bool is_decode_leave(const DecodeLeaveParams& p) {
  return is_mla_leave(p.leave) && is_decode_rows(p.rows, p.num_multiprocessors);
}

void run_decode_leave(const DecodeLeaveParams& params, cudaStream_t stream) {
  if (is_decode_leave_one(params)) return run_decode_leave_one(params, stream);
  launch_overlapped(decode_leave_kernel, dim3(static_cast<unsigned>(num_blocks_of(params))),
                    kDecodeRowThreads, 0, stream, params, "decode_leave_kernel");
}

}  // namespace rodin::cuda
