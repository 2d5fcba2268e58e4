// Rotary angles, and the step between the projections and attention: the rope part of every query head is
// rotated in place, the latent is normed, the key rotated, and both go to the token's cache slot.
//
// rope_store_kernel: one block of 128 threads a token; the block norms the latent, then thread i rotates
// pairs i, i + 128, .. of the A + 1 rope parts (the last one is the key). Bound by bytes: q's rope parts in
// and out, kv in, one cache row out.
#include <cuda_fp8.h>

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

// The larger one, a NaN where there is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
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
    const float most =
        max_or_nan(max_or_nan(most_of[0], most_of[1]), max_or_nan(most_of[2], most_of[3]));
    const float inverse = most == 0 ? 0.0f : 448.0f / most;
    to[i * kFp8Group + threadIdx.x] =
        __nv_cvt_float_to_fp8(values[i] * inverse, __NV_SATFINITE, __NV_E4M3) & 0xff;
    if (threadIdx.x == 0) reinterpret_cast<float*>(to + kMlaMaxLora)[i] = most / 448.0f;
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads) rope_store_kernel(const __grid_constant__ RopeStoreParams p) {
  __shared__ float scratch[kThreads / 32];  // [kThreads / 32]
  const int64_t token = blockIdx.x;
  const bf16* kv = static_cast<const bf16*>(p.kv) + token * p.kv_stride;
  const int slot = p.slots[token];
  char* cache = static_cast<char*>(p.cache) + slot * p.cache_stride * (kFp8 ? 1 : 2);
  bf16* cache_rope = reinterpret_cast<bf16*>(
      cache + (kFp8 ? kMlaMaxLora + kMlaMaxLora / kFp8Group * 4 : p.lora_rank * 2));
  if (slot >= 0) {
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
  for (int i = threadIdx.x; i < (p.num_heads + 1) * half; i += kThreads) {
    const int head = i / half, pair = i % half;
    const bool is_key = head == p.num_heads;
    if (is_key && slot < 0) continue;
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
  rope_table_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("rope_table_kernel");
}

void run_rope_store(const RopeStoreParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(params.num_tokens);
  if (params.is_cache_fp8) {
    rope_store_kernel<true><<<grid, kThreads, 0, stream>>>(params);
  } else {
    rope_store_kernel<false><<<grid, kThreads, 0, stream>>>(params);
  }
  RODIN_CHECK_LAUNCH("rope_store_kernel");
}

}  // namespace rodin::cuda
