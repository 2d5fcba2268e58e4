// What surrounds attention where there are few tokens, in two launches instead of four, with the bits of the
// kernels that they stand for (rope_store and the linear layer of W_UK; mla_combine and the linear layer of
// W_UV). FP8 weights alone. Bound by latency: the weights are on their way before the kernel ahead has ended.
//
// mla_enter_kernel: q_latent = q_nope W_UK, each warp 16 rows of it for up to 8 tokens; other blocks of the
// same launch rotate and write the cache row (rope_store.cuh). mla_leave_kernel: grid (A, T): a block puts
// the splits of one head of one token together and multiplies them with W_UV.
#include "cuda/mla_combine.cuh"
#include "cuda/mla_latent.cuh"
#include "cuda/rope_store.cuh"

namespace rodin::cuda {
namespace {

constexpr int kEnterWarps = kRopeThreads / 32;

template <bool kFp8>
__global__ void __launch_bounds__(kRopeThreads) mla_enter_kernel(const __grid_constant__ MlaEnterParams p) {
  let_successor_begin();
  const int rope_blocks_each = rope_store_blocks(p.rope.num_heads);
  const int rope_blocks = p.rope.num_tokens * rope_blocks_each;
  if (static_cast<int>(blockIdx.x) < rope_blocks) {
    wait_for_predecessor();
    rope_store_block<kFp8>(p.rope, blockIdx.x / rope_blocks_each, blockIdx.x % rope_blocks_each, threadIdx.x,
                           [] { __syncthreads(); });
    return;
  }
  const int row0 = ((blockIdx.x - rope_blocks) * kEnterWarps + threadIdx.x / 32) * 16;
  if (row0 >= p.w_uk.rows) return;
  LatentRows latent;
  latent.ask(p.w_uk, row0);
  wait_for_predecessor();
  latent.run(p, row0, p.is_q_aligned);
}

constexpr int kLeaveThreads = 256;
constexpr int kLeaveBlocks = kMlaMaxLora / kBlockK;  // blocks of inputs

__global__ void __launch_bounds__(kLeaveThreads) mla_leave_kernel(const __grid_constant__ MlaLeaveParams p) {
  let_successor_begin();
  __shared__ __align__(16) bf16 latent[kMlaMaxLora];
  const int head = blockIdx.x, token = blockIdx.y;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t row_offset = static_cast<int64_t>(head) * p.weight_batch + p.weight_offset;
  const int row0 = threadIdx.x / 32 * 16;
  const int num_blocks = p.w_uv.cols / kBlockK;
  WeightBlock weights[kLeaveBlocks];  // [kLeaveBlocks]
  float scale[kLeaveBlocks][2];       // [kLeaveBlocks, row half]
#pragma unroll
  for (int block = 0; block < kLeaveBlocks; ++block) {
    weights[block].load(p.w_uv, row_offset, row0, p.v_dim, block);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* scales = scale_row(p.w_uv, row_offset, row0 + g + 8 * half, p.v_dim);
      scale[block][half] = block < num_blocks ? scale_at(scales, block, p.w_uv.blocks_per_scale) : 0.0f;
    }
  }
  const int position = p.mla.cache_positions[p.mla.first_token + token];
  wait_for_predecessor();
  __shared__ float4 scratch[kCombineQuads];
  const float4 out = combine_splits<kLeaveThreads>(
      p.mla, static_cast<int64_t>(token) * p.mla.num_heads + head, position, scratch);
  if (threadIdx.x < kCombineQuads) {
    reinterpret_cast<uint2*>(latent)[threadIdx.x] =
        make_uint2(pack_bf16(out.x, out.y), pack_bf16(out.z, out.w));
  }
  __syncthreads();
  float total[4] = {};
#pragma unroll
  for (int block = 0; block < kLeaveBlocks; ++block) {
    if (block >= num_blocks) break;
    uint32_t x[2][8];  // [K half, 8] the token is column 0
    load_block_inputs(x, g == 0 ? latent : nullptr, block, p.w_uv.cols, true);
    float acc[4] = {};
    weights[block].multiply(x, acc);
#pragma unroll
    for (int c = 0; c < 4; ++c) total[c] = add_block<WeightF8>(total[c], acc[c], scale[block][c / 2]);
  }
  if (t != 0) return;
  bf16* to = static_cast<bf16*>(p.out) + token * p.out_stride + static_cast<int64_t>(head) * p.v_dim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + g + 8 * half;
    if (row < p.v_dim) to[row] = __float2bfloat16_rn(total[2 * half]);
  }
}

}  // namespace

bool is_mla_enter(const MlaEnterParams& p) {
  return p.rope.num_tokens <= kMlaFewTokens && p.w_uk.dtype == Dtype::kF8E4M3 && p.rope.nope_dim <= kBlockK &&
         p.rope.lora_rank % 16 == 0;
}

void run_mla_enter(const MlaEnterParams& params, cudaStream_t stream) {
  const int64_t blocks = params.rope.num_tokens * rope_store_blocks(params.rope.num_heads) +
                         ceil_div(params.w_uk.rows, 16 * kEnterWarps);
  launch_overlapped(params.rope.is_cache_fp8 ? mla_enter_kernel<true> : mla_enter_kernel<false>,
                    dim3(static_cast<unsigned>(blocks)), kRopeThreads, 0, stream, params, "mla_enter_kernel");
}

bool is_mla_leave(const MlaLeaveParams& p) {
  return p.mla.num_tokens <= kMlaFewTokens && p.mla.max_splits > 1 && p.w_uv.dtype == Dtype::kF8E4M3 &&
         p.w_uv.bias == nullptr && p.mla.lora_rank == kMlaMaxLora && p.v_dim <= kLeaveThreads / 32 * 16;
}

void run_mla_leave(const MlaLeaveParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.mla.num_heads), static_cast<unsigned>(params.mla.num_tokens));
  launch_overlapped(mla_leave_kernel, grid, kLeaveThreads, 0, stream, params, "mla_leave_kernel");
}

}  // namespace rodin::cuda
