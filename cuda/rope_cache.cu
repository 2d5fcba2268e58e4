// Rotary angles, and the step between the projections and attention: the rope part of every query head is
// rotated in place, the latent is normed, the key rotated, and both go to the token's cache slot.
//
// rope_store_kernel: one block of 128 threads a token; the block norms the latent, then thread i rotates
// pairs i, i + 128, .. of the A + 1 rope parts (the last one is the key). Bound by bytes: q's rope parts in
// and out, kv in, one cache row out.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) rope_table_kernel(const __grid_constant__ RopeTableParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.num_tokens) * p.half) return;
  const int64_t token = i / p.half;
  const int64_t j = i % p.half;
  const float angle = __fmul_rn(static_cast<float>(p.positions[token]), p.inv_freq[j]);
  float* row = p.table + token * p.stride;
  row[j] = cosf(angle) * p.multiplier;
  row[p.half + j] = sinf(angle) * p.multiplier;
}

__global__ void __launch_bounds__(kThreads) rope_store_kernel(const __grid_constant__ RopeStoreParams p) {
  __shared__ float scratch[kThreads / 32];  // [kThreads / 32]
  const int64_t token = blockIdx.x;
  const bf16* kv = static_cast<const bf16*>(p.kv) + token * p.kv_stride;
  const int slot = p.slots[token];
  bf16* cache = static_cast<bf16*>(p.cache) + slot * p.cache_stride;
  if (slot >= 0) {
    float sum = 0;
    for (int i = threadIdx.x; i < p.lora_rank; i += kThreads) {
      const float value = __bfloat162float(kv[i]);
      sum += value * value;
    }
    sum = block_sum<kThreads>(sum, scratch);
    const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.lora_rank) + p.eps);
    for (int i = threadIdx.x; i < p.lora_rank; i += kThreads) {
      cache[i] = __float2bfloat16_rn(__bfloat162float(kv[i]) * inverse * p.norm_weight[i]);
    }
  }
  const float* angles = p.rope_table + token * p.rope_stride;
  const int half = p.rope_dim / 2;
  const int qk_dim = p.nope_dim + p.rope_dim;
  bf16* q = static_cast<bf16*>(p.q) + token * p.q_stride;
  for (int i = threadIdx.x; i < (p.num_heads + 1) * half; i += kThreads) {
    const int head = i / half, pair = i % half;
    const bool is_key = head == p.num_heads;
    if (is_key && slot < 0) continue;
    const bf16* from = is_key ? kv + p.lora_rank : q + head * qk_dim + p.nope_dim;
    bf16* to = is_key ? cache + p.lora_rank : q + head * qk_dim + p.nope_dim;
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
  rope_table_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("rope_table_kernel");
}

void run_rope_store(const RopeStoreParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  rope_store_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("rope_store_kernel");
}

}  // namespace rodin::cuda
