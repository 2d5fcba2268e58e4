// Rotary angles, and the step between the projections and attention: the rope part of every query head is
// rotated in place, the latent is normed, the key rotated, and both go to the token's cache slot.
//
// rope_store_kernel: grid (T, 1 + A / 4), 128 threads. Of a token's blocks the first norms the latent and
// rotates the key, the others rotate four query heads each. Bound by latency for few tokens, by bytes for
// many: q's rope parts in and out, kv in, one cache row out. An FP8 row's scales are the largest magnitude of
// each group of 128 / 448.
#include "cuda/rope_store.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) rope_table_kernel(const __grid_constant__ RopeTableParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.num_tokens) * p.half) return;
  const int64_t token = i / p.half;
  const int64_t j = i % p.half;
  const float angle = __fmul_rn(static_cast<float>(p.positions[token]), p.inv_freq[j]);
  float* row = p.table + token * p.stride;
  row[j] = cosf(angle) * p.multiplier;
  row[p.half + j] = sinf(angle) * p.multiplier;
}

template <bool kFp8>
__global__ void __launch_bounds__(kRopeThreads) rope_store_kernel(const __grid_constant__ RopeStoreParams p) {
  let_successor_begin();
  wait_for_predecessor();
  rope_store_block<kFp8>(p, blockIdx.x, blockIdx.y, threadIdx.x, [] { __syncthreads(); });
}

}  // namespace

void run_rope_table(const RopeTableParams& params, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(params.num_tokens) * params.half;
  if (count == 0) return;
  launch_overlapped(rope_table_kernel, dim3(static_cast<unsigned>(ceil_div(count, kThreads))), kThreads, 0,
                    stream, params, "rope_table_kernel");
}

void run_rope_store(const RopeStoreParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(rope_store_blocks(params.num_heads)));
  launch_overlapped(params.is_cache_fp8 ? rope_store_kernel<true> : rope_store_kernel<false>, grid,
                    kRopeThreads, 0, stream, params, "rope_store_kernel");
}

}  // namespace rodin::cuda
