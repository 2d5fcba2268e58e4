// Rotary angles, and the step between the projections and attention: the rope part of every query head is
// rotated in place, the latent is normed, the key rotated, and both go to the token's cache slot.
//
// rope_store_kernel: grid (T, 1 + A / 4), 128 threads. Of a token's blocks the first norms the latent and
// rotates the key, the others rotate four query heads each. Bound by latency for few tokens, by bytes for
// many: q's rope parts in and out, kv in, one cache row out. An FP8 row's scales are the largest magnitude of
// each group of 128 / 448.
#include <cuda_fp8.h>

#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeadsEach = 4;  // query heads of a block

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

// Writes one row of an FP8 cache: thread i holds latents i, i + 128, ..: one of each group.
__device__ __forceinline__ void store_fp8_latents(const float (&values)[kMlaMaxLora / kFp8Group], uint8_t* to,
                                                  float* scratch) {  // [kMlaMaxLora / kFp8Group * 4]
  static_assert(kThreads == kFp8Group);
  constexpr int kGroups = kMlaMaxLora / kFp8Group;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    float most = fabsf(values[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
    if (threadIdx.x % 32 == 0) scratch[i * 4 + threadIdx.x / 32] = most;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float* most_of = scratch + i * 4;
    const float most = max_or_nan(max_or_nan(most_of[0], most_of[1]), max_or_nan(most_of[2], most_of[3]));
    const float inverse = most == 0 ? 0.0f : 448.0f / most;
    to[i * kFp8Group + threadIdx.x] =
        __nv_cvt_float_to_fp8(values[i] * inverse, __NV_SATFINITE, __NV_E4M3) & 0xff;
    if (threadIdx.x == 0) reinterpret_cast<float*>(to + kMlaMaxLora)[i] = most / 448.0f;
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads) rope_store_kernel(const __grid_constant__ RopeStoreParams p) {
  let_successor_begin();
  wait_for_predecessor();
  __shared__ float scratch[kThreads / 32];  // [kThreads / 32]
  const int64_t token = blockIdx.x;
  const bool is_key_block = blockIdx.y == 0;
  const bf16* kv = static_cast<const bf16*>(p.kv) + token * p.kv_stride;
  const int slot = p.slots[token];
  char* cache = static_cast<char*>(p.cache) + slot * p.cache_stride * (kFp8 ? 1 : 2);
  bf16* cache_rope =
      reinterpret_cast<bf16*>(cache + (kFp8 ? kMlaMaxLora + kMlaMaxLora / kFp8Group * 4 : p.lora_rank * 2));
  if (is_key_block && slot >= 0) {
    float sum = 0;
    for (int i = threadIdx.x; i < p.lora_rank; i += kThreads) {
      const float value = __bfloat162float(kv[i]);
      sum += value * value;
    }
    sum = block_sum<kThreads>(sum, scratch);
    const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.lora_rank) + p.eps);
    const auto normed = [&](int i) { return __bfloat162float(kv[i]) * inverse * p.norm_weight[i]; };
    if constexpr (kFp8) {
      __shared__ float group_scratch[kMlaMaxLora / kFp8Group * 4];  // [4, 4]
      float values[kMlaMaxLora / kFp8Group];                        // [4]
#pragma unroll
      for (int i = 0; i < kMlaMaxLora / kFp8Group; ++i) values[i] = normed(i * kFp8Group + threadIdx.x);
      store_fp8_latents(values, reinterpret_cast<uint8_t*>(cache), group_scratch);
    } else {
      for (int i = threadIdx.x; i < p.lora_rank; i += kThreads) {
        reinterpret_cast<bf16*>(cache)[i] = __float2bfloat16_rn(normed(i));
      }
    }
  }
  const float* angles = p.rope_table + token * p.rope_stride;
  const int half = p.rope_dim / 2;
  const int qk_dim = p.nope_dim + p.rope_dim;
  bf16* q = static_cast<bf16*>(p.q) + token * p.q_stride;
  // The key, or the query heads of this block.
  const int first_head = is_key_block ? p.num_heads : (static_cast<int>(blockIdx.y) - 1) * kHeadsEach;
  const int end_head =
      is_key_block ? p.num_heads + (slot >= 0 ? 1 : 0) : min(first_head + kHeadsEach, p.num_heads);
  for (int i = threadIdx.x; i < (end_head - first_head) * half; i += kThreads) {
    const int head = first_head + i / half, pair = i % half;
    const bool is_key = is_key_block;
    const bf16* from = is_key ? kv + p.lora_rank : q + head * qk_dim + p.nope_dim;
    bf16* to = is_key ? cache_rope : q + head * qk_dim + p.nope_dim;
    const int first = p.is_interleaved ? 2 * pair : pair;
    const int second = p.is_interleaved ? 2 * pair + 1 : half + pair;
    const float a = __bfloat162float(from[first]), b = __bfloat162float(from[second]);
    const float cos = angles[pair], sin = angles[half + pair];
    to[first] = __float2bfloat16_rn(a * cos - b * sin);
    to[second] = __float2bfloat16_rn(a * sin + b * cos);
  }
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
                  1 + static_cast<unsigned>(ceil_div(params.num_heads, kHeadsEach)));
  launch_overlapped(params.is_cache_fp8 ? rope_store_kernel<true> : rope_store_kernel<false>, grid, kThreads,
                    0, stream, params, "rope_store_kernel");
}

}  // namespace rodin::cuda
