// One token's queries, key and latent on their way to the cache: the work of kRopeThreads threads, for the
// kernels that do it. `thread`: 0 .. kRopeThreads - 1; `sync` waits for all of them.
#pragma once

#include <cuda_fp8.h>

#include "cuda/common.cuh"

namespace rodin::cuda {

constexpr int kRopeThreads = 128;
constexpr int kHeadsEach = 4;  // query heads of a block

// Blocks of a token.
__host__ __device__ constexpr int rope_store_blocks(int num_heads) {
  return 1 + (num_heads + kHeadsEach - 1) / kHeadsEach;
}

// Writes one row of an FP8 cache: thread i holds latents i, i + 128, ..: one of each group.
template <class Sync>
__device__ __forceinline__ void store_fp8_latents(const float (&values)[kMlaMaxLora / kFp8Group], uint8_t* to,
                                                  float* scratch,  // [kMlaMaxLora / kFp8Group * 4]
                                                  int thread, Sync sync) {
  static_assert(kRopeThreads == kFp8Group);
  constexpr int kGroups = kMlaMaxLora / kFp8Group;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    float most = fabsf(values[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
    if (thread % 32 == 0) scratch[i * 4 + thread / 32] = most;
  }
  sync();
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float* most_of = scratch + i * 4;
    const float most = max_or_nan(max_or_nan(most_of[0], most_of[1]), max_or_nan(most_of[2], most_of[3]));
    const float inverse = most == 0 ? 0.0f : 448.0f / most;
    to[i * kFp8Group + thread] = __nv_cvt_float_to_fp8(values[i] * inverse, __NV_SATFINITE, __NV_E4M3) & 0xff;
    if (thread == 0) reinterpret_cast<float*>(to + kMlaMaxLora)[i] = most / 448.0f;
  }
}

// A pair of elements, turned by an angle.
__device__ __forceinline__ float2 rotated(float a, float b, float cos, float sin) {
  return make_float2(a * cos - b * sin, a * sin + b * cos);
}

// Part `part` of a token's: 0 norms the latent and rotates the key, the others rotate query heads.
template <bool kFp8, class Sync>
__device__ __forceinline__ void rope_store_block(const RopeStoreParams& p, int64_t token, int part,
                                                 int thread, Sync sync) {
  __shared__ float scratch[kRopeThreads / 32];  // [kRopeThreads / 32]
  const bool is_key_block = part == 0;
  const bf16* kv = static_cast<const bf16*>(p.kv) + token * p.kv_stride;
  const int slot = p.slots[token];
  char* cache = static_cast<char*>(p.cache) + slot * p.cache_stride * (kFp8 ? 1 : 2);
  bf16* cache_rope =
      reinterpret_cast<bf16*>(cache + (kFp8 ? kMlaMaxLora + kMlaMaxLora / kFp8Group * 4 : p.lora_rank * 2));
  if (is_key_block && slot >= 0) {
    float sum = 0;
    for (int i = thread; i < p.lora_rank; i += kRopeThreads) {
      const float value = __bfloat162float(kv[i]);
      sum += value * value;
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) scratch[thread / 32] = sum;
    sync();
    sum = 0;
#pragma unroll
    for (int i = 0; i < kRopeThreads / 32; ++i) sum += scratch[i];
    const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.lora_rank) + p.eps);
    const auto normed = [&](int i) { return __bfloat162float(kv[i]) * inverse * p.norm_weight[i]; };
    if constexpr (kFp8) {
      __shared__ float group_scratch[kMlaMaxLora / kFp8Group * 4];  // [4, 4]
      float values[kMlaMaxLora / kFp8Group];                        // [4]
#pragma unroll
      for (int i = 0; i < kMlaMaxLora / kFp8Group; ++i) values[i] = normed(i * kFp8Group + thread);
      store_fp8_latents(values, reinterpret_cast<uint8_t*>(cache), group_scratch, thread, sync);
    } else {
      for (int i = thread; i < p.lora_rank; i += kRopeThreads) {
        reinterpret_cast<bf16*>(cache)[i] = __float2bfloat16_rn(normed(i));
      }
    }
  }
  const float* angles = p.rope_table + token * p.rope_stride;
  const int half = p.rope_dim / 2;
  const int qk_dim = p.nope_dim + p.rope_dim;
  bf16* q = static_cast<bf16*>(p.q) + token * p.q_stride;
  // The key, or the query heads of this block.
  const int first_head = is_key_block ? p.num_heads : (part - 1) * kHeadsEach;
  const int end_head =
      is_key_block ? p.num_heads + (slot >= 0 ? 1 : 0) : min(first_head + kHeadsEach, p.num_heads);
  for (int i = thread; i < (end_head - first_head) * half; i += kRopeThreads) {
    const int head = first_head + i / half, pair = i % half;
    const bool is_key = is_key_block;
    const bf16* from = is_key ? kv + p.lora_rank : q + head * qk_dim + p.nope_dim;
    bf16* to = is_key ? cache_rope : q + head * qk_dim + p.nope_dim;
    const int first = p.is_interleaved ? 2 * pair : pair;
    const int second = p.is_interleaved ? 2 * pair + 1 : half + pair;
    const float a = __bfloat162float(from[first]), b = __bfloat162float(from[second]);
    const float cos = angles[pair], sin = angles[half + pair];
    const float2 turned = rotated(a, b, cos, sin);
    to[first] = __float2bfloat16_rn(turned.x);
    to[second] = __float2bfloat16_rn(turned.y);
  }
}

}  // namespace rodin::cuda
