// From the splits of attention to o's product, for up to 8 tokens, with the bits of the ops that it stands
// for (mla_combine, the linear layers of W_UV and of o).
//
// decode_leave_kernel: a block a multiprocessor, 16 warps. A unit is 16 rows of W_UV of one head: the block
// puts the splits of that head together for every token (128 threads a token, mla_combine.cuh), a warp a
// block of latents multiplies. Behind a barrier of all blocks come the rows of o (decode_rows.cuh). Bound by
// latency: the weights are asked for before the kernel ahead has ended.
#include "cuda/decode_rows.cuh"
#include "cuda/mla_combine.cuh"

namespace rodin::cuda {
namespace {

constexpr int kLatentBlocks = kMlaMaxLora / kBlockK;  // blocks of inputs
constexpr int kTokensAtOnce = kDecodeRowThreads / kCombineQuads;

// 16 rows of W_UV of one head.
struct ValueUnit {
  int head, row0;

  __device__ __forceinline__ ValueUnit(const MlaLeaveParams& p, int index) {
    const int each = (p.v_dim + 15) / 16;
    head = index / each, row0 = index % each * 16;
  }
  __device__ __forceinline__ int64_t offset(const MlaLeaveParams& p) const {
    return static_cast<int64_t>(head) * p.weight_batch + p.weight_offset;
  }
};

__global__ void __launch_bounds__(kDecodeRowThreads, 1)
    decode_leave_kernel(const __grid_constant__ DecodeLeaveParams p) {
  let_successor_begin();
  __shared__ RowScratch scratch;
  __shared__ __align__(16) bf16 latents[kMlaFewTokens][kMlaMaxLora];
  __shared__ float sums[kLatentBlocks][kMlaFewTokens * kRowSumPitch];
  const MlaLeaveParams& leave = p.leave;
  const MlaParams& mla = leave.mla;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int num_units = mla.num_heads * ((leave.v_dim + 15) / 16);
  RowBlock weights;
  float scale[kLatentBlocks];  // [kLatentBlocks] of the output that this thread adds up
  const auto ask = [&](const ValueUnit& unit) {
    if (warp < kLatentBlocks) weights.load(leave.w_uv, unit.offset(leave), unit.row0, leave.v_dim, warp);
#pragma unroll
    for (int block = 0; block < kLatentBlocks; ++block) {
      const float* scales =
          scale_row(leave.w_uv, unit.offset(leave), unit.row0 + threadIdx.x % 16, leave.v_dim);
      scale[block] = scale_at(scales, block, leave.w_uv.blocks_per_scale);
    }
  };
  int index = blockIdx.x;
  if (index < num_units) ask(ValueUnit(leave, index));
  RowTiles tiles;
  tiles.ask(p.rows, scratch);
  const int quad = threadIdx.x % kCombineQuads, first_token = threadIdx.x / kCombineQuads;
  const int first_position =
      first_token < mla.num_tokens ? mla.cache_positions[mla.first_token + first_token] : 0;
  wait_for_predecessor();
  const GridBarrier barrier(p.arrivals);
  while (index < num_units) {
    const ValueUnit unit(leave, index);
    for (int token = first_token; token < mla.num_tokens; token += kTokensAtOnce) {
      const int position =
          token == first_token ? first_position : mla.cache_positions[mla.first_token + token];
      const float4 out = combine_splits<kCombineQuads>(
          mla, static_cast<int64_t>(token) * mla.num_heads + unit.head, position, nullptr);
      *reinterpret_cast<uint2*>(&latents[token][4 * quad]) =
          make_uint2(pack_bf16(out.x, out.y), pack_bf16(out.z, out.w));
    }
    __syncthreads();
    if (warp < kLatentBlocks) {
      uint32_t x[2][8];  // [K half, 8]
      load_row_inputs(x, g < mla.num_tokens ? latents[g] : nullptr, warp, kMlaMaxLora);
      float acc[4] = {};
      weights.multiply(x, acc);
      store_row_sums(acc, mla.num_tokens, sums[warp]);
    }
    __syncthreads();
    const int token = threadIdx.x / 16, row = threadIdx.x % 16;
    if (token < mla.num_tokens && unit.row0 + row < leave.v_dim) {
      float total = 0;
#pragma unroll
      for (int block = 0; block < kLatentBlocks; ++block)
        total = add_block<WeightF8>(total, sums[block][token * kRowSumPitch + row], scale[block]);
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

}  // namespace

bool is_decode_leave(const DecodeLeaveParams& p) {
  return is_mla_leave(p.leave) && is_decode_rows(p.rows, p.num_blocks);
}

void run_decode_leave(const DecodeLeaveParams& params, cudaStream_t stream) {
  launch_overlapped(decode_leave_kernel, dim3(static_cast<unsigned>(params.num_blocks)), kDecodeRowThreads, 0,
                    stream, params, "decode_leave_kernel");
}

}  // namespace rodin::cuda
